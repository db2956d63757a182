//! In which order Postgres' writer serves those who ask about one event (L3).

use futures::future::join_all;
use oncegate_e2e::postgres::Database;
use oncegate_sidecar::{
    event::{Claim, Decision, Extend, Key, Lock, Micros},
    ledger::{
        Ledger as _,
        postgres::{PostgresLedger, PostgresSettings},
    },
};

use super::{
    MINUTE, claim, completion, extension, key,
    postgres_only::{UNTIL_ONE_WAITS_FOR_US, hold, ledger},
};

async fn held(ledger: &PostgresLedger, key: &Key) -> Lock {
    match ledger.claim(Claim { lock_duration: MINUTE, ..claim(key, "a") }).await.unwrap().decision {
        Decision::Acquired(lock) => lock,
        other => panic!("it is new: {other:?}"),
    }
}

/// More than go into one batch, and a completion behind them, which comes after all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_extends_one_lock_is_answered_in_order_by_a_few_statements() {
    let (ledger, database) = ledger().await;
    let key = key("evt_1");
    let lock = held(&ledger, &key).await;
    let counted = "create sequence extended;
        create function count_extended() returns trigger language plpgsql as
            'begin perform nextval(''extended''); return null; end';
        create trigger extended after update of lock_expire_time on payment_webhook_events
            for each row execute function count_extended()";
    sqlx::raw_sql(counted).execute(&mut database.connect().await.unwrap()).await.unwrap();
    let extensions = join_all((0..1_000).map(|_| ledger.extend(extension(&key, &lock, Micros(60 * MINUTE.0)))));
    let (extended, completed) = tokio::join!(extensions, ledger.mark(completion(&key, &lock)));
    for extended in extended {
        assert!(extended.unwrap().remaining > MINUTE);
    }
    assert!(!completed.unwrap().repeated);
    // One for each batch that found the lock shorter than it asks for.
    let extended: i64 = database.query("select last_value from extended").await.unwrap().parse().unwrap();
    assert!((1..100).contains(&extended), "{extended} updates for 1,000 extensions");
    ledger.close().await;
}

/// What a batch puts off came before what was put off earlier and had no place in that batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_off_again_keeps_its_place() {
    let database = Database::create().await.unwrap();
    let settings = PostgresSettings { batch_max: 8, ..PostgresSettings::default() };
    let ledger = PostgresLedger::connect(database.url(), &settings).await.unwrap();
    let key = key("evt_1");
    let lock = held(&ledger, &key).await;
    // Each asks for more than the one before it, and so changes something: one a batch.
    let longer = |number: i64| Micros((number + 2) * MINUTE.0);
    let extend = |number: i64| -> Extend { extension(&key, &lock, longer(number)) };
    let mut outsider = database.connect().await.unwrap();
    let mut row = hold(&mut outsider, "evt_1").await;
    let rest = async {
        sqlx::query(UNTIL_ONE_WAITS_FOR_US).execute(&mut *row).await.unwrap();
        // Two full batches of new ones: nothing new comes any more when not all that are put off fit into one.
        let rest = join_all((1..=16).map(|number| ledger.extend(extend(number))));
        tokio::join!(rest, async { row.rollback().await.unwrap() }).0
    };
    let (first, rest) = tokio::join!(ledger.extend(extend(0)), rest);
    for (number, extended) in (0..).zip([first].into_iter().chain(rest)) {
        let remaining = extended.unwrap().remaining;
        assert!(remaining <= longer(number), "{number}: one that came later was served before it: {remaining:?}");
    }
    ledger.close().await;
}
