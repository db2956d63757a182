//! An event with a word that this version does not know: a newer one has written it, beside it during a roll-out, or before a
//! rollback.

use futures::future::join_all;
use oncegate_sidecar::{
    event::{Decision, Event, FailureKind, FencingToken, Key, Lock, Resolved, State},
    ledger::Error,
};

use super::{Fixture, HOUR, Store, claim, completion, conformance, extension, failure, key, lost, refused, resolution};

conformance!(only_the_callers_of_an_event_that_cannot_be_read_are_told);

/// What the newer version knows as a state, and as the outcome of an attempt. The schema would be migrated before it does. And
/// a digest of another length: passed over, nothing would be compared with it any more (S8).
const NEWER: [&str; 3] = ["archived", "failed_elsewhere", "a digest of 31 bytes"];

/// Writes one of the words into the row of `evt_newer`.
async fn write(fixture: &Fixture, word: &str) {
    fixture
        .tamper(match (&fixture.store, word) {
            (Store::Sqlite { .. }, "archived") => {
                "pragma ignore_check_constraints = on;
                update payment_webhook_events set state = 'archived' where event_id = 'evt_newer'"
            }
            (Store::Sqlite { .. }, "failed_elsewhere") => {
                "pragma ignore_check_constraints = on;
                update payment_webhook_events set state = 'failed', outcome = 'failed_elsewhere'
                where event_id = 'evt_newer'"
            }
            (Store::Sqlite { .. }, _) => {
                "update payment_webhook_events set outcome = 'failed_retryable', fingerprint = zeroblob(31)
                where event_id = 'evt_newer'"
            }
            (Store::Postgres { .. }, "archived") => {
                "alter table payment_webhook_events drop constraint if exists payment_webhook_events_state_known;
                update payment_webhook_events set state = 'archived' where event_id = 'evt_newer'"
            }
            (Store::Postgres { .. }, "failed_elsewhere") => {
                "update payment_webhook_events set state = 'failed', outcome = 'failed_elsewhere'
                where event_id = 'evt_newer'"
            }
            (Store::Postgres { .. }, _) => {
                "update payment_webhook_events
                set outcome = 'failed_retryable', fingerprint = decode(repeat('00', 31), 'hex')
                where event_id = 'evt_newer'"
            }
        })
        .await;
}

/// The writer's connection, where it has one that others can see.
async fn connection(fixture: &Fixture) -> Option<String> {
    match &fixture.store {
        Store::Sqlite { .. } => None,
        Store::Postgres { database } => {
            let writer = "select string_agg(pid::text, ' ') from pg_stat_activity
                where datname = current_database() and application_name = 'oncegate-writer'";
            Some(database.query(writer).await.unwrap())
        }
    }
}

fn assert_unreadable<T: std::fmt::Debug>(answer: Result<T, Error>) {
    match answer {
        Err(Error::Internal(told)) => assert!(told.contains("this version cannot read"), "{told}"),
        other => panic!("{other:?}"),
    }
}

/// Events with calls that go together with those about `evt_newer`.
struct Others {
    new: Vec<Key>,
    /// Held, and completed meanwhile.
    done: Vec<(Key, Lock)>,
    /// Held, and extended meanwhile.
    kept: Vec<(Key, Lock)>,
    /// Held, and claimed by another meanwhile.
    busy: Vec<(Key, Lock)>,
    /// Held, and marked with another token meanwhile.
    lost: Vec<(Key, Lock)>,
}

impl Others {
    async fn of(fixture: &Fixture, round: usize) -> Others {
        Others {
            new: keys(round, "new"),
            done: held(fixture, keys(round, "done")).await,
            kept: held(fixture, keys(round, "kept")).await,
            busy: held(fixture, keys(round, "busy")).await,
            lost: held(fixture, keys(round, "lost")).await,
        }
    }
}

fn keys(round: usize, name: &str) -> Vec<Key> {
    (0..16).map(|number| key(&format!("evt_{round}_{name}_{number}"))).collect()
}

async fn held(fixture: &Fixture, keys: Vec<Key>) -> Vec<(Key, Lock)> {
    let claims = join_all(keys.iter().map(|key| fixture.ledger.claim(claim(key, "holder")))).await;
    let locks = claims.into_iter().map(|answer| match answer.unwrap().decision {
        Decision::Acquired(lock) => lock,
        other => panic!("not granted: {other:?}"),
    });
    keys.into_iter().zip(locks).collect()
}

// L3
async fn only_the_callers_of_an_event_that_cannot_be_read_are_told(fixture: &Fixture) {
    let newer = key("evt_newer");
    let lock = fixture.failed(&newer, FailureKind::Retryable).await;
    // Each word twice: what a statement of Postgres reads depends on what the claims before it were about.
    let mut rounds = Vec::new();
    for (round, word) in NEWER.into_iter().flat_map(|word| [word; 2]).enumerate() {
        rounds.push((word, Others::of(fixture, round).await));
    }
    let before = connection(fixture).await;
    for (word, Others { new, done, kept, busy, lost: late }) in rounds {
        write(fixture, word).await;
        let ledger = &fixture.ledger;
        let another = |lock: &Lock| Lock { fencing_token: FencingToken(1), ..lock.clone() };
        let (claimed, marked, extended, known, refusals, claims, mark, extended_newer, resolved) = tokio::join!(
            join_all(new.iter().map(|key| ledger.claim(claim(key, "a")))),
            join_all(done.iter().map(|(key, lock)| ledger.mark(completion(key, lock)))),
            join_all(kept.iter().map(|(key, lock)| ledger.extend(extension(key, lock, HOUR)))),
            join_all(busy.iter().map(|(key, _)| ledger.claim(claim(key, "a")))),
            join_all(late.iter().map(|(key, lock)| ledger.mark(completion(key, &another(lock))))),
            join_all(["failer", "second", "third"].map(|claim_id| ledger.claim(claim(&newer, claim_id)))),
            ledger.mark(failure(&newer, &lock, FailureKind::Unknown)),
            ledger.extend(extension(&newer, &lock, HOUR)),
            ledger.resolve(resolution(&newer, Resolved::Dead)),
        );
        for claimed in claimed {
            assert!(matches!(claimed.unwrap().decision, Decision::Acquired(_)));
        }
        for marked in marked {
            assert_eq!(marked.unwrap().event.state, State::Completed);
        }
        for ((_, lock), extended) in kept.iter().zip(extended) {
            assert_eq!(extended.unwrap().fencing_token, lock.fencing_token);
        }
        for known in known {
            assert!(matches!(known.unwrap().decision, Decision::InProgress { .. }));
        }
        for ((_, lock), refusal) in late.iter().zip(refusals) {
            assert_eq!(refused(refusal), lost(State::Processing, lock));
        }
        claims.into_iter().for_each(assert_unreadable);
        assert_unreadable(mark);
        assert_unreadable(extended_newer);
        assert_unreadable(resolved);
        // Each was done once, whatever it was done together with.
        for (key, lock) in &done {
            let Event { state, fencing_token, attempt_count, .. } = fixture.event(key).await;
            assert_eq!((state, fencing_token, attempt_count), (State::Completed, lock.fencing_token, 1));
        }
        // Whoever waits for others learns of them.
        let waited: Vec<Key> = new.iter().chain([&newer]).cloned().collect();
        let found = ledger.peek(waited).await.unwrap();
        for key in &new {
            assert!(found.iter().any(|(found, state, _)| found == key && *state == State::Processing), "{key:?}");
        }
        assert_eq!(found.iter().any(|(found, ..)| *found == newer), word != "archived", "its state");
        assert_unreadable(ledger.history_of(newer.clone()).await);
    }
    assert_eq!(connection(fixture).await, before, "there is nothing wrong with the connection");
}
