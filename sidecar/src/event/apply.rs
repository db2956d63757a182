//! What each step of [`transition`](super::transition) makes of an event. Pure: the row that is written and the event that
//! is answered are the same value, so that they cannot differ.

use super::{
    Attempt, Claim, Ending, Event, Extend, FencingToken, Latest, Mark, Outcome, Resolution, Resolve, Resolved, State,
    Time, transition,
};

/// Another attempt of an event that is known.
pub fn granted(before: &Event, claim: &Claim, token: FencingToken, now: Time) -> Event {
    Event {
        state: State::Processing,
        attempt_count: before.attempt_count + 1,
        fencing_token: token,
        update_time: now,
        end_time: None,
        retry_time: None,
        // S8: fixed at the first grant that gives one.
        fingerprint: before.fingerprint.or(claim.fingerprint),
        // The result belongs to the attempt that ended, and went to the archive with it.
        result: None,
        latest: Some(Latest::granted(claim, now)),
        ..before.clone()
    }
}

/// An event whose attempts are used up (S7). The token stays: a late Mark of it is still accepted (S3). An attempt that had
/// failed goes to the archive ([`archived`]): on the row it would seem to have ended together with the event.
pub fn buried(before: &Event, now: Time) -> Event {
    let running = before.latest.as_ref().filter(|latest| latest.outcome == Outcome::Running);
    Event {
        state: State::Dead,
        update_time: now,
        end_time: Some(now),
        retry_time: None,
        latest: running.map(|latest| Latest { outcome: Outcome::LockExpired, ..latest.clone() }),
        ..before.clone()
    }
}

/// An event whose latest attempt has ended as `mark` says, and is `state` now.
pub fn marked(before: &Event, mark: &Mark, state: State, now: Time) -> Event {
    let mut event = Event {
        state,
        update_time: now,
        end_time: (state != State::Failed).then_some(now),
        result: mark.result.clone(),
        ..before.clone()
    };
    match &mark.ending {
        Ending::Completed { metadata } => {
            event.retry_time = None;
            event.completion_metadata = added(before.completion_metadata.as_deref(), metadata.as_deref());
        }
        Ending::Failed { error, retry_after, .. } => {
            event.retry_time = transition::retry_time(state, *retry_after, now);
            event.last_error.clone_from(error);
        }
    }
    if let Some(latest) = &mut event.latest {
        latest.outcome = mark.ending.outcome();
    }
    event
}

/// What completions added so far, with what another one adds (a replayed event completes more than once).
fn added(before: Option<&str>, addition: Option<&str>) -> Option<String> {
    let (Some(before), Some(addition)) = (before, addition) else { return addition.or(before).map(str::to_owned) };
    type Object = serde_json::Map<String, serde_json::Value>;
    match (serde_json::from_str::<Object>(before), serde_json::from_str::<Object>(addition)) {
        (Ok(mut object), Ok(addition)) => {
            object.extend(addition);
            Some(serde_json::Value::Object(object).to_string())
        }
        // Text that is no object counts as empty, as when it is read.
        (Err(_), _) => Some(addition.to_owned()),
        (Ok(_), Err(_)) => Some(before.to_owned()),
    }
}

/// An event whose lock ends later.
pub fn extended(before: &Event, extend: &Extend, now: Time) -> Event {
    let mut event = Event { update_time: now, ..before.clone() };
    if let Some(latest) = &mut event.latest {
        latest.lock_expire_time = latest.lock_expire_time.max(now.plus(extend.lock_duration));
    }
    event
}

/// An event as an operator decided; its latest attempt is in the archive.
pub fn resolved(before: &Event, resolve: &Resolve, token: FencingToken, now: Time) -> Event {
    let pending = resolve.to == Resolved::Pending;
    Event {
        state: resolve.to.state(),
        // The operator wants another try, whatever the cap says of those before (S7).
        attempts_forgiven: if pending { before.attempt_count } else { before.attempts_forgiven },
        fencing_token: token,
        update_time: now,
        end_time: (!pending).then_some(now),
        retry_time: None,
        result: resolve.result.clone(),
        latest: None,
        ..before.clone()
    }
}

/// The record of that decision.
pub fn resolution(before: &Event, resolve: &Resolve, token: FencingToken, now: Time) -> Resolution {
    Resolution {
        from_state: before.state,
        to_state: resolve.to.state(),
        from_fencing_token: before.fencing_token,
        fencing_token: token,
        reason: resolve.reason.clone(),
        actor: resolve.actor.clone(),
        time: now,
    }
}

/// The latest attempt as the archive is to have it: one that still runs ends here and now, its lock expired.
pub fn archived(before: &Event, now: Time) -> Option<Attempt> {
    let attempt = before.latest_attempt()?;
    if attempt.outcome != Outcome::Running {
        return Some(attempt);
    }
    Some(Attempt { outcome: Outcome::LockExpired, end_time: Some(now), ..attempt })
}
