//! What the Postgres ledger tells of replays: each once, whatever the order of the commits, and from its own node only (C7). And
//! what the embedded store's cache knows of a replay whose operator was not told.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use oncegate_e2e::{eventually, postgres::Database};
use oncegate_sidecar::{
    cache::{BEHIND_MAX, Cache, CacheSettings},
    coordinator::{Answer, Coordinator, Limits},
    event::{Decision, FailureKind, FencingToken, Key, KeyDigest, Resolve, Resolved, State},
    ledger::{
        Error, Ledger, REPLAYS_MAX, Replayed, Standing,
        postgres::{PostgresLedger, PostgresSettings},
        sqlite::{SqliteLedger, SqliteSettings},
    },
};
use sqlx::AssertSqlSafe;

use super::{claim, completion, failure, key, resolution};

struct Replays {
    ledger: PostgresLedger,
    database: Database,
}

impl Replays {
    async fn start() -> Self {
        let database = Database::create().await.unwrap();
        let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
        Self { ledger, database }
    }

    fn standing(&self) -> Standing {
        self.ledger.standing().borrow().clone().unwrap()
    }

    async fn read(&self, after: Option<&Replayed>) -> Replayed {
        let after = after.map(|earlier| earlier.bookmark.clone().unwrap());
        self.ledger.replays(&self.standing(), after).await.unwrap()
    }

    async fn completed(&self, event_id: &str) -> Key {
        let key = key(event_id);
        let Decision::Acquired(lock) = self.ledger.claim(claim(&key, "a")).await.unwrap().decision else {
            panic!("held")
        };
        self.ledger.mark(completion(&key, &lock)).await.unwrap();
        key
    }

    /// Replays a completed event; as it is read then.
    async fn replay(&self, key: &Key) -> (KeyDigest, FencingToken) {
        let event = self.ledger.resolve(Resolve { force: true, ..resolution(key, Resolved::Pending) }).await.unwrap();
        (KeyDigest::of(key), event.fencing_token)
    }
}

/// The replay of an event as somebody else's transaction makes it.
fn recorded(event_id: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(format!(
        "insert into payment_webhook_resolutions
            (event_row, fencing_token, from_fencing_token, from_state, to_state, reason, actor, time)
        select id, nextval('oncegate_fencing_token'), fencing_token, 'completed', 'pending', 'r', 'a', clock_timestamp()
        from payment_webhook_events where event_id = '{event_id}'
        returning fencing_token"
    ))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replays_are_read_once_and_none_is_missed_whatever_the_order_of_commits() {
    let replays = Replays::start().await;
    assert!(replays.read(None).await.events.is_empty());
    let before = replays.completed("evt_1").await;
    let before = replays.replay(&before).await;
    // Another decision is none: what it is about was not completed.
    let failed = key("evt_failed");
    let Decision::Acquired(lock) = replays.ledger.claim(claim(&failed, "a")).await.unwrap().decision else {
        panic!("held")
    };
    replays.ledger.mark(failure(&failed, &lock, FailureKind::Terminal)).await.unwrap();
    replays.ledger.resolve(resolution(&failed, Resolved::Pending)).await.unwrap();
    let all = replays.read(None).await;
    assert_eq!((all.events.as_slice(), all.floor), ([before].as_slice(), FencingToken::NONE));

    // One that is recorded first, and committed last.
    let (slow, quick) = (replays.completed("evt_slow").await, replays.completed("evt_quick").await);
    let mut outside = replays.database.connect().await.unwrap();
    sqlx::raw_sql("begin").execute(&mut outside).await.unwrap();
    let token: FencingToken = sqlx::query_scalar(recorded("evt_slow")).fetch_one(&mut outside).await.unwrap();
    let quick = replays.replay(&quick).await;
    assert!(quick.1 > token);
    let second = replays.read(Some(&all)).await;
    assert_eq!(second.events, [quick]);
    sqlx::raw_sql("commit").execute(&mut outside).await.unwrap();
    let third = replays.read(Some(&second)).await;
    assert_eq!(third.events, [(KeyDigest::of(&slow), token)]);
    let fourth = replays.read(Some(&third)).await;
    assert!(fourth.events.is_empty(), "{fourth:?}");
    assert!(all.now < second.now && second.now < third.now, "{all:?} {second:?} {third:?}");
    // Whoever begins now gets all of them, the newest first.
    let all = replays.read(None).await;
    assert_eq!(all.events, [quick, (KeyDigest::of(&slow), token), before]);
    replays.ledger.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replays_are_read_from_the_ledgers_own_node_or_not_at_all() {
    let replays = Replays::start().await;
    let elsewhere = Standing { identity: "another".into(), ..replays.standing() };
    let answer = replays.ledger.replays(&elsewhere, None).await;
    assert!(matches!(answer, Err(Error::Unavailable { .. })), "{answer:?}");
    let bookmark: Option<Arc<str>> = replays.read(None).await.bookmark;
    let answer = replays.ledger.replays(&elsewhere, bookmark).await;
    assert!(matches!(answer, Err(Error::Unavailable { .. })), "{answer:?}");
    replays.read(None).await;
    replays.ledger.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_what_is_known_one_by_one_a_token_stands_for_the_oldest_replays() {
    let replays = Replays::start().await;
    let key = replays.completed("evt_1").await;
    let (digest, newest) = replays.replay(&key).await;
    let more = i64::try_from(REPLAYS_MAX).unwrap() + 5;
    // Older ones.
    let sql = format!(
        "insert into payment_webhook_resolutions
            (event_row, fencing_token, from_fencing_token, from_state, to_state, reason, actor, time)
        select r.event_row, n, n - 1, 'completed', 'pending', 'r', 'a', r.time
        from payment_webhook_resolutions r, generate_series(1, {more}) n"
    );
    sqlx::query(AssertSqlSafe(sql)).execute(&mut replays.database.connect().await.unwrap()).await.unwrap();
    let all = replays.read(None).await;
    assert_eq!(all.events.len(), REPLAYS_MAX + 1);
    assert_eq!(all.events.first(), Some(&(digest, newest)));
    assert_eq!(all.events.last(), Some(&(digest, all.floor)));
    assert_eq!(all.floor, FencingToken(6));
    replays.ledger.close().await;
}

/// Somebody holds the file for longer than a call waits: the operator is told that nobody knows, and the writer does it afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_of_unknown_outcome_is_known_to_the_embedded_stores_cache_within_two_seconds() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("oncegate.db");
    let settings = SqliteSettings { migrate: true, busy_timeout: Duration::from_secs(20), ..SqliteSettings::default() };
    let ledger = Arc::new(SqliteLedger::open(&path, &settings).unwrap());
    let cache = Cache::new(&CacheSettings::default(), ledger.standing()).unwrap();
    let coordinator = Coordinator::new(ledger.clone(), cache, Limits::default());
    let key = key("evt_1");
    let Decision::Acquired(lock) = ledger.claim(claim(&key, "first")).await.unwrap().decision else { panic!("held") };
    coordinator.mark(completion(&key, &lock)).await.unwrap();
    eventually("the cache answers", async || {
        let answer = coordinator.claim(claim(&key, "again"), Duration::ZERO).await.unwrap();
        matches!(answer, Answer::Completed(..)).then_some(())
    })
    .await;

    let backup = rusqlite::Connection::open(&path).unwrap();
    backup.execute_batch("begin immediate").unwrap();
    let replay = Resolve { force: true, ..resolution(&key, Resolved::Pending) };
    let answer = coordinator.resolve(replay, |_| {}).await;
    assert!(matches!(answer, Err(Error::OutcomeUnknown)), "{answer:?}");
    backup.execute_batch("rollback").unwrap();
    eventually("it happens all the same", async || {
        let history = ledger.history_of(key.clone()).await.unwrap().unwrap();
        (history.event.state == State::Pending).then_some(())
    })
    .await;
    let happened = Instant::now();
    let lock = eventually("the replayed event is granted", async || {
        let invoked = Instant::now();
        match coordinator.claim(claim(&key, "replay"), Duration::ZERO).await.unwrap() {
            Answer::Decided(claimed) => match claimed.decision {
                Decision::Acquired(lock) => Some(lock),
                other => panic!("neither completed nor granted: {other:?}"),
            },
            Answer::Completed(..) => {
                let behind = invoked.saturating_duration_since(happened);
                assert!(behind < BEHIND_MAX, "called completed {behind:?} after its replay");
                None
            }
        }
    })
    .await;
    assert_eq!(lock.attempt, 2);
    coordinator.close().await;
}
