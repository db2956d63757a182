//! Commands at random, many at once on few events, so that they meet in one batch or in two that follow one another. What was
//! answered must be what it could have been one after the other, and what is kept as well (I13, and all that `chaos::check` knows).

use std::collections::BTreeMap;

use oncegate_e2e::chaos::{
    application::Guard,
    check::{
        self, Run, Violation,
        linear::{self, Verdict},
    },
    history::{Call, Ending, Recorder, Reply},
    seed::Seed,
};
use oncegate_sidecar::{
    event::{Claim, Decision, Extend, FailureKind, FencingToken, Key, Mark, Micros, Refusal, Resolve, Resolved, State},
    event::{Claimed, Ending as Ended},
    ledger::Error,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{Fixture, HOUR, claim, conformance, key, model::commands, resolution};

conformance!(what_is_answered_at_once_could_have_been_answered_one_after_the_other);

/// Commands that are under way at once.
const AT_ONCE: usize = 8;
/// How often, on the same events.
const ROUNDS: usize = 5;
/// So few that many of them meet, and so many that the search for an order ends.
const EVENTS: usize = 4;

// T03
async fn what_is_answered_at_once_could_have_been_answered_one_after_the_other(fixture: &Fixture) {
    let mut random = StdRng::seed_from_u64(Seed::from_environment().0);
    let recorder = Recorder::default();
    for number in 0..commands().div_ceil(AT_ONCE * ROUNDS) {
        let mut known = Known::default();
        for _ in 0..ROUNDS {
            let calls: Vec<(Key, Call)> = (0..AT_ONCE).map(|_| known.call(number, &mut random)).collect();
            let given: Vec<(Micros, Option<Micros>)> =
                calls.iter().map(|_| (duration(&mut random), Some(duration(&mut random)))).collect();
            let asked = calls.iter().zip(given).map(async |((key, call), (lock, pause))| {
                let place = recorder.invoke(&key.event_id, call.clone());
                let reply = ask(fixture, key, call, lock, pause).await;
                if let Some(reply) = &reply {
                    recorder.answer(place, reply.clone());
                }
                reply
            });
            let replies = futures::future::join_all(asked).await;
            for ((key, call), reply) in calls.iter().zip(replies) {
                if let (Call::Claim { claim_id }, Some(Reply::Acquired { token, .. })) = (call, reply) {
                    known.locks.entry(key.clone()).or_default().push((claim_id.clone(), token));
                }
            }
        }
    }
    let (operations, rows, effects) = (recorder.operations(), fixture.rows().await, BTreeMap::new());
    let run = Run { operations: &operations, deliveries: &[], rows: &rows, effects: &effects, guard: Guard::Nothing };
    let mut violations = check::safety(&run);
    for one in check::by_event(&run) {
        match linear::check(&one) {
            Verdict::Linearizable => {}
            Verdict::Broken(violation) => violations.push(violation),
            Verdict::Undecided => {
                violations.push(Violation { invariant: "I13", event: one.event.into(), what: "undecided".into() });
            }
        }
    }
    assert!(violations.is_empty(), "{}", check::explain(&violations, &run));
}

fn duration(random: &mut StdRng) -> Micros {
    // Over at once, or not within the test.
    if random.random_range(0..2) == 0 { Micros::ZERO } else { HOUR }
}

/// What callers know of the events.
#[derive(Default)]
struct Known {
    locks: BTreeMap<Key, Vec<(String, i64)>>,
    calls: usize,
}

impl Known {
    fn call(&mut self, number: usize, random: &mut StdRng) -> (Key, Call) {
        let key = key(&format!("evt_{number}_{}", random.random_range(0..EVENTS)));
        self.calls += 1;
        let locks = self.locks.get(&key).map(Vec::as_slice).unwrap_or_default();
        // The latest as a rule, which several may use at once.
        let held = match locks {
            [] => None,
            [.., last] if random.random_range(0..4) > 0 => Some(last.clone()),
            _ => Some(locks[random.random_range(0..locks.len())].clone()),
        };
        let call = match (random.random_range(0..100), held) {
            (0..40, Some((claim_id, token))) => {
                let endings =
                    [Ending::Completed, Ending::Completed, Ending::Retryable, Ending::Terminal, Ending::Unknown];
                Call::Mark { token, claim_id, ending: endings[random.random_range(0..endings.len())] }
            }
            (40..50, Some((claim_id, token))) => Call::Extend { token, claim_id },
            (50..56, Some((claim_id, _))) => Call::Claim { claim_id },
            (85.., _) => {
                let to = [State::Pending, State::Pending, State::Completed, State::Dead][random.random_range(0..4)];
                let force = to == State::Pending && random.random_range(0..2) == 0;
                Call::Resolve { to: word(to), force, reason: format!("{number} {}", self.calls) }
            }
            // Now and then two ask under one name.
            _ => Call::Claim { claim_id: format!("{number}-{}", self.calls / 2) },
        };
        (key, call)
    }
}

fn word(state: State) -> oncegate_api::v1::State {
    match state {
        State::Completed => oncegate_api::v1::State::Completed,
        State::Dead => oncegate_api::v1::State::Dead,
        _ => oncegate_api::v1::State::Pending,
    }
}

async fn ask(fixture: &Fixture, key: &Key, call: &Call, lock: Micros, pause: Option<Micros>) -> Option<Reply> {
    let ledger = &fixture.ledger;
    let answer = match call {
        Call::Claim { claim_id } => {
            let request = Claim { lock_duration: lock, ..claim(key, claim_id) };
            ledger.claim(request).await.map(|claimed| claimed_as(&claimed))
        }
        Call::Extend { token, claim_id } => {
            let request = Extend {
                key: key.clone(),
                fencing_token: FencingToken(*token),
                claim_id: Some(claim_id.clone()),
                lock_duration: lock,
            };
            ledger.extend(request).await.map(|lock| Reply::Extended { expires: lock.expire_time.0 })
        }
        Call::Mark { token, claim_id, ending } => {
            let failed = |kind| Ended::Failed { kind, error: None, retry_after: pause };
            let ending = match ending {
                Ending::Completed => Ended::Completed { metadata: None },
                Ending::Retryable => failed(FailureKind::Retryable),
                Ending::Terminal => failed(FailureKind::Terminal),
                Ending::Unknown => failed(FailureKind::Unknown),
            };
            let request = Mark {
                key: key.clone(),
                fencing_token: FencingToken(*token),
                claim_id: Some(claim_id.clone()),
                ending,
                result: None,
                attempts_max: None,
            };
            ledger.mark(request).await.map(|marked| Reply::Marked { repeated: marked.repeated })
        }
        Call::Resolve { to, force, reason } => {
            let to = match to {
                oncegate_api::v1::State::Completed => Resolved::Completed,
                oncegate_api::v1::State::Dead => Resolved::Dead,
                _ => Resolved::Pending,
            };
            let request = Resolve { force: *force, reason: reason.clone(), ..resolution(key, to) };
            ledger.resolve(request).await.map(|event| Reply::Resolved { token: event.fencing_token.0 })
        }
        Call::Webhook { .. } => unreachable!("there is no gateway"),
    };
    match answer {
        Ok(reply) => Some(reply),
        Err(Error::Refused(refusal)) => Some(refused_as(refusal)),
        Err(Error::Unavailable { .. } | Error::Overloaded { .. }) => Some(Reply::Nothing),
        Err(Error::OutcomeUnknown) => None,
        Err(Error::Internal(what)) => Some(Reply::Defect(what)),
    }
}

fn claimed_as(claimed: &Claimed) -> Reply {
    match &claimed.decision {
        Decision::Acquired(lock) => {
            Reply::Acquired { token: lock.fencing_token.0, attempt: lock.attempt, expires: lock.expire_time.0 }
        }
        Decision::InProgress { .. } => Reply::InProgress,
        Decision::AlreadyCompleted => Reply::AlreadyCompleted { token: claimed.event.fencing_token.0 },
        Decision::Refused => Reply::Refused,
    }
}

fn refused_as(refusal: Refusal) -> Reply {
    match refusal {
        Refusal::ClaimEnded => Reply::ClaimEnded,
        Refusal::LockLost { state, fencing_token, .. } => {
            Reply::LockLost { token: fencing_token.0, state: state.as_str().to_owned() }
        }
        Refusal::OutcomeConflict { .. } => Reply::OutcomeConflict,
        Refusal::StateConflict { .. } => Reply::StateConflict,
        Refusal::NotFound => Reply::NotFound,
        Refusal::FingerprintMismatch | Refusal::DeliveryMismatch => Reply::Defect(refusal.to_string()),
    }
}
