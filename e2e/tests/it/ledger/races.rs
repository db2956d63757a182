//! Many callers at once. What holds is asserted, never an order.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use oncegate_e2e::{DEADLINE, eventually};
use oncegate_sidecar::{
    event::{Claim, Decision, Lock, Loss, Micros, Outcome, Refusal, State},
    ledger::{Error, Ledger},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::Instant;

use super::{
    Fixture, assert_attempts_in_order, claim, completion, conformance, extension, key,
    stats::{assert_equal_a_recount, everything, total},
};

conformance!(
    of_64_concurrent_claims_one_wins,
    many_events_are_claimed_by_many_in_opposite_orders,
    thousands_of_takeovers_keep_tokens_attempts_and_counts,
    callers_that_take_over_from_each_other_all_get_their_turn,
    a_mark_a_claim_and_an_extension_of_one_event_at_once,
    completions_that_race_are_accepted_once,
    cancelled_claims_hold_nothing_that_their_claim_id_does_not_get,
    a_mark_goes_on_without_its_caller,
    calls_under_way_are_answered_when_the_ledger_closes,
);

// T02
async fn of_64_concurrent_claims_one_wins(fixture: &Fixture) {
    for round in 0..100 {
        let key = key(&format!("evt_{round}"));
        let claims = (0..64).map(|caller| {
            let (ledger, request) = (Arc::clone(&fixture.ledger), claim(&key, &format!("claim-{caller}")));
            tokio::spawn(async move { ledger.claim(request).await.unwrap() })
        });
        let mut tokens = Vec::new();
        let mut waiting = 0;
        for claimed in join_all(claims).await {
            let claimed = claimed.unwrap();
            match claimed.decision {
                Decision::Acquired(lock) => tokens.push(lock.fencing_token),
                Decision::InProgress { .. } => waiting += 1,
                other => panic!("{other:?}"),
            }
            assert_eq!((claimed.event.state, claimed.event.attempt_count), (State::Processing, 1));
        }
        assert_eq!((tokens.len(), waiting), (1, 63), "round {round}");
        let history = fixture.history_of(&key).await;
        assert_eq!((history.attempts.len(), history.event.fencing_token), (1, tokens[0]));
    }
    // Of each of the hundred, 63 calls were duplicates.
    for round in [0, 50, 99] {
        fixture.counted(&key(&format!("evt_{round}")), 63, 0).await;
    }
    let counts = eventually("all duplicates are counted", async || {
        let counts = total(&fixture.ledger.stats(everything()).await.unwrap());
        (counts.duplicates == 6_300).then_some(counts)
    })
    .await;
    assert_eq!((counts.total(), counts.retries), (100, 0));
}

// T03, T15
async fn many_events_are_claimed_by_many_in_opposite_orders(fixture: &Fixture) {
    const EVENTS: usize = 200;
    let callers = (0..16).map(|caller| {
        let ledger = Arc::clone(&fixture.ledger);
        tokio::spawn(async move {
            let order: Vec<usize> = if caller % 2 == 0 { (0..EVENTS).collect() } else { (0..EVENTS).rev().collect() };
            let mut won = Vec::new();
            // A handful at once, so that the batches hold many keys, and the same ones in several orders.
            for events in order.chunks(8) {
                let claims = events.iter().map(async |event| {
                    let key = key(&format!("evt_{event}"));
                    let claimed = ledger.claim(claim(&key, &format!("claim-{caller}"))).await.unwrap();
                    match claimed.decision {
                        Decision::Acquired(lock) => {
                            let marked = ledger.mark(completion(&key, &lock)).await.unwrap();
                            assert!(!marked.repeated);
                            Some(*event)
                        }
                        Decision::InProgress { .. } | Decision::AlreadyCompleted => None,
                        Decision::Refused => panic!("{claimed:?}"),
                    }
                });
                won.extend(join_all(claims).await.into_iter().flatten());
            }
            won
        })
    });
    let mut winners: Vec<usize> = join_all(callers).await.into_iter().flat_map(Result::unwrap).collect();
    winners.sort_unstable();
    assert_eq!(winners, (0..EVENTS).collect::<Vec<_>>(), "each event has one winner");
    let counts = total(&assert_equal_a_recount(fixture, &everything()).await);
    assert_eq!((counts.total(), counts[State::Completed], counts.retries), (200, 200, 0));
}

/// Eight writers, 32 events, locks of a millisecond that nobody gives back.
// T03
async fn thousands_of_takeovers_keep_tokens_attempts_and_counts(fixture: &Fixture) {
    const GRANTS: usize = 3_000;
    let granted = Arc::new(AtomicUsize::new(0));
    let deadline = Instant::now() + 3 * DEADLINE;
    let writers = (0..8_u64).map(|writer| {
        let (ledger, granted) = (Arc::clone(&fixture.ledger), Arc::clone(&granted));
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(writer);
            let mut locks: Vec<(usize, Lock)> = Vec::new();
            let mut call = 0;
            while granted.load(Ordering::Relaxed) < GRANTS {
                assert!(Instant::now() < deadline, "{} grants", granted.load(Ordering::Relaxed));
                call += 1;
                let event = random.random_range(0..32);
                let key = key(&format!("evt_{event}"));
                let request = Claim { lock_duration: Micros(1_000), ..claim(&key, &format!("claim-{writer}-{call}")) };
                match ledger.claim(request).await.unwrap().decision {
                    Decision::Acquired(lock) => {
                        granted.fetch_add(1, Ordering::Relaxed);
                        if random.random_range(0..8) == 0 {
                            // Late as a rule, and then refused unless nobody came.
                            match ledger.extend(extension(&key, &lock, Micros(1_000))).await {
                                Ok(extended) => assert_eq!(extended.fencing_token, lock.fencing_token),
                                Err(Error::Refused(Refusal::LockLost { fencing_token, .. })) => {
                                    assert!(fencing_token > lock.fencing_token);
                                }
                                Err(other) => panic!("{other:?}"),
                            }
                        }
                        locks.push((event, lock));
                    }
                    Decision::InProgress { retry_after } => assert!(retry_after <= Micros(1_000), "{retry_after:?}"),
                    other => panic!("{other:?}"),
                }
            }
            locks
        })
    });
    let mut by_event: HashMap<usize, Vec<Lock>> = HashMap::new();
    for locks in join_all(writers).await {
        for (event, lock) in locks.unwrap() {
            by_event.entry(event).or_default().push(lock);
        }
    }
    let mut grants = 0;
    let mut tokens = Vec::new();
    for (event, mut locks) in by_event {
        locks.sort_by_key(|lock| lock.attempt);
        let history = fixture.history_of(&key(&format!("evt_{event}"))).await;
        assert_attempts_in_order(&history);
        // Every grant that was answered is an attempt, and every attempt was answered to one caller.
        let answered: Vec<_> = locks.iter().map(|lock| (lock.attempt, lock.fencing_token, &lock.claim_id)).collect();
        let kept: Vec<_> = history
            .attempts
            .iter()
            .map(|attempt| (attempt.attempt, attempt.fencing_token, &attempt.claim_id))
            .collect();
        assert_eq!(answered, kept);
        // I2: in the database's time no lock begins before the one before it has expired.
        for (lock, next) in locks.iter().zip(&history.attempts[1..]) {
            assert!(lock.expire_time <= next.start_time, "{lock:?} and {next:?}");
        }
        let (last, earlier) = history.attempts.split_last().unwrap();
        assert!(earlier.iter().all(|attempt| attempt.outcome == Outcome::LockExpired));
        assert_eq!(last.outcome, Outcome::Running);
        grants += locks.len();
        tokens.extend(locks.iter().map(|lock| lock.fencing_token));
    }
    assert!(grants >= GRANTS, "{grants}");
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), grants, "no token twice (I1)");
    let counts = total(&assert_equal_a_recount(fixture, &everything()).await);
    assert_eq!((counts.total(), counts.retries), (32, i64::try_from(grants).unwrap() - 32));
}

/// Locks that are over before the next caller is judged: of those who come together only one or two can be granted at a time,
/// and none of the others is told that the store is in trouble.
async fn callers_that_take_over_from_each_other_all_get_their_turn(fixture: &Fixture) {
    const CALLERS: usize = 40;
    let key = key("evt");
    for claim_id in ["first", "second"] {
        fixture.expired(&key, claim_id).await;
    }
    let callers = (0..CALLERS).map(|caller| {
        let request = Claim { lock_duration: Micros(1), ..claim(&key, &format!("claim-{caller}")) };
        fixture.ledger.claim(request)
    });
    for claimed in join_all(callers).await {
        let decision = claimed.unwrap().decision;
        assert!(matches!(decision, Decision::Acquired(_) | Decision::InProgress { .. }), "{decision:?}");
    }
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
}

/// Calls on one event that arrive together go into one batch, and are judged one after another.
async fn a_mark_a_claim_and_an_extension_of_one_event_at_once(fixture: &Fixture) {
    for round in 0..100 {
        let key = key(&format!("evt_{round}"));
        let lock = fixture.acquire(claim(&key, "first")).await;
        let ledger = &fixture.ledger;
        let (before, marked, extended, after) = tokio::join!(
            ledger.claim(claim(&key, "second")),
            ledger.mark(completion(&key, &lock)),
            ledger.extend(extension(&key, &lock, Micros(1))),
            ledger.claim(claim(&key, "third")),
        );
        assert!(!marked.unwrap().repeated);
        match extended {
            Ok(extended) => assert_eq!(extended.fencing_token, lock.fencing_token),
            Err(Error::Refused(refusal)) => assert_eq!(refusal, super::lost_by(Loss::Ended, State::Completed, &lock)),
            Err(other) => panic!("{other:?}"),
        }
        for claimed in [before.unwrap(), after.unwrap()] {
            match claimed.decision {
                Decision::InProgress { .. } => assert_eq!(claimed.event.state, State::Processing),
                Decision::AlreadyCompleted => assert_eq!(claimed.event.state, State::Completed),
                other => panic!("{other:?}"),
            }
        }
        let history = fixture.history_of(&key).await;
        assert_eq!((history.event.state, history.attempts.len()), (State::Completed, 1));
    }
}

async fn completions_that_race_are_accepted_once(fixture: &Fixture) {
    for round in 0..50 {
        let key = key(&format!("evt_{round}"));
        let lock = fixture.expired(&key, "first").await;
        let second = claim(&key, "second");
        // The first is late, and somebody takes the event over at that moment: one of them only.
        let calls = (0..8).map(|_| fixture.ledger.mark(completion(&key, &lock)));
        let (marks, taken) = tokio::join!(join_all(calls), fixture.ledger.claim(second));
        let accepted = marks.iter().filter(|mark| matches!(mark, Ok(marked) if !marked.repeated)).count();
        match taken.unwrap().decision {
            Decision::Acquired(taken) => {
                assert_eq!(accepted, 0, "the lock had gone to another");
                for mark in marks {
                    assert_eq!(super::refused(mark), super::lost(State::Processing, &taken));
                }
            }
            Decision::AlreadyCompleted => {
                assert_eq!(accepted, 1);
                assert!(marks.iter().all(Result::is_ok), "{marks:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

// T01
async fn cancelled_claims_hold_nothing_that_their_claim_id_does_not_get(fixture: &Fixture) {
    let mut random = StdRng::seed_from_u64(7);
    for round in 0..300 {
        let key = key(&format!("evt_{round}"));
        // Before it is queued, while it waits, while it is done, or after: any of them.
        let patience = Duration::from_micros(random.random_range(0..1_500));
        drop(tokio::time::timeout(patience, fixture.ledger.claim(claim(&key, "claim"))).await);
        let lock = fixture.acquire(claim(&key, "claim")).await;
        assert_eq!(lock.attempt, 1);
        fixture.mark(completion(&key, &lock)).await;
    }
    let counts = total(&assert_equal_a_recount(fixture, &everything()).await);
    assert_eq!((counts.total(), counts[State::Completed]), (300, 300));
}

async fn a_mark_goes_on_without_its_caller(fixture: &Fixture) {
    let mut locks = Vec::new();
    for round in 0..100 {
        let key = key(&format!("evt_{round}"));
        locks.push((key.clone(), fixture.acquire(claim(&key, "claim")).await));
    }
    for (key, lock) in &locks {
        let mut mark = fixture.ledger.mark(completion(key, lock));
        // Asked once, which queues it, and given up.
        let asked = futures::poll!(&mut mark);
        drop((asked, mark));
    }
    for (key, _) in &locks {
        eventually("a mark takes effect", async || (fixture.event(key).await.state == State::Completed).then_some(()))
            .await;
    }
}

async fn calls_under_way_are_answered_when_the_ledger_closes(fixture: &Fixture) {
    let callers: Vec<_> = (0..64)
        .map(|caller| {
            let ledger = Arc::clone(&fixture.ledger);
            tokio::spawn(async move { until_closed(&ledger, caller).await })
        })
        .collect();
    eventually("some events", async || {
        (total(&fixture.ledger.stats(everything()).await.unwrap()).total() > 200).then_some(())
    })
    .await;
    fixture.ledger.close().await;
    for caller in callers {
        tokio::time::timeout(DEADLINE, caller).await.expect("it is answered").unwrap();
    }
    assert!(matches!(fixture.ledger.stats(everything()).await, Err(Error::Unavailable { .. })));
    assert!(matches!(fixture.ledger.check().await, Err(Error::Unavailable { .. })));
    assert!(matches!(fixture.ledger.now().await, Err(Error::Unavailable { .. })));
}

async fn until_closed(ledger: &Arc<dyn Ledger>, caller: usize) {
    for call in 0.. {
        let key = key(&format!("evt_{caller}_{call}"));
        match ledger.claim(claim(&key, "claim")).await {
            Ok(claimed) => assert!(matches!(claimed.decision, Decision::Acquired(_))),
            Err(Error::Overloaded { .. }) => {}
            Err(Error::Unavailable { .. } | Error::OutcomeUnknown) => return,
            Err(other) => panic!("{other:?}"),
        }
    }
}
