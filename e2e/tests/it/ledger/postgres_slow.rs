//! What the Postgres ledger does when its server takes longer than anybody waits, or goes away in between.

use oncegate_e2e::{eventually, postgres::Database};
use oncegate_sidecar::{
    event::{Decision, Resolve, Resolved},
    ledger::{
        Error, Ledger as _,
        postgres::{PostgresLedger, PostgresSettings},
    },
};
use sqlx::PgConnection;

use super::{
    claim, completion, key,
    postgres_only::{UNTIL_ONE_WAITS_FOR_US, hold},
    resolution,
};

/// A ledger, and somebody else on its database.
async fn ledger() -> (PostgresLedger, Database, PgConnection) {
    let database = Database::create().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    let outsider = database.connect().await.unwrap();
    (ledger, database, outsider)
}

async fn execute(outsider: &mut PgConnection, statements: &[&'static str]) {
    for &sql in statements {
        sqlx::query(sql).execute(&mut *outsider).await.unwrap();
    }
}

/// Every statement that writes events takes longer than it may. A sequence counts them: it is not rolled back.
const SLOW: &[&str] = &[
    "create sequence tried",
    "create function slow() returns trigger language plpgsql as
        'begin perform nextval(''tried''); perform pg_sleep(1.5); return null; end'",
    "create trigger slow before insert or update on payment_webhook_events for each statement execute function slow()",
];
const AS_BEFORE: &[&str] = &["drop trigger slow on payment_webhook_events"];

async fn tried(outsider: &mut PgConnection) -> i64 {
    let sql = "select case when is_called then last_value else 0 end from tried";
    sqlx::query_scalar(sql).fetch_one(outsider).await.unwrap()
}

// L3: one part a second of a batch would hold up everybody for minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_too_slow_for_a_batch_is_not_asked_for_each_of_its_calls() {
    let (ledger, _database, mut outsider) = ledger().await;
    let mut locks = Vec::new();
    for number in 0..64 {
        let key = key(&format!("evt_{number}"));
        let Decision::Acquired(lock) = ledger.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
        locks.push((key, lock));
    }
    execute(&mut outsider, SLOW).await;
    let marks = locks.iter().map(|(key, lock)| ledger.mark(completion(key, lock)));
    for answer in futures::future::join_all(marks).await {
        assert!(matches!(answer, Err(Error::Unavailable { .. } | Error::OutcomeUnknown)), "{answer:?}");
    }
    eventually("nothing of them is tried any more", async || {
        let sql = "select from pg_stat_activity
            where datname = current_database() and application_name = 'oncegate-writer' and state = 'idle'";
        sqlx::query(sql).fetch_optional(&mut outsider).await.unwrap().map(drop)
    })
    .await;
    execute(&mut outsider, AS_BEFORE).await;
    for (key, lock) in &locks {
        eventually("every mark is accepted when it is repeated", async || {
            ledger.mark(completion(key, lock)).await.is_ok().then_some(())
        })
        .await;
    }
    // The first alone, the others in one and in its halves.
    let tried = tried(&mut outsider).await;
    assert!((2..=8).contains(&tried), "{tried} statements for 64 marks");
    ledger.close().await;
}

// L3, S5: a lock that is granted to nobody blocks its event for as long as it lasts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_whose_callers_have_gone_are_not_tried_again() {
    let (ledger, database, mut outsider) = ledger().await;
    execute(&mut outsider, SLOW).await;
    let calls = (0..64).map(|number| ledger.claim(claim(&key(&format!("evt_{number}")), "a")));
    // The first alone, then the others at once: these are with the server when their callers go.
    let mut looking = database.connect().await.unwrap();
    let others_are_out = async || (tried(&mut looking).await == 2).then_some(());
    tokio::select! {
        answers = futures::future::join_all(calls) => panic!("{answers:?}"),
        () = eventually("the others are with the server", others_are_out) => {}
    }
    // When their statement has ended, and before another one of theirs could begin.
    execute(&mut outsider, AS_BEFORE).await;
    eventually("the next call is granted, behind what is still tried of them", async || {
        ledger.claim(claim(&key("evt_next"), "a")).await.is_ok().then_some(())
    })
    .await;
    let granted = "select count(*) from payment_webhook_events";
    let granted: i64 = sqlx::query_scalar(granted).fetch_one(&mut outsider).await.unwrap();
    assert_eq!(granted, 1, "the next one's, and none that nobody holds");
    ledger.close().await;
}

// S7: an operator who believes that nothing happened decides again, and the effect happens twice. Nor is it carried out on what
// came after it, where the operator has named no token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resolution_that_may_have_happened_is_neither_told_as_refused_nor_carried_out_again() {
    let (ledger, _database, mut outsider) = ledger().await;
    for (event_id, names_its_token) in [("evt_1", true), ("evt_2", false)] {
        let key = key(event_id);
        let Decision::Acquired(lock) = ledger.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
        ledger.mark(completion(&key, &lock)).await.unwrap();
        let mut held = hold(&mut outsider, event_id).await;
        let fencing_token = names_its_token.then_some(lock.fencing_token);
        let replay = Resolve { force: true, fencing_token, ..resolution(&key, Resolved::Pending) };
        let meanwhile = async {
            sqlx::query(UNTIL_ONE_WAITS_FOR_US).execute(&mut *held).await.unwrap();
            // The connection breaks, and somebody goes on from what may have come of the replay, and completes it again.
            let cut = "select pg_terminate_backend(pid) from pg_stat_activity
                where datname = current_database() and pg_backend_pid() = any (pg_blocking_pids(pid))";
            sqlx::query(cut).execute(&mut *held).await.unwrap();
            let gone_on = "update payment_webhook_events set fencing_token = fencing_token + 2 where event_id = $1";
            sqlx::query(gone_on).bind(event_id).execute(&mut *held).await.unwrap();
            held.commit().await.unwrap();
        };
        let (answer, ()) = tokio::join!(ledger.resolve(replay), meanwhile);
        assert!(matches!(answer, Err(Error::OutcomeUnknown)), "{event_id}: {answer:?}");
        let completed = "select from payment_webhook_events where event_id = $1 and state = 'completed'";
        assert!(
            sqlx::query(completed).bind(event_id).fetch_optional(&mut outsider).await.unwrap().is_some(),
            "{event_id}"
        );
    }
    ledger.close().await;
}
