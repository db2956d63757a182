//! What happens to an event without a lock while its route only observes ([`crate::enforcement`]): it is delivered anyway,
//! and the answer that enforcing would have given is counted and logged. A mismatch never gets here: it is always refused.

use super::{Courier, Event, NoLock, OwnedSemaphorePermit, digest};
use crate::{answer::Answer, upstream::Outcome};

impl Courier {
    /// Delivers without a lock, and answers by what the application answers. Without a lock there is no attempt to mark.
    pub(super) async fn observe(&self, event: Event, slot: OwnedSemaphorePermit, no_lock: NoLock) -> Answer {
        let refusal = no_lock.into_answer();
        if self.stop.is_cancelled() {
            return refusal;
        }
        let (_, word) = refusal.status_and_word();
        self.metrics.observed(word);
        tracing::warn!(
            provider = event.route.provider.name(),
            event = digest(&event.route, &event.identity),
            would_answer = word.name(),
            "observing only: delivered what would have been refused"
        );
        let timeout = event.route.application.timeout;
        let outcome = Outcome::of(self.send(&event, None, timeout).await, event.route.policy, timeout);
        self.metrics.delivered(&event.route.provider, outcome.label());
        drop(slot);
        match outcome {
            Outcome::Completed { .. } => Answer::Processed,
            Outcome::Failed { retry_after, .. } => Answer::Failed(retry_after),
        }
    }
}
