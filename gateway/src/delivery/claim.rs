//! The claim: CheckAndLock, sent as often as it takes until its outcome is known (G9).

use std::{error::Error as StdError, time::Duration};

use tokio::time::{Instant, sleep};

use super::{Courier, Event, Lock, backoff::Backoff, digest};
use crate::{
    answer::{Answer, RetryAfter},
    enforcement::Enforcement,
    key::Identity,
    metrics::ClaimLabel,
    route::Route,
    sidecar::{CallError, CallErrorKind, ClaimAnswer},
};

/// A claim whose outcome is unknown, to be repeated as it is.
pub(super) struct Unsettled {
    claim_id: String,
    first_asked: Instant,
}

/// Why there is no lock.
pub(super) enum NoLock {
    Answer(Answer),
    Unsettled(Unsettled),
}

impl NoLock {
    /// What the provider is told where nothing is delivered, and the claim that is unsettled.
    pub(super) fn into_parts(self) -> (Answer, Option<Unsettled>) {
        match self {
            Self::Answer(answer) => (answer, None),
            Self::Unsettled(unsettled) => (Answer::Unavailable(RetryAfter::SOON), Some(unsettled)),
        }
    }
}

/// A claim that has no answer yet.
pub(super) struct OpenClaim {
    /// The same on every call: it gets the same lock again (S4).
    claim_id: String,
    first_asked: Instant,
    lock_duration: Duration,
    mode: Mode,
    phase: Phase,
}

/// Who waits for the outcome, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// A provider, which waits no longer than this while the outcome stays unknown.
    Enforce { patience: Duration },
    /// Nobody: the event is delivered either way.
    Observe,
    /// Nobody: the provider was sent away. The event stays enforced even if its route observes by now, because what is
    /// delivered then is the provider's next try, or the one that settled the event meanwhile.
    Resume,
}

/// What the calls so far may have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing.
    Fresh,
    /// One of them may have been granted the lock.
    Unknown,
    /// The same, and the gateway is stopping: the stop interrupts no further call.
    Stopping,
}

/// What follows a call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AfterFailure {
    /// The same call once more.
    Repeat,
    /// Nobody waits here any longer; the claim is still unsettled.
    HandBack,
    /// The error is the answer.
    Refuse,
    /// A lock that the first call got at once has ended by now. Asked again, the sidecar would not give that lock back but grant a
    /// new attempt (S4), and another after each lock's time for as long as answers are lost: they would use up the event's
    /// attempts (S7) with nothing sent. So this is timed from the first call. A later one may have been granted a lock that
    /// ends later; that keeps the event from others for one more lock's time at most.
    GiveUp,
}

impl OpenClaim {
    /// For an event that has just come in. `patience` is how long its provider waits for an outcome that stays unknown.
    pub(super) fn begin(route: &Route, enforcement: Enforcement, patience: Duration) -> Self {
        Self {
            claim_id: new_claim_id(),
            first_asked: Instant::now(),
            lock_duration: route.application.lock_duration,
            mode: match enforcement {
                Enforcement::Enforce => Mode::Enforce { patience },
                Enforcement::Observe => Mode::Observe,
            },
            phase: Phase::Fresh,
        }
    }

    /// For a claim that was handed back unsettled.
    pub(super) fn resume(route: &Route, unsettled: Unsettled) -> Self {
        let Unsettled { claim_id, first_asked } = unsettled;
        let lock_duration = route.application.lock_duration;
        Self { claim_id, first_asked, lock_duration, mode: Mode::Resume, phase: Phase::Unknown }
    }

    /// Whether the sidecar may wait for another attempt's outcome before it answers. A repeated claim does not wait for one,
    /// and what is delivered either way waits for nothing.
    fn may_wait(&self) -> bool {
        match self.mode {
            Mode::Enforce { .. } => self.phase == Phase::Fresh,
            Mode::Observe | Mode::Resume => false,
        }
    }

    /// What follows a call that had failed by `now`.
    fn judge(&mut self, kind: CallErrorKind, now: Instant) -> AfterFailure {
        let elapsed = now.saturating_duration_since(self.first_asked);
        let may_be_granted = match kind {
            CallErrorKind::Unknown => true,
            // This call did nothing, but an earlier one's outcome is as unknown as before.
            CallErrorKind::Unavailable { .. } => self.phase != Phase::Fresh,
            CallErrorKind::LockLost { .. }
            | CallErrorKind::ClaimEnded
            | CallErrorKind::Mismatch
            | CallErrorKind::OutcomeConflict
            | CallErrorKind::NotFound
            | CallErrorKind::Rejected => false,
        };
        if !may_be_granted {
            return AfterFailure::Refuse;
        }
        let is_repeated = self.phase != Phase::Fresh;
        let hands_back = match self.mode {
            Mode::Enforce { patience } => is_repeated && elapsed >= patience,
            Mode::Observe => is_repeated,
            Mode::Resume => false,
        };
        if hands_back {
            return AfterFailure::HandBack;
        }
        if !is_repeated {
            self.phase = Phase::Unknown;
        }
        if elapsed >= self.lock_duration { AfterFailure::GiveUp } else { AfterFailure::Repeat }
    }

    fn into_unsettled(self) -> Unsettled {
        Unsettled { claim_id: self.claim_id, first_asked: self.first_asked }
    }
}

/// A version 4 UUID. From the thread's own generator: asking the system for each costs a system call a webhook.
fn new_claim_id() -> String {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string()
}

impl Courier {
    /// CheckAndLock until its outcome is known (G9), or it has stayed unknown for too long and is handed back unsettled. Counts
    /// what it comes to, once for each event (I11): one that is handed back to be taken up again is counted then.
    pub(super) async fn claim(&self, event: &Event, answer_by: Instant, claim: OpenClaim) -> Result<Lock, NoLock> {
        let is_taken_up_again = matches!(claim.mode, Mode::Enforce { .. });
        let claimed = self.ask(event, answer_by, claim).await;
        let label = match &claimed {
            Ok(_) => ClaimLabel::Acquired,
            Err(NoLock::Answer(answer)) => ClaimLabel::of(answer),
            Err(NoLock::Unsettled(_)) if is_taken_up_again => return claimed,
            Err(NoLock::Unsettled(_)) => ClaimLabel::Failed,
        };
        self.metrics.claimed(&event.route.provider, label);
        claimed
    }

    /// The same, and nothing is counted.
    pub(super) async fn ask(&self, event: &Event, answer_by: Instant, mut claim: OpenClaim) -> Result<Lock, NoLock> {
        let Event { route, identity, .. } = event;
        let mut backoff = Backoff::claims();
        loop {
            let asked = Instant::now();
            // No wait may outlast the provider's.
            let wait = if claim.may_wait() {
                let rest = answer_by.saturating_duration_since(asked).saturating_sub(self.sidecar_timeout);
                self.wait_duration.min(rest)
            } else {
                Duration::ZERO
            };
            let claimed = tokio::select! {
                claimed = self.sidecar.claim(event, &claim.claim_id, wait) => claimed,
                // The call may be waiting for another attempt's outcome for longer than there is time left. The next one
                // does not wait, and a lock that was granted by then is marked.
                () = self.stop.cancelled(), if claim.phase != Phase::Stopping => {
                    claim.phase = Phase::Stopping;
                    continue;
                }
            };
            let error = match claimed {
                Ok(answer) => return decided(answer, claim.claim_id, asked, route).map_err(NoLock::Answer),
                Err(error) => error,
            };
            let next = claim.judge(error.kind, Instant::now());
            match next {
                AfterFailure::Refuse => return Err(NoLock::Answer(self.claim_refused(route, identity, &error))),
                AfterFailure::HandBack => return Err(NoLock::Unsettled(claim.into_unsettled())),
                AfterFailure::Repeat | AfterFailure::GiveUp => {}
            }
            if error.kind == CallErrorKind::Unknown {
                self.metrics.claims_unknown.add();
                tracing::warn!(
                    event = digest(route, identity),
                    code = ?error.status.code(),
                    "outcome of a claim is unknown, repeating it"
                );
            }
            if next == AfterFailure::GiveUp {
                tracing::error!(event = digest(route, identity), "giving up a claim whose outcome stayed unknown");
                return Err(NoLock::Answer(Answer::Unavailable(RetryAfter::SOON)));
            }
            self.metrics.claims_repeated.add();
            tokio::select! {
                () = sleep(backoff.next()) => {}
                () = self.stop.cancelled() => {
                    if claim.phase == Phase::Stopping {
                        return Err(NoLock::Answer(Answer::Unavailable(RetryAfter::SOON)));
                    }
                    // Once more, and at once: a lock that one of the calls was granted would stay with nobody.
                    claim.phase = Phase::Stopping;
                }
            }
        }
    }

    fn claim_refused(&self, route: &Route, identity: &Identity, error: &CallError) -> Answer {
        let event = digest(route, identity);
        let status = &error.status as &dyn StdError;
        match error.kind {
            CallErrorKind::Unavailable { retry_after } => {
                if let Some(unreported) = self.unavailable.pass() {
                    tracing::warn!(event, status, unreported, "sidecar is unavailable");
                }
                Answer::Unavailable(retry_after.map_or(RetryAfter::SOON, RetryAfter::after))
            }
            CallErrorKind::Mismatch => {
                tracing::error!(event, status, "event was first claimed with something else");
                Answer::Conflict
            }
            CallErrorKind::LockLost { completed: true } => Answer::AlreadyProcessed,
            // A repeated claim came so late that its attempt has ended: the provider's next try learns how.
            CallErrorKind::LockLost { completed: false } | CallErrorKind::ClaimEnded => {
                Answer::Unsettled(RetryAfter::SOON)
            }
            CallErrorKind::Unknown
            | CallErrorKind::OutcomeConflict
            | CallErrorKind::NotFound
            | CallErrorKind::Rejected => {
                tracing::error!(event, status, "sidecar refuses the claim");
                Answer::Defect
            }
        }
    }
}

fn decided(answer: ClaimAnswer, claim_id: String, asked: Instant, route: &Route) -> Result<Lock, Answer> {
    match answer {
        ClaimAnswer::Acquired(grant) => Ok(Lock::new(claim_id, grant, asked)),
        ClaimAnswer::Completed => Err(Answer::AlreadyProcessed),
        ClaimAnswer::InProgress(after) => Err(Answer::InProgress(route.policy.in_progress, RetryAfter::after(after))),
        ClaimAnswer::Paused(after) => Err(Answer::Paused(RetryAfter::after(after))),
        ClaimAnswer::Refused => Err(Answer::Held(route.policy.held)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(4);
    const LOCK_DURATION: Duration = Duration::from_secs(300);
    const ENFORCE: Mode = Mode::Enforce { patience: PATIENCE };

    fn claim(mode: Mode, phase: Phase) -> OpenClaim {
        let claim_id = "11111111-1111-4111-8111-111111111111".to_owned();
        OpenClaim { claim_id, first_asked: Instant::now(), lock_duration: LOCK_DURATION, mode, phase }
    }

    /// What follows each kind of error, at once, when a provider has waited long enough, and when the lock has ended.
    fn judged(mode: Mode, phase: Phase, kind: CallErrorKind) -> [AfterFailure; 3] {
        [Duration::ZERO, PATIENCE, LOCK_DURATION].map(|elapsed| {
            let mut claim = claim(mode, phase);
            let now = claim.first_asked + elapsed;
            claim.judge(kind, now)
        })
    }

    #[test]
    fn g9_what_follows_a_failed_claim_depends_on_who_waits_and_what_earlier_calls_may_have_done() {
        use AfterFailure::{GiveUp, HandBack, Refuse, Repeat};
        let unavailable = CallErrorKind::Unavailable { retry_after: None };
        for (mode, phase, unknown, away) in [
            (ENFORCE, Phase::Fresh, [Repeat, Repeat, GiveUp], [Refuse; 3]),
            (ENFORCE, Phase::Unknown, [Repeat, HandBack, HandBack], [Repeat, HandBack, HandBack]),
            (ENFORCE, Phase::Stopping, [Repeat, HandBack, HandBack], [Repeat, HandBack, HandBack]),
            (Mode::Observe, Phase::Fresh, [Repeat, Repeat, GiveUp], [Refuse; 3]),
            (Mode::Observe, Phase::Unknown, [HandBack; 3], [HandBack; 3]),
            (Mode::Observe, Phase::Stopping, [HandBack; 3], [HandBack; 3]),
            (Mode::Resume, Phase::Unknown, [Repeat, Repeat, GiveUp], [Repeat, Repeat, GiveUp]),
            (Mode::Resume, Phase::Stopping, [Repeat, Repeat, GiveUp], [Repeat, Repeat, GiveUp]),
        ] {
            assert_eq!(judged(mode, phase, CallErrorKind::Unknown), unknown, "{mode:?} {phase:?}");
            assert_eq!(judged(mode, phase, unavailable), away, "{mode:?} {phase:?}");
            for decided in [
                CallErrorKind::LockLost { completed: true },
                CallErrorKind::LockLost { completed: false },
                CallErrorKind::ClaimEnded,
                CallErrorKind::Mismatch,
                CallErrorKind::OutcomeConflict,
                CallErrorKind::NotFound,
                CallErrorKind::Rejected,
            ] {
                assert_eq!(judged(mode, phase, decided), [Refuse; 3], "{mode:?} {phase:?} {decided:?}");
            }
        }
    }

    #[test]
    fn g9_however_late_the_last_call_was_a_claim_is_given_up_when_its_first_lock_has_ended() {
        let mut claim = claim(Mode::Resume, Phase::Unknown);
        let first_asked = claim.first_asked;
        for (elapsed, next) in [
            (LOCK_DURATION / 2, AfterFailure::Repeat),
            (LOCK_DURATION - Duration::from_millis(1), AfterFailure::Repeat),
            (LOCK_DURATION, AfterFailure::GiveUp),
        ] {
            assert_eq!(claim.judge(CallErrorKind::Unknown, first_asked + elapsed), next, "{elapsed:?}");
        }
        // Handed back and taken up again, it is as old as before.
        let Unsettled { first_asked: kept, .. } = claim.into_unsettled();
        assert_eq!(kept, first_asked);
    }

    #[test]
    fn g9_a_claim_that_may_hold_the_lock_is_remembered_as_such_and_waits_for_nobody() {
        let mut claim = claim(ENFORCE, Phase::Fresh);
        assert!(claim.may_wait());
        let now = claim.first_asked;
        assert_eq!(claim.judge(CallErrorKind::Unknown, now), AfterFailure::Repeat);
        assert_eq!((claim.phase, claim.may_wait()), (Phase::Unknown, false));
        // Without the first error this one would be an answer.
        assert_eq!(claim.judge(CallErrorKind::Unavailable { retry_after: None }, now), AfterFailure::Repeat);
        claim.phase = Phase::Stopping;
        assert_eq!(claim.judge(CallErrorKind::Unknown, now), AfterFailure::Repeat);
        assert_eq!(claim.phase, Phase::Stopping, "or the stop would interrupt the last call as well");
    }
}
