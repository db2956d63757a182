//! Every state and every request that can meet it, as tables written by hand beside the rules they check.

mod document;
mod resolutions;

use super::*;
use crate::event::{Digest, FencingToken, Key, Latest, Resolved, RowId, StoredResult, apply, fixture};

const NOW: Time = Time(1_700_000_000_000_000);
const MINUTE: Micros = Micros(60_000_000);
/// What lies ahead or behind by the least there is: the edges count.
const TICK: Micros = Micros(1);

const TOKEN: FencingToken = FencingToken(4_711);
const LATER_TOKEN: FencingToken = FencingToken(TOKEN.0 + 1);
const EARLIER_TOKEN: FencingToken = FencingToken(4_700);
const EARLIEST_TOKEN: FencingToken = FencingToken(EARLIER_TOKEN.0 - 1);
const ATTEMPTS: i32 = 3;

const FINGERPRINTS: [Option<Digest>; 3] = [None, Some([1; 32]), Some([2; 32])];

/// An event in one of the forms that the ledger can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// An operator asked for another attempt; all earlier ones are in the archive.
    Pending,
    ProcessingLive,
    /// The lock ends at this very moment.
    ProcessingExpired,
    Completed,
    /// By an operator.
    CompletedByHand,
    /// The next attempt may be granted at once.
    Failed,
    /// The pause has a microsecond to go.
    FailedPaused,
    /// The pause ends at this very moment.
    FailedPausePassed,
    Unknown,
    /// MarkFailed, terminal.
    DeadTerminal,
    /// MarkFailed, retryable, at the cap.
    DeadUsedUp,
    /// The lock expired at the cap.
    DeadBuried,
    /// A retryable failure below the cap, which then was lowered: the attempt is in the archive, and the token still its own.
    DeadLowered,
    /// By an operator.
    DeadByHand,
}

use Shape::*;

impl Shape {
    const ALL: [Shape; 14] = [
        Pending,
        ProcessingLive,
        ProcessingExpired,
        Completed,
        CompletedByHand,
        Failed,
        FailedPaused,
        FailedPausePassed,
        Unknown,
        DeadTerminal,
        DeadUsedUp,
        DeadBuried,
        DeadLowered,
        DeadByHand,
    ];

    fn state(self) -> State {
        match self {
            Pending => State::Pending,
            ProcessingLive | ProcessingExpired => State::Processing,
            Completed | CompletedByHand => State::Completed,
            Failed | FailedPaused | FailedPausePassed => State::Failed,
            Unknown => State::Unknown,
            DeadTerminal | DeadUsedUp | DeadBuried | DeadLowered | DeadByHand => State::Dead,
        }
    }

    /// The outcome of the attempt on the event's row, unless a resolution or a burial has closed it.
    fn outcome(self) -> Option<Outcome> {
        match self {
            Pending | CompletedByHand | DeadLowered | DeadByHand => None,
            ProcessingLive | ProcessingExpired => Some(Outcome::Running),
            Completed => Some(Outcome::Completed),
            Failed | FailedPaused | FailedPausePassed | DeadUsedUp => Some(Outcome::FailedRetryable),
            Unknown => Some(Outcome::FailedUnknown),
            DeadTerminal => Some(Outcome::FailedTerminal),
            DeadBuried => Some(Outcome::LockExpired),
        }
    }

    fn event(self) -> Event {
        let state = self.state();
        let lock_expire_time = if self == ProcessingLive { NOW.plus(MINUTE) } else { NOW };
        Event {
            row: RowId(1),
            key: key(),
            event_type: "payment.succeeded".into(),
            state,
            attempt_count: ATTEMPTS,
            attempts_forgiven: 0,
            duplicate_count: 0,
            mismatch_count: 0,
            last_mismatch_time: None,
            fencing_token: TOKEN,
            create_time: NOW.minus(MINUTE),
            update_time: NOW.minus(TICK),
            end_time: matches!(state, State::Completed | State::Unknown | State::Dead).then(|| NOW.minus(TICK)),
            retry_time: match self {
                FailedPaused => Some(NOW.plus(TICK)),
                FailedPausePassed => Some(NOW),
                _ => None,
            },
            fingerprint: None,
            metadata: None,
            completion_metadata: None,
            result: None,
            last_error: None,
            latest: self.outcome().map(|outcome| Latest {
                claim_id: "own".into(),
                holder: "pod".into(),
                start_time: NOW.minus(MINUTE),
                lock_expire_time,
                outcome,
                payload_digest: None,
            }),
        }
    }
}

fn key() -> Key {
    fixture::key("evt_1")
}

fn claim_by(claim_id: &str) -> Claim {
    fixture::claim("evt_1", claim_id)
}

#[test]
fn the_shapes_cover_every_state_and_every_outcome() {
    for state in State::ALL {
        assert!(Shape::ALL.iter().any(|shape| shape.state() == state), "{state}");
    }
    for outcome in Outcome::ALL {
        assert!(Shape::ALL.iter().any(|shape| shape.outcome() == Some(outcome)), "{outcome}");
    }
}

// === CheckAndLock ===

#[derive(Clone, Copy, Debug)]
enum Answer {
    Grant,
    Bury,
    SameLock,
    Wait(Micros),
    Done,
    Held,
    Ended,
}

use Answer::*;

impl Answer {
    fn step(self, event: &Event) -> ClaimStep {
        match self {
            Grant => ClaimStep::Grant,
            Bury => ClaimStep::Bury,
            SameLock => ClaimStep::Keep(Decision::Acquired(Lock {
                fencing_token: event.fencing_token,
                attempt: event.attempt_count,
                expire_time: NOW.plus(MINUTE),
                remaining: MINUTE,
                claim_id: "own".into(),
            })),
            Wait(retry_after) => ClaimStep::Keep(Decision::InProgress { retry_after }),
            Done => ClaimStep::Keep(Decision::AlreadyCompleted),
            Held => ClaimStep::Keep(Decision::Refused),
            Ended => ClaimStep::Refuse(Refusal::ClaimEnded),
        }
    }
}

/// By the claim id of the event's latest attempt and by another one, each below the cap and at it.
const CLAIMS: [(Shape, [Answer; 2], [Answer; 2]); 14] = [
    //                  own claim id          another claim id
    // No attempt is on the row, so that no claim id is its own.
    (Pending, [Grant, Grant], [Grant, Grant]),
    (ProcessingLive, [SameLock, SameLock], [Wait(MINUTE), Wait(MINUTE)]),
    (ProcessingExpired, [Grant, Bury], [Grant, Bury]),
    (Completed, [Ended, Ended], [Done, Done]),
    (CompletedByHand, [Done, Done], [Done, Done]),
    (Failed, [Ended, Ended], [Grant, Bury]),
    (FailedPaused, [Ended, Ended], [Wait(TICK), Bury]),
    (FailedPausePassed, [Ended, Ended], [Grant, Bury]),
    (Unknown, [Ended, Ended], [Held, Held]),
    (DeadTerminal, [Ended, Ended], [Held, Held]),
    (DeadUsedUp, [Ended, Ended], [Held, Held]),
    (DeadBuried, [Ended, Ended], [Held, Held]),
    (DeadLowered, [Held, Held], [Held, Held]),
    (DeadByHand, [Held, Held], [Held, Held]),
];

/// Caps and forgiven attempts that leave room for another attempt, and that do not.
const BELOW_THE_CAP: [(i32, i32); 5] = [(0, 0), (ATTEMPTS + 1, 0), (ATTEMPTS, 1), (1, ATTEMPTS), (i32::MAX, 0)];
const AT_THE_CAP: [(i32, i32); 4] = [(ATTEMPTS, 0), (1, 0), (1, ATTEMPTS - 1), (ATTEMPTS - 1, 1)];

#[test]
fn answers_are_counted_by_the_table() {
    let event = ProcessingLive.event();
    let acquired = Decision::Acquired(lock_of(&event, event.latest.as_ref().unwrap(), NOW));
    let in_progress = Decision::InProgress { retry_after: MINUTE };
    // The answer; does the caller wait; is the payload another; a duplicate, a mismatch.
    for (answer, waiting, changed, duplicate, mismatch) in [
        (Ok(&acquired), false, false, false, false),
        (Ok(&acquired), false, true, false, true),
        (Ok(&acquired), true, true, false, true),
        (Ok(&in_progress), false, false, true, false),
        (Ok(&in_progress), false, true, true, true),
        (Ok(&in_progress), true, true, false, false),
        (Ok(&Decision::AlreadyCompleted), true, false, true, false),
        (Ok(&Decision::AlreadyCompleted), false, true, true, true),
        (Ok(&Decision::Refused), false, false, true, false),
        (Err(&Refusal::ClaimEnded), false, false, true, false),
        (Err(&Refusal::FingerprintMismatch), true, false, true, true),
        (Err(&Refusal::DeliveryMismatch), false, false, true, true),
    ] {
        let claim = Claim { waiting, ..claim_by("claim") };
        assert_eq!(tallied(&claim, answer, changed), Tallied { duplicate, mismatch }, "{answer:?} {waiting} {changed}");
    }
}

#[test]
fn claims_of_an_absent_event_insert_it() {
    for claim_ended in [false, true] {
        for fingerprint in FINGERPRINTS {
            let request = Claim { fingerprint, attempts_max: cap(1), ..claim_by("own") };
            assert_eq!(claim(None, claim_ended, &request, NOW), ClaimStep::Insert);
        }
    }
}

fn cap(attempts: i32) -> Option<NonZeroU32> {
    NonZeroU32::new(attempts.unsigned_abs())
}

#[test]
fn claims_follow_the_table() {
    assert_eq!(CLAIMS.map(|(shape, ..)| shape), Shape::ALL);
    for (shape, own, other) in CLAIMS {
        for (claim_id, [below, at]) in [("own", own), ("other", other)] {
            for (answer, caps) in [(below, &BELOW_THE_CAP[..]), (at, &AT_THE_CAP[..])] {
                for &(attempts_max, attempts_forgiven) in caps {
                    let event = Event { attempts_forgiven, ..shape.event() };
                    let request = Claim { attempts_max: cap(attempts_max), ..claim_by(claim_id) };
                    let step = claim(Some(&event), false, &request, NOW);
                    // Nothing but Resolve makes an event pending, and it forgives what went before; the cap is looked
                    // at where a lock expired or an attempt failed.
                    assert_eq!(
                        step,
                        answer.step(&event),
                        "{shape:?} claimed by {claim_id}, cap {attempts_max}, forgiven {attempts_forgiven}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_claim_id_in_the_archive_has_ended_unless_it_runs_again() {
    for (shape, own, _) in CLAIMS {
        let event = shape.event();
        // S4: expired, not taken over, granted again to the same claim: the archive and the row both have it, and the
        // row decides.
        if shape.outcome().is_some() {
            assert_eq!(claim(Some(&event), true, &claim_by("own"), NOW), own[0].step(&event), "{shape:?}");
        }
        let step = claim(Some(&event), true, &claim_by("archived"), NOW);
        assert_eq!(step, ClaimStep::Refuse(Refusal::ClaimEnded), "{shape:?}");
    }
}

#[test]
fn another_fingerprint_is_refused_before_anything_else_is_said() {
    for (shape, own, other) in CLAIMS {
        for known in FINGERPRINTS {
            for given in FINGERPRINTS {
                for (claim_id, answers) in [("own", own), ("other", other)] {
                    for claim_ended in [false, true] {
                        let event = Event { fingerprint: known, ..shape.event() };
                        let request = Claim { fingerprint: given, ..claim_by(claim_id) };
                        let step = claim(Some(&event), claim_ended, &request, NOW);
                        let mismatch = ClaimStep::Refuse(Refusal::FingerprintMismatch);
                        let case = format!("{shape:?}, {known:?} claimed with {given:?} by {claim_id}");
                        if known.is_some() && given.is_some() && known != given {
                            assert_eq!(step, mismatch, "{case}");
                        } else if !claim_ended {
                            assert_eq!(step, answers[0].step(&event), "{case}");
                        } else {
                            assert_ne!(step, mismatch, "{case}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_processing_event_without_its_attempt_is_not_granted() {
    let event = Event { latest: None, ..ProcessingExpired.event() };
    assert_eq!(claim(Some(&event), false, &claim_by("other"), NOW), ClaimStep::Keep(Decision::Refused));
}

// === MarkCompleted, MarkFailed ===

fn endings() -> [Ending; 4] {
    let failed = |kind| Ending::Failed { kind, error: None, retry_after: None };
    [
        Ending::Completed { metadata: None },
        failed(FailureKind::Retryable),
        failed(FailureKind::Terminal),
        failed(FailureKind::Unknown),
    ]
}

fn mark_of(fencing_token: FencingToken, ending: Ending) -> Mark {
    Mark { key: key(), fencing_token, claim_id: None, ending, result: None, attempts_max: None }
}

/// What a Mark with the event's own token meets.
#[derive(Clone, Copy, Debug)]
enum Met {
    /// The attempt has not ended: the Mark decides.
    Open,
    /// This outcome stands.
    Recorded(Outcome),
    /// The token belongs to no attempt that could end.
    Lost,
}

use Met::*;

const MARKS: [(Shape, Met); 14] = [
    (Pending, Lost),
    (ProcessingLive, Open),
    // S3: expiry does not revoke.
    (ProcessingExpired, Open),
    (Completed, Recorded(Outcome::Completed)),
    (CompletedByHand, Lost),
    (Failed, Recorded(Outcome::FailedRetryable)),
    (FailedPaused, Recorded(Outcome::FailedRetryable)),
    (FailedPausePassed, Recorded(Outcome::FailedRetryable)),
    (Unknown, Recorded(Outcome::FailedUnknown)),
    (DeadTerminal, Recorded(Outcome::FailedTerminal)),
    (DeadUsedUp, Recorded(Outcome::FailedRetryable)),
    // S3: so is the Mark of the token that an expiry at the cap made dead.
    (DeadBuried, Open),
    // Without its record in the archive, which `marks_of_a_failure_that_was_buried_meet_its_record` is about.
    (DeadLowered, Lost),
    (DeadByHand, Lost),
];

/// In the order of [`endings`], below the cap and at it.
const ENDED: [[State; 4]; 2] = [
    [State::Completed, State::Failed, State::Dead, State::Unknown],
    [State::Completed, State::Dead, State::Dead, State::Unknown],
];

#[test]
fn marks_of_an_absent_event_find_nothing() {
    for ending in endings() {
        assert_eq!(mark(None, None, &mark_of(TOKEN, ending)), MarkStep::Refuse(Refusal::NotFound));
    }
}

#[test]
fn marks_with_the_current_token_follow_the_table() {
    assert_eq!(MARKS.map(|(shape, _)| shape), Shape::ALL);
    for (shape, met) in MARKS {
        for (ended, caps) in [(ENDED[0], &BELOW_THE_CAP[..]), (ENDED[1], &AT_THE_CAP[..])] {
            for &(attempts_max, attempts_forgiven) in caps {
                let event = Event { attempts_forgiven, ..shape.event() };
                for (ending, state) in endings().into_iter().zip(ended) {
                    let outcome = ending.outcome();
                    let expected = match met {
                        Open => MarkStep::Apply(state),
                        Recorded(recorded) if recorded == outcome => MarkStep::Repeated,
                        Recorded(recorded) => MarkStep::Refuse(Refusal::OutcomeConflict { recorded }),
                        Lost => lost(shape, Loss::TakenOver),
                    };
                    for claim_id in [None, Some("own".to_owned())] {
                        let request =
                            Mark { claim_id, attempts_max: cap(attempts_max), ..mark_of(TOKEN, ending.clone()) };
                        assert_eq!(mark(Some(&event), None, &request), expected, "{shape:?}, {request:?}");
                    }
                    let other = shape.event().latest.map_or(Loss::TakenOver, |_| Loss::OtherClaim);
                    let (claim_id, other) = (Some("other".to_owned()), lost(shape, other));
                    let request = Mark { claim_id, attempts_max: cap(attempts_max), ..mark_of(TOKEN, ending) };
                    assert_eq!(mark(Some(&event), None, &request), other, "{shape:?}, {request:?}");
                }
            }
        }
    }
}

#[test]
fn marks_with_an_earlier_token_are_judged_by_that_attempts_own_record() {
    for shape in Shape::ALL {
        let event = shape.event();
        for recorded in Outcome::ALL {
            let archived = Attempt {
                attempt: 1,
                fencing_token: EARLIER_TOKEN,
                claim_id: "earlier".into(),
                holder: "pod".into(),
                start_time: NOW.minus(MINUTE),
                end_time: Some(NOW.minus(TICK)),
                outcome: recorded,
                error: None,
                payload_digest: None,
                result: None,
            };
            for ending in endings() {
                let repeated = recorded == ending.outcome();
                for (claim_id, matches) in [(None, true), (Some("earlier"), true), (Some("own"), false)] {
                    let request =
                        Mark { claim_id: claim_id.map(str::to_owned), ..mark_of(EARLIER_TOKEN, ending.clone()) };
                    let expected = if repeated && matches { MarkStep::Repeated } else { lost(shape, Loss::TakenOver) };
                    assert_eq!(mark(Some(&event), Some(&archived), &request), expected, "{shape:?}, {request:?}");
                }
            }
        }
        for ending in endings() {
            let step = mark(Some(&event), None, &mark_of(LATER_TOKEN, ending));
            assert_eq!(step, lost(shape, Loss::TakenOver), "{shape:?}");
        }
    }
}

// S3: the token is still the event's, so that another outcome is a conflict, and no lost lock.
#[test]
fn marks_of_a_failure_that_was_buried_meet_its_record() {
    let failed = Failed.event();
    let event = apply::buried(&failed, NOW);
    assert_eq!((event.state, event.fencing_token, event.latest.as_ref()), (State::Dead, TOKEN, None));
    assert_eq!(event.end_time, Some(NOW));
    let archived = apply::archived(&failed, NOW).expect("an attempt");
    assert_eq!(
        archived.end_time,
        Some(failed.update_time),
        "when it failed, not when that was found to be the last time"
    );
    assert!(event.is_archived(TOKEN) && event.is_archived(EARLIER_TOKEN));
    for ending in endings() {
        for claim_id in [None, Some("own".to_owned())] {
            let request = Mark { claim_id, ..mark_of(TOKEN, ending.clone()) };
            let expected = match ending.outcome() {
                Outcome::FailedRetryable => MarkStep::Repeated,
                _ => MarkStep::Refuse(Refusal::OutcomeConflict { recorded: Outcome::FailedRetryable }),
            };
            assert_eq!(mark(Some(&event), Some(&archived), &request), expected, "{request:?}");
        }
        let request = Mark { claim_id: Some("other".to_owned()), ..mark_of(TOKEN, ending) };
        let step = mark(Some(&event), Some(&archived), &request);
        assert_eq!(step, lost(DeadLowered, Loss::OtherClaim), "{request:?}");
    }
    let own = claim(Some(&event), true, &claim_by("own"), NOW);
    assert_eq!(own, ClaimStep::Refuse(Refusal::ClaimEnded), "its claim has ended, as the archive tells");
}

#[test]
fn a_lock_that_expired_stays_on_the_row_when_the_event_is_buried() {
    let event = apply::buried(&ProcessingExpired.event(), NOW);
    assert_eq!(
        (event.state, event.latest.as_ref().map(|latest| latest.outcome)),
        (State::Dead, Some(Outcome::LockExpired))
    );
    assert!(!event.is_archived(TOKEN) && event.is_archived(EARLIER_TOKEN));
}

fn lost(shape: Shape, loss: Loss) -> MarkStep {
    MarkStep::Refuse(Refusal::LockLost { loss, state: shape.state(), fencing_token: TOKEN })
}

#[test]
fn only_a_failed_event_pauses() {
    for state in State::ALL {
        for pause in [None, Some(Micros::ZERO), Some(MINUTE)] {
            let expected = (state == State::Failed && pause == Some(MINUTE)).then(|| NOW.plus(MINUTE));
            assert_eq!(retry_time(state, pause, NOW), expected, "{state}, {pause:?}");
        }
    }
}

// === ExtendLock ===

#[test]
fn only_a_running_attempt_is_extended_by_its_own_token_and_claim() {
    let request = |fencing_token, claim_id: Option<&str>| Extend {
        key: key(),
        fencing_token,
        claim_id: claim_id.map(str::to_owned),
        lock_duration: MINUTE,
    };
    assert_eq!(extend(None, &request(TOKEN, None)), ExtendStep::Refuse(Refusal::NotFound));
    for shape in Shape::ALL {
        let event = shape.event();
        for token in [EARLIER_TOKEN, TOKEN, LATER_TOKEN] {
            for claim_id in [None, Some("own"), Some("other")] {
                let held =
                    matches!(shape, ProcessingLive | ProcessingExpired) && token == TOKEN && claim_id != Some("other");
                let expected = if held {
                    ExtendStep::Apply
                } else {
                    let loss = match claim_id {
                        _ if token != TOKEN => Loss::TakenOver,
                        Some("other") if event.latest.is_some() => Loss::OtherClaim,
                        _ => Loss::Ended,
                    };
                    ExtendStep::Refuse(Refusal::LockLost { loss, state: shape.state(), fencing_token: TOKEN })
                };
                let case = format!("{shape:?}, {token}, {claim_id:?}");
                assert_eq!(extend(Some(&event), &request(token, claim_id)), expected, "{case}");
            }
        }
    }
}
