//! The conformance suite of the ledgers: what the trait promises, on each of them. The rules by number are those of the
//! design: S states, L ledger, I invariants.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests fail by panicking, and print their seeds")]

mod cached;
mod check;
mod claims;
mod claims_refused;
mod cleanup;
mod concurrent;
mod counts;
mod damaged;
mod extend;
mod growth;
mod history;
mod marks;
mod model;
mod order;
mod own;
mod peers;
mod plans;
mod postgres_only;
mod postgres_slow;
mod races;
mod replays;
mod resolve;
mod sessions;
mod stats;
mod unreadable;

pub(crate) use cached::Condition;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cached::Cached;
use oncegate_e2e::{
    chaos::rows::{self, Rows},
    eventually,
    postgres::Database,
};
use oncegate_sidecar::{
    event::{
        Attempt, Claim, Claimed, Decision, Ending, Event, Extend, FailureKind, Key, Latest, Lock, Loss, Mark, Marked,
        Micros, Outcome, Refusal, Resolve, Resolved, State, StoredResult, Time,
    },
    ledger::{
        Error, EventHistory, Ledger,
        check::Report,
        postgres::{self, PostgresLedger, PostgresSettings},
        sqlite::{self, SqliteLedger, SqliteSettings},
    },
};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const HOUR: Micros = Micros::HOUR;
pub(crate) const MINUTE: Micros = Micros(60_000_000);

/// Makes one test for each ledger of a function that takes a [`Fixture`].
macro_rules! conformance {
    ($($test:ident),+ $(,)?) => {
        $(
            mod $test {
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn on_sqlite() {
                    let fixture = $crate::ledger::Fixture::sqlite();
                    super::$test(&fixture).await;
                    fixture.close().await;
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn on_postgres() {
                    let fixture = $crate::ledger::Fixture::postgres().await;
                    super::$test(&fixture).await;
                    fixture.close().await;
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn on_postgres_with_redis_on() {
                    $crate::ledger::with_redis($crate::ledger::Condition::On, super::$test).await;
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn on_postgres_with_redis_off() {
                    $crate::ledger::with_redis($crate::ledger::Condition::Off, super::$test).await;
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn on_postgres_with_redis_flushed() {
                    $crate::ledger::with_redis($crate::ledger::Condition::Flushed, super::$test).await;
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn on_postgres_with_redis_frozen() {
                    $crate::ledger::with_redis($crate::ledger::Condition::Frozen, super::$test).await;
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn on_postgres_with_redis_full_of_rubbish() {
                    $crate::ledger::with_redis($crate::ledger::Condition::Rubbish, super::$test).await;
                }
            }
        )+
    };
}
pub(crate) use conformance;

/// Runs a test on Postgres behind the cache, with Redis in some condition.
pub(crate) async fn with_redis(condition: Condition, test: impl AsyncFnOnce(&Fixture)) {
    let fixture = Fixture::cached(condition).await;
    test(&fixture).await;
    fixture.close().await;
}

/// A ledger on a database, once that answers in time: where dozens of tests begin at once, a first connection may take longer than
/// a service waits for it.
pub(crate) async fn connected(database: &Database) -> PostgresLedger {
    eventually("the database answers in time", async || {
        match PostgresLedger::connect(database.url(), &PostgresSettings::default()).await {
            Ok(ledger) => Some(ledger),
            Err(postgres::OpenError::Connect(postgres::ConnectError::TimedOut)) => None,
            Err(error) => panic!("{error}"),
        }
    })
    .await
}

/// A ledger of the test's own.
pub(crate) struct Fixture {
    pub(crate) ledger: Arc<dyn Ledger>,
    store: Store,
    /// Whether caches answer for it, which know of no Cleanup.
    pub(crate) is_cached: bool,
}

/// What lasts as long as the ledger.
enum Store {
    Sqlite { directory: TempDir },
    Postgres { database: Database },
}

impl Fixture {
    pub(crate) fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let settings = SqliteSettings { migrate: true, ..SqliteSettings::default() };
        let ledger = SqliteLedger::open(&directory.path().join("oncegate.db"), &settings).unwrap();
        Self { ledger: Arc::new(ledger), store: Store::Sqlite { directory }, is_cached: false }
    }

    pub(crate) async fn postgres() -> Self {
        let database = Database::create().await.unwrap();
        let ledger = connected(&database).await;
        Self { ledger: Arc::new(ledger), store: Store::Postgres { database }, is_cached: false }
    }

    pub(crate) async fn cached(condition: Condition) -> Self {
        let database = Database::create().await.unwrap();
        let ledger = Cached::in_condition(&database, condition).await;
        Self { ledger: Arc::new(ledger), store: Store::Postgres { database }, is_cached: true }
    }

    /// Recounts the rows, as `oncegate check` does.
    pub(crate) async fn check(&self) -> Report {
        match &self.store {
            Store::Sqlite { directory } => sqlite::check(&directory.path().join("oncegate.db")).unwrap(),
            Store::Postgres { database } => postgres::check(database.url()).await.unwrap(),
        }
    }

    /// All rows, read by another way than the ledger's own.
    pub(crate) async fn rows(&self) -> Rows {
        match &self.store {
            Store::Sqlite { directory } => rows::of_sqlite(&directory.path().join("oncegate.db")).unwrap(),
            Store::Postgres { database } => rows::of_postgres(database.url()).await.unwrap(),
        }
    }

    /// Changes the ledger's rows behind its back.
    pub(crate) async fn tamper(&self, sql: &'static str) {
        match &self.store {
            Store::Sqlite { directory } => {
                let conn = rusqlite::Connection::open(directory.path().join("oncegate.db")).unwrap();
                conn.busy_timeout(Duration::from_secs(5)).unwrap();
                conn.execute_batch(sql).unwrap();
            }
            Store::Postgres { database } => {
                let mut connection = database.connect().await.unwrap();
                sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
            }
        }
    }

    /// A connection to the database that the ledger knows nothing of.
    pub(crate) async fn connect(&self) -> sqlx::PgConnection {
        match &self.store {
            Store::Sqlite { .. } => panic!("the embedded store has none"),
            Store::Postgres { database } => database.connect().await.unwrap(),
        }
    }

    /// Nothing is left open, and nothing that was asked is answered afterwards.
    pub(crate) async fn close(&self) {
        self.ledger.close().await;
        let after = self.ledger.claim(claim(&key("after"), "after")).await;
        assert!(matches!(after, Err(Error::Unavailable { .. })), "a claim of a closed ledger: {after:?}");
    }

    pub(crate) async fn now(&self) -> Time {
        self.ledger.now().await.unwrap()
    }

    /// A claim that is answered. What is answered is what is kept, whenever nobody else is at work.
    pub(crate) async fn claim(&self, claim: Claim) -> Claimed {
        let claimed = self.ledger.claim(claim).await.unwrap();
        self.assert_kept(&claimed.event).await;
        claimed
    }

    /// A claim that is granted.
    pub(crate) async fn acquire(&self, claim: Claim) -> Lock {
        match self.claim(claim).await.decision {
            Decision::Acquired(lock) => lock,
            other => panic!("not granted: {other:?}"),
        }
    }

    pub(crate) async fn mark(&self, mark: Mark) -> Marked {
        let marked = self.ledger.mark(mark).await.unwrap();
        self.assert_kept(&marked.event).await;
        marked
    }

    pub(crate) async fn resolve(&self, resolve: Resolve) -> Event {
        let event = self.ledger.resolve(resolve).await.unwrap();
        self.assert_kept(&event).await;
        event
    }

    async fn assert_kept(&self, answered: &Event) {
        assert_eq!(comparable(answered), comparable(&self.event(&answered.key).await));
    }

    pub(crate) async fn history_of(&self, key: &Key) -> EventHistory {
        self.ledger.history_of(key.clone()).await.unwrap().unwrap_or_else(|| panic!("no event {key:?}"))
    }

    pub(crate) async fn event(&self, key: &Key) -> Event {
        self.history_of(key).await.event
    }

    /// Waits until the database's clock says so.
    pub(crate) async fn passed(&self, time: Time) {
        eventually("the database's clock passes a moment", async || (self.now().await >= time).then_some(())).await;
    }

    /// An event whose lock has expired. The ledger takes any duration; the least is the API's.
    pub(crate) async fn expired(&self, key: &Key, claim_id: &str) -> Lock {
        self.acquire(Claim { lock_duration: Micros::ZERO, ..claim(key, claim_id) }).await
    }

    /// An event that is done.
    pub(crate) async fn completed(&self, key: &Key) -> Lock {
        let lock = self.acquire(claim(key, "completer")).await;
        self.mark(completion(key, &lock)).await;
        lock
    }

    /// An event whose first attempt failed.
    pub(crate) async fn failed(&self, key: &Key, kind: FailureKind) -> Lock {
        let lock = self.acquire(claim(key, "failer")).await;
        self.mark(failure(key, &lock, kind)).await;
        lock
    }

    /// Waits for the flush that brings the counts to what they are to be.
    pub(crate) async fn counted(&self, key: &Key, duplicates: i64, mismatches: i64) -> Event {
        eventually(&format!("{duplicates} duplicates and {mismatches} mismatches of {key:?}"), async || {
            let event = self.event(key).await;
            assert!(event.duplicate_count <= duplicates, "{} duplicates, not {duplicates}", event.duplicate_count);
            assert!(event.mismatch_count <= mismatches, "{} mismatches, not {mismatches}", event.mismatch_count);
            (event.duplicate_count == duplicates && event.mismatch_count == mismatches).then_some(event)
        })
        .await
    }
}

/// Why a call was refused; anything else fails the test.
pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, Error>) -> Refusal {
    match answer {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// The refusal of a call with another token than the event's, which is that of `lock`.
pub(crate) fn lost(state: State, lock: &Lock) -> Refusal {
    lost_by(Loss::TakenOver, state, lock)
}

/// The refusal of a call with another token than the event's.
pub(crate) fn taken_over(state: State, event: &Event) -> Refusal {
    Refusal::LockLost { loss: Loss::TakenOver, state, fencing_token: event.fencing_token }
}

/// The refusal of a call on an event that has the token of `lock`.
pub(crate) fn lost_by(loss: Loss, state: State, lock: &Lock) -> Refusal {
    Refusal::LockLost { loss, state, fencing_token: lock.fencing_token }
}

// === requests ===

pub(crate) fn key(event_id: &str) -> Key {
    Key { tenant: "default".into(), provider: "stripe".into(), event_id: event_id.into() }
}

pub(crate) fn claim(key: &Key, claim_id: &str) -> Claim {
    Claim {
        key: key.clone(),
        event_type: "payment_intent.succeeded".into(),
        claim_id: claim_id.into(),
        holder: "pod-1".into(),
        lock_duration: HOUR,
        fingerprint: None,
        metadata: None,
        payload_digest: None,
        delivery_id: None,
        attempts_max: None,
        waiting: false,
    }
}

pub(crate) fn mark(key: &Key, lock: &Lock, ending: Ending) -> Mark {
    Mark {
        key: key.clone(),
        fencing_token: lock.fencing_token,
        claim_id: None,
        ending,
        result: None,
        attempts_max: None,
    }
}

pub(crate) fn completion(key: &Key, lock: &Lock) -> Mark {
    mark(key, lock, Ending::Completed { metadata: None })
}

pub(crate) fn failure(key: &Key, lock: &Lock, kind: FailureKind) -> Mark {
    mark(key, lock, Ending::Failed { kind, error: Some("refused".into()), retry_after: None })
}

pub(crate) fn extension(key: &Key, lock: &Lock, lock_duration: Micros) -> Extend {
    Extend { key: key.clone(), fencing_token: lock.fencing_token, claim_id: None, lock_duration }
}

/// A decision of its own each time.
pub(crate) fn resolution(key: &Key, to: Resolved) -> Resolve {
    static DECISIONS: AtomicUsize = AtomicUsize::new(1);
    Resolve {
        key: key.clone(),
        fencing_token: None,
        to,
        force: false,
        reason: format!("checked by hand, {}", DECISIONS.fetch_add(1, Ordering::Relaxed)),
        actor: "amara".into(),
        result: None,
    }
}

pub(crate) fn result(code: i32, body: &[u8]) -> StoredResult {
    StoredResult { code, body: body.to_vec().into(), content_type: "text/plain".into() }
}

// === comparing ===

/// Without the counts, which a flush may change at any time, and with JSON as text of one form.
pub(crate) fn comparable(event: &Event) -> Event {
    Event {
        duplicate_count: 0,
        mismatch_count: 0,
        last_mismatch_time: None,
        metadata: canonical(event.metadata.as_deref()),
        completion_metadata: canonical(event.completion_metadata.as_deref()),
        ..event.clone()
    }
}

fn canonical(json: Option<&str>) -> Option<String> {
    json.map(|json| serde_json::from_str::<Value>(json).unwrap().to_string())
}

/// What `lock` says about the event that it is on.
pub(crate) fn assert_holds(event: &Event, lock: &Lock, claim: &Claim) {
    assert_eq!((event.state, event.fencing_token), (State::Processing, lock.fencing_token));
    assert_eq!((event.attempt_count, lock.claim_id.as_str()), (lock.attempt, claim.claim_id.as_str()));
    let latest = event.latest.as_ref().unwrap();
    assert_eq!(latest.lock_expire_time, lock.expire_time);
    assert!(lock.remaining <= claim.lock_duration, "{lock:?}");
    assert!(lock.remaining.to_std() + Duration::from_secs(20) >= claim.lock_duration.to_std(), "{lock:?}");
}

/// Numbers without gaps from 1, tokens and times in order (I1, I10), the event's own the last.
pub(crate) fn assert_attempts_in_order(history: &EventHistory) {
    let EventHistory { event, attempts, .. } = history;
    let numbers: Vec<i32> = attempts.iter().map(|attempt| attempt.attempt).collect();
    let dense: Vec<i32> = (1..=event.attempt_count).collect();
    assert_eq!(numbers, dense, "{:?}", event.key);
    for pair in attempts.windows(2) {
        let [earlier, later] = pair else { unreachable!("windows of two") };
        assert!(earlier.fencing_token < later.fencing_token, "{earlier:?} before {later:?}");
        assert!(earlier.start_time <= later.start_time, "{earlier:?} before {later:?}");
        let end = earlier.end_time.unwrap_or_else(|| panic!("another attempt followed: {earlier:?}"));
        assert!(earlier.start_time <= end && end <= later.start_time, "{earlier:?} before {later:?}");
    }
    if let Some(last) = attempts.last() {
        match event.latest {
            Some(_) => assert_eq!(last.fencing_token, event.fencing_token),
            // Nobody has drawn a token after a failure that was the last of a lowered cap.
            None if event.state == State::Dead && last.outcome == Outcome::FailedRetryable => {
                assert!(last.fencing_token <= event.fencing_token);
            }
            None => assert!(last.fencing_token < event.fencing_token, "a resolution draws a token"),
        }
    }
}

pub(crate) fn latest(event: &Event) -> &Latest {
    event.latest.as_ref().unwrap_or_else(|| panic!("no attempt on {event:?}"))
}

pub(crate) fn only(attempts: &[Attempt]) -> &Attempt {
    match attempts {
        [attempt] => attempt,
        other => panic!("not one attempt: {other:?}"),
    }
}
