//! The rules: given an event as it stands and a request, what is to be done. Pure and total (S1–S9).
//!
//! Both ledgers ask these functions. SQLite applies the answer within the same exclusive transaction. Postgres
//! repeats the rule in the WHERE of one conditional statement, so an answer that is out of date by the time it is
//! applied changes nothing and is asked for again; no decision is ever written from memory alone.

use std::num::NonZeroU32;

use super::{
    Attempt, Claim, Decision, Ending, Event, Extend, FailureKind, Lock, Loss, Mark, Micros, Obstacle, Outcome, Refusal,
    Resolution, Resolve, Resolved, State, Time,
};

/// What CheckAndLock comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimStep {
    /// The event is unknown: insert it with its first attempt.
    Insert,
    /// Grant another attempt: archive the latest one (as [`Outcome::LockExpired`] if it is still running), draw a
    /// token, count up.
    Grant,
    /// The lock expired or the attempt failed, and the attempts are used up: the event is dead, and the call is refused (S7).
    /// An attempt that failed is archived.
    Bury,
    /// Nothing changes; this is the answer.
    Keep(Decision),
    /// Nothing changes; the call is refused.
    Refuse(Refusal),
}

/// What an answer to CheckAndLock adds to the counts of its event (L2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tallied {
    /// A call that was answered with anything but the lock.
    pub duplicate: bool,
    /// A call that came with another payload than the event is known by.
    pub mismatch: bool,
}

/// What `answer` adds. `payload_changed` tells whether the call's payload digest is another than that of the latest attempt.
pub fn tallied(request: &Claim, answer: Result<&Decision, &Refusal>, payload_changed: bool) -> Tallied {
    match answer {
        // Whoever waits on asks again, and is counted by its last answer.
        Ok(Decision::InProgress { .. }) if request.waiting => Tallied::default(),
        Ok(decision) => Tallied { duplicate: !matches!(decision, Decision::Acquired(_)), mismatch: payload_changed },
        Err(refusal) => {
            let mismatch = matches!(refusal, Refusal::FingerprintMismatch | Refusal::DeliveryMismatch);
            Tallied { duplicate: true, mismatch }
        }
    }
}

/// CheckAndLock on `event`, at `now` of the database's clock. `claim_ended` tells whether the archive has an attempt
/// with this claim id.
pub fn claim(event: Option<&Event>, claim_ended: bool, request: &Claim, now: Time) -> ClaimStep {
    let Some(event) = event else { return ClaimStep::Insert };
    // S8 comes first: a call that does not mean this event gets no other answer about it.
    if let (Some(known), Some(given)) = (event.fingerprint, request.fingerprint)
        && known != given
    {
        return ClaimStep::Refuse(Refusal::FingerprintMismatch);
    }
    let own = event.latest.as_ref().filter(|latest| latest.claim_id == request.claim_id);
    // S4: a late copy of a call whose attempt has ended must not make a ghost lock, whatever came since.
    if own.map_or(claim_ended, |latest| latest.outcome != Outcome::Running) {
        return ClaimStep::Refuse(Refusal::ClaimEnded);
    }
    match event.state {
        State::Completed => ClaimStep::Keep(Decision::AlreadyCompleted),
        State::Unknown | State::Dead => ClaimStep::Keep(Decision::Refused),
        State::Processing => {
            let Some(latest) = event.latest.as_ref() else {
                // A processing event without its attempt breaks a CHECK constraint of both ledgers.
                return ClaimStep::Keep(Decision::Refused);
            };
            if latest.lock_expire_time > now {
                return ClaimStep::Keep(match own {
                    Some(latest) => Decision::Acquired(lock_of(event, latest, now)),
                    None => Decision::InProgress { retry_after: latest.lock_expire_time.since(now) },
                });
            }
            if event.capped(request.attempts_max) { ClaimStep::Bury } else { ClaimStep::Grant }
        }
        State::Failed => match event.retry_time {
            // The cap can have been lowered since the failure.
            _ if event.capped(request.attempts_max) => ClaimStep::Bury,
            Some(retry_time) if retry_time > now => {
                ClaimStep::Keep(Decision::InProgress { retry_after: retry_time.since(now) })
            }
            Some(_) | None => ClaimStep::Grant,
        },
        State::Pending => ClaimStep::Grant,
    }
}

/// The lock that `latest` of `event` holds.
pub fn lock_of(event: &Event, latest: &super::Latest, now: Time) -> Lock {
    Lock {
        fencing_token: event.fencing_token,
        attempt: event.attempt_count,
        expire_time: latest.lock_expire_time,
        remaining: latest.lock_expire_time.since(now),
        claim_id: latest.claim_id.clone(),
    }
}

/// What MarkCompleted or MarkFailed comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MarkStep {
    /// Record the ending and put the event into this state.
    Apply(State),
    /// It is recorded already. The first result stands.
    Repeated,
    /// Nothing changes; the call is refused.
    Refuse(Refusal),
}

/// A Mark on `event`. `archived` is the attempt that the archive has for the request's token, if any.
pub fn mark(event: Option<&Event>, archived: Option<&Attempt>, request: &Mark) -> MarkStep {
    let Some(event) = event else { return MarkStep::Refuse(Refusal::NotFound) };
    let lost = MarkStep::Refuse(lock_lost(event, Loss::TakenOver));
    let other_claim = MarkStep::Refuse(lock_lost(event, Loss::OtherClaim));
    let given = request.claim_id.as_deref();
    let outcome = request.ending.outcome();
    match event.latest.as_ref().filter(|_| event.fencing_token == request.fencing_token) {
        // S2: the claim id must match as well, where it is given.
        Some(latest) if given.is_some_and(|given| given != latest.claim_id) => other_claim,
        Some(latest) => match latest.outcome {
            // Expiry does not revoke: the token is current, so nobody else was let in (S3).
            Outcome::Running => MarkStep::Apply(ended_state(event, &request.ending, request.attempts_max)),
            // The token that an expiry at the cap made dead (S3).
            Outcome::LockExpired if event.state == State::Dead => {
                MarkStep::Apply(ended_state(event, &request.ending, request.attempts_max))
            }
            Outcome::LockExpired => lost,
            recorded @ (Outcome::Completed
            | Outcome::FailedRetryable
            | Outcome::FailedTerminal
            | Outcome::FailedUnknown) => {
                if recorded == outcome {
                    MarkStep::Repeated
                } else {
                    MarkStep::Refuse(Refusal::OutcomeConflict { recorded })
                }
            }
        },
        // The record of an attempt in the archive decides (S3): a repetition of what was accepted is success.
        None => match archived {
            Some(attempt) if given.is_some_and(|given| given != attempt.claim_id) => {
                if attempt.fencing_token == event.fencing_token { other_claim } else { lost }
            }
            Some(attempt) if attempt.outcome == outcome => MarkStep::Repeated,
            // It failed, and the event was buried: nobody has drawn a token since.
            Some(Attempt { fencing_token, outcome: recorded, .. }) if *fencing_token == event.fencing_token => {
                MarkStep::Refuse(Refusal::OutcomeConflict { recorded: *recorded })
            }
            Some(_) | None => lost,
        },
    }
}

/// The state that an accepted ending puts the event into.
pub fn ended_state(event: &Event, ending: &Ending, attempts_max: Option<NonZeroU32>) -> State {
    match ending {
        Ending::Completed { .. } => State::Completed,
        Ending::Failed { kind: FailureKind::Unknown, .. } => State::Unknown,
        Ending::Failed { kind: FailureKind::Terminal, .. } => State::Dead,
        Ending::Failed { kind: FailureKind::Retryable, .. } => {
            if event.capped(attempts_max) {
                State::Dead
            } else {
                State::Failed
            }
        }
    }
}

/// What ExtendLock comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtendStep {
    /// Move the expiry to the later of what it is and now plus the duration.
    Apply,
    /// Nothing changes; the call is refused.
    Refuse(Refusal),
}

/// ExtendLock on `event`. An expired lock that nobody has taken over is extended (S3).
pub fn extend(event: Option<&Event>, request: &Extend) -> ExtendStep {
    let Some(event) = event else { return ExtendStep::Refuse(Refusal::NotFound) };
    let lost = |loss| ExtendStep::Refuse(lock_lost(event, loss));
    if event.fencing_token != request.fencing_token {
        return lost(Loss::TakenOver);
    }
    match &event.latest {
        Some(latest) if request.claim_id.as_ref().is_some_and(|given| *given != latest.claim_id) => {
            lost(Loss::OtherClaim)
        }
        Some(latest) if latest.outcome == Outcome::Running => ExtendStep::Apply,
        Some(_) | None => lost(Loss::Ended),
    }
}

/// What Resolve comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResolveStep {
    /// Archive the latest attempt (as [`Outcome::LockExpired`] if it is still running), draw a token, record the
    /// decision, put the event into the state.
    Apply,
    /// This very decision stands, by the same actor, for the same reason, with the same result.
    Repeated,
    /// Nothing changes; the call is refused.
    Refuse(Refusal),
}

/// Resolve on `event`, whose latest resolution is `last`, at `now` of the database's clock.
pub fn resolve(event: Option<&Event>, last: Option<&Resolution>, request: &Resolve, now: Time) -> ResolveStep {
    let Some(event) = event else { return ResolveStep::Refuse(Refusal::NotFound) };
    let conflict =
        |obstacle| ResolveStep::Refuse(Refusal::StateConflict { from: event.state, to: request.to.state(), obstacle });
    // A decision stands as long as nothing drew a token after it.
    let standing = last.filter(|last| {
        last.fencing_token == event.fencing_token
            && last.to_state == request.to.state()
            && event.state == request.to.state()
    });
    if let Some(last) = standing
        && request.fencing_token.is_none_or(|token| token == last.from_fencing_token || token == last.fencing_token)
    {
        let (actor, reason) = (last.actor != request.actor, last.reason != request.reason);
        let result = event.result != request.result;
        // Success would tell that it is on record, with what duplicates are to be answered.
        return if actor || reason || result {
            conflict(Obstacle::Resolved { actor, reason, result })
        } else {
            ResolveStep::Repeated
        };
    }
    if request.fencing_token.is_some_and(|token| token != event.fencing_token) {
        return ResolveStep::Refuse(lock_lost(event, Loss::Changed));
    }
    // A call is repeated whose answer was lost, by gRPC's own client too. What it decided has been done, and something has come
    // after it that nobody has decided on (I4).
    let is_repeated = last.is_some_and(|last| {
        last.to_state == request.to.state() && last.actor == request.actor && last.reason == request.reason
    });
    if request.fencing_token.is_none() && is_repeated {
        return ResolveStep::Refuse(lock_lost(event, Loss::Followed));
    }
    match (event.state, request.to) {
        (State::Pending | State::Failed | State::Unknown | State::Dead, _) => ResolveStep::Apply,
        (State::Completed, Resolved::Pending) if request.force => ResolveStep::Apply,
        (State::Completed, Resolved::Pending) => conflict(Obstacle::NotForced),
        (State::Completed, Resolved::Completed | Resolved::Dead) => conflict(Obstacle::Completed),
        (State::Processing, _) => match &event.latest {
            // Nobody is at work as far as the clock can tell; an operator need not wait for the next delivery.
            Some(latest) if latest.lock_expire_time <= now => ResolveStep::Apply,
            Some(_) | None => conflict(Obstacle::LockLive),
        },
    }
}

fn lock_lost(event: &Event, loss: Loss) -> Refusal {
    Refusal::LockLost { loss, state: event.state, fencing_token: event.fencing_token }
}

/// The pause that MarkFailed asks for, as a time; None where the event does not wait for another attempt.
pub fn retry_time(to: State, retry_after: Option<Micros>, now: Time) -> Option<Time> {
    match to {
        State::Failed => retry_after.filter(|pause| pause.0 > 0).map(|pause| now.plus(pause)),
        State::Pending | State::Processing | State::Completed | State::Unknown | State::Dead => None,
    }
}

#[cfg(test)]
mod tests;
