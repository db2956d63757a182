//! The mark: how an attempt ended is recorded, however long that takes (G9).

use std::{error::Error as StdError, sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::time::sleep;

use super::{Courier, Lock, backoff::Backoff, digest, lock_lost};
use crate::{
    answer::{Answer, RetryAfter},
    key::Identity,
    route::Route,
    sidecar::{Attempt, CallError, CallErrorKind, MarkedFailure},
    upstream::Outcome,
};

impl Courier {
    /// Marks until the mark is answered (G9): late ones are valid (S3), and one that is lost would cost the rest of the
    /// lock and a second delivery. Ends early only when the process has to. Anything but a recorded mark is an answer.
    pub(super) async fn mark(
        &self,
        route: &Route,
        identity: &Identity,
        lock: &Lock,
        outcome: &Outcome,
    ) -> Result<(), Answer> {
        let mut backoff = Backoff::marks();
        loop {
            // Read before the call, so that there is one more try after the stop.
            let last = self.stop.is_cancelled();
            let Err(error) = self.mark_once(lock.attempt(route, identity), lock, outcome).await else {
                return Ok(());
            };
            let advised = self.mark_refused(route, identity, lock, &error)?;
            if last {
                tracing::error!(event = digest(route, identity), "ending before the attempt could be marked");
                self.unmarked.fetch_add(1, Relaxed);
                return Err(Answer::Unavailable(RetryAfter::SOON));
            }
            let pause = backoff.next().max(advised.min(Backoff::MARKS_MAX));
            tracing::warn!(
                event = digest(route, identity),
                status = &error.status as &dyn StdError,
                ?pause,
                "mark was not answered, repeating it"
            );
            self.metrics.marks_repeated.add();
            tokio::select! {
                () = sleep(pause) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }

    /// The pause that is advised before the mark is repeated, or the answer when repeating it cannot help.
    fn mark_refused(
        &self,
        route: &Route,
        identity: &Identity,
        lock: &Lock,
        error: &CallError,
    ) -> Result<Duration, Answer> {
        let event = digest(route, identity);
        let status = &error.status as &dyn StdError;
        match error.kind {
            CallErrorKind::Unavailable { retry_after } => Ok(retry_after.unwrap_or_default()),
            CallErrorKind::Unknown => Ok(Duration::ZERO),
            CallErrorKind::LockLost { completed } => {
                self.metrics.locks_lost.add();
                tracing::warn!(event, fencing_token = lock.fencing_token, completed, "lock was lost");
                Err(lock_lost(completed))
            }
            // The first result stands (S3).
            CallErrorKind::OutcomeConflict => {
                tracing::error!(event, status, "another outcome of this attempt was recorded before");
                Err(Answer::Unsettled(RetryAfter::SOON))
            }
            CallErrorKind::ClaimEnded | CallErrorKind::Mismatch | CallErrorKind::NotFound | CallErrorKind::Rejected => {
                tracing::error!(event, status, "sidecar refuses the mark");
                Err(Answer::Defect)
            }
        }
    }

    async fn mark_once(&self, attempt: Attempt<'_>, lock: &Lock, outcome: &Outcome) -> Result<(), CallError> {
        match outcome {
            Outcome::Completed { code } => self.sidecar.mark_completed(attempt, *code).await,
            Outcome::Failed { kind, error, code, pause, .. } => {
                let retry_after = if *pause { Some(lock.remaining()).filter(|rest| !rest.is_zero()) } else { None };
                let marked = MarkedFailure { kind: *kind, error: error.clone(), retry_after, code: *code };
                self.sidecar.mark_failed(attempt, marked).await
            }
        }
    }
}

/// The answer once the mark is recorded.
pub(super) fn settled(outcome: &Outcome, lock: &Lock) -> Answer {
    match outcome {
        Outcome::Completed { .. } => Answer::Processed,
        Outcome::Failed { pause: true, .. } => Answer::Failed(Some(RetryAfter::after(lock.remaining()))),
        Outcome::Failed { retry_after, .. } => Answer::Failed(*retry_after),
    }
}
