//! Sidecars of one database: what they tell each other (L9), and what they do to one event at once.

use std::{num::NonZeroU32, time::Duration};

use oncegate_e2e::{DEADLINE, eventually, postgres::Database, within};
use oncegate_sidecar::{
    event::{Claim, Decision, FailureKind, FencingToken, KeyDigest, Micros, Refusal},
    ledger::{
        Announcement, Error, Heard, Ledger,
        load::Seen,
        postgres::{PostgresLedger, PostgresSettings},
    },
};
use sqlx::{Executor as _, postgres::PgListener};

use super::{
    claim, completion,
    counts::{Reached, through_a_proxy},
    failure, key,
    postgres_only::hold,
};

fn announcement(event_id: &str, resolved: bool) -> Announcement {
    Announcement { digest: KeyDigest::of(&key(event_id)), fencing_token: FencingToken(1), resolved }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_announces_its_completions_only_while_another_is_there() {
    let database = Database::create().await.unwrap();
    let settings = PostgresSettings::default();
    let ledger = PostgresLedger::connect(database.url(), &settings).await.unwrap();
    let Decision::Acquired(lock) = ledger.claim(claim(&key("evt"), "a")).await.unwrap().decision else {
        panic!("held")
    };
    ledger.mark(completion(&key("evt"), &lock)).await.unwrap();
    // Its second connection that writes is no second sidecar.
    let since = eventually("the times of the completion are written", async || {
        let writes = "(select max(query_start)::text from pg_stat_activity
            where datname = current_database() and application_name = 'oncegate-counts')";
        Some(database.query(&format!("coalesce({writes}, '')")).await.unwrap()).filter(|since| !since.is_empty())
    })
    .await;
    let looked = format!(
        "(select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
            and state = 'idle' and query like '%from pg_locks%' and query_start > '{since}')"
    );
    eventually("it has looked who is there", async || (database.query(&looked).await.unwrap() != "0").then_some(()))
        .await;
    let mut listener = PgListener::connect(database.url()).await.unwrap();
    listener.listen("oncegate_events").await.unwrap();
    let (completed, resolved) = (announcement("completed", false), announcement("resolved", true));
    ledger.announce(completed);
    ledger.announce(resolved);
    let heard = listener.recv().await.unwrap();
    assert!(heard.payload().contains(&resolved.digest.encode()), "{}", heard.payload());
    assert!(!heard.payload().contains(&completed.digest.encode()), "nobody is there: {}", heard.payload());

    let other = PostgresLedger::connect(database.url(), &settings).await.unwrap();
    eventually("a completion is announced to the other", async || {
        ledger.announce(completed);
        let heard = tokio::time::timeout(Duration::from_millis(100), listener.recv()).await.ok()?.unwrap();
        heard.payload().contains(&completed.digest.encode()).then_some(())
    })
    .await;
    other.close().await;
    ledger.close().await;
}

// T29: one's own writer does not see what the others' do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cleanup_knows_whether_another_sidecar_works_on_the_database() {
    let database = Database::create().await.unwrap();
    let settings = PostgresSettings::default();
    let ledger = PostgresLedger::connect(database.url(), &settings).await.unwrap();
    let load = ledger.load().expect("it is measured");
    let is_shared = || load.look(&mut Seen::default()).is_shared;
    let other = PostgresLedger::connect(database.url(), &settings).await.unwrap();
    eventually("the other is known", async || is_shared().then_some(())).await;
    other.close().await;
    eventually("it is known to have gone", async || (!is_shared()).then_some(())).await;
    ledger.close().await;
}

/// The port from which somebody listens who has not been asked since whether they are alive.
async fn listens(database: &Database, known: &[u16]) -> Option<u16> {
    let known = known.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let port = format!(
        "(select min(client_port) from pg_stat_activity where datname = current_database() and state = 'idle'
            and query = 'LISTEN \"oncegate_events\"' and client_port not in ({known}))"
    );
    database.query(&port).await.unwrap().parse().ok()
}

// I12: what stands between has forgotten the connection, or the server has vanished: nobody is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_that_are_lost_without_a_word_are_replaced_and_keep_no_place_of_those_who_ask() {
    let Reached { ledger, proxy, database, _cluster } = through_a_proxy().await;
    let mut heard = ledger.announcements();
    let mut known = vec![0];
    let mut listening = eventually("it listens", async || listens(&database, &known).await).await;
    known.push(listening);
    let other = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    known.push(eventually("the other listens", async || listens(&database, &known).await).await);
    for round in 1..=3 {
        proxy.silence(listening);
        // A quiet connection is asked after a while whether it is alive.
        listening = within(2 * DEADLINE, async || listens(&database, &known).await).await.expect("it listens anew");
        known.push(listening);
        let told = Announcement { fencing_token: FencingToken(round), ..announcement("resolved", true) };
        eventually("what the other tells is heard again", async || {
            other.announce(told);
            while let Ok(next) = tokio::time::timeout(Duration::from_millis(100), heard.recv()).await {
                if next.unwrap() == Heard::Changed(told) {
                    return Some(());
                }
            }
            None
        })
        .await;
        eventually("whoever asks is answered", async || {
            ledger.check().await.ok()?;
            ledger.peek(vec![key("evt")]).await.ok()?;
            ledger.now().await.ok().map(drop)
        })
        .await;
    }
    other.close().await;
    ledger.close().await;
}

/// As an old primary is fenced: it goes on answering, and nothing happens on it any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_leaves_a_server_that_has_become_read_only() {
    let Reached { ledger, proxy: _proxy, database, _cluster } = through_a_proxy().await;
    let listening = eventually("it listens", async || listens(&database, &[0]).await).await;
    let mut connection = database.connect().await.unwrap();
    for sql in ["alter system set default_transaction_read_only = on", "select pg_reload_conf()"] {
        connection.execute(sql).await.unwrap();
    }
    // Where it connects to leads to the new one.
    let anew = within(2 * DEADLINE, async || listens(&database, &[0, listening]).await).await;
    anew.expect("it listens anew");
    ledger.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_is_closed_listens_no_more() {
    let database = Database::create().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    eventually("it listens", async || listens(&database, &[0]).await).await;
    ledger.close().await;
    let sessions = "(select count(*) from pg_stat_activity
        where datname = current_database() and application_name like 'oncegate%')";
    eventually("its sessions have ended", async || (database.query(sessions).await.unwrap() == "0").then_some(()))
        .await;
}

// S3: the first result stands. The state does not change when the holder of what an expiry made dead says how it ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_endings_of_a_buried_attempt_the_first_stands() {
    let database = Database::create().await.unwrap();
    let settings = PostgresSettings::default();
    let ledger = PostgresLedger::connect(database.url(), &settings).await.unwrap();
    let other = PostgresLedger::connect(database.url(), &settings).await.unwrap();
    let key = key("evt");
    // Its lock has expired at once, and no other attempt is allowed.
    let only = Claim { lock_duration: Micros::ZERO, attempts_max: NonZeroU32::new(1), ..claim(&key, "a") };
    let Decision::Acquired(lock) = ledger.claim(only.clone()).await.unwrap().decision else { panic!("held") };
    let buried = ledger.claim(Claim { claim_id: "b".into(), ..only }).await.unwrap();
    assert_eq!(buried.decision, Decision::Refused);
    let mut outsider = database.connect().await.unwrap();
    let held = hold(&mut outsider, "evt").await;
    let waiting = |count: i32| {
        let waiting = "(select count(*) from pg_stat_activity
            where datname = current_database() and cardinality(pg_blocking_pids(pid)) > 0)";
        let database = &database;
        async move {
            eventually("marks wait for the row", async || {
                (database.query(waiting).await.unwrap() == count.to_string()).then_some(())
            })
            .await;
        }
    };
    let first = ledger.mark(failure(&key, &lock, FailureKind::Terminal));
    let second = async {
        waiting(1).await;
        other.mark(completion(&key, &lock)).await
    };
    let release = async {
        waiting(2).await;
        held.rollback().await.unwrap();
    };
    let (first, second, ()) = tokio::join!(first, second, release);
    // Whichever was first: one that waited for too long asks again, behind the other.
    let (accepted, refused) = if first.is_ok() { (first, second) } else { (second, first) };
    let recorded = accepted.unwrap().event.latest.unwrap().outcome;
    let conflict = Refusal::OutcomeConflict { recorded };
    assert!(matches!(&refused, Err(Error::Refused(refusal)) if *refusal == conflict), "{refused:?} after {recorded}");
    let event = ledger.history_of(key).await.unwrap().unwrap().event;
    assert_eq!(event.latest.unwrap().outcome, recorded);
    other.close().await;
    ledger.close().await;
}
