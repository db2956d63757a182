//! What happens to an event without a lock while its route only observes ([`crate::enforcement`]): it is delivered anyway,
//! and the answer that enforcing would have given is counted and logged. A mismatch never gets here: it is always refused.

use std::sync::Arc;

use tokio::time::Instant;
use tracing::Instrument as _;

use super::{Courier, Event, NoLock, OpenClaim, OwnedSemaphorePermit, Unsettled, digest};
use crate::{answer::Answer, upstream::Outcome};

/// How many events at once that were delivered while nobody knew whether their claim had been granted are asked for afterwards.
/// They keep their bodies meanwhile. Of more, a granted one is left to its lock, and to whoever is told of what is stuck.
pub(super) const SETTLING_MAX: usize = 64;

impl Courier {
    /// Delivers without a lock, and answers by what the application answers. Without a lock there is no attempt to mark.
    pub(super) async fn observe(
        self: Arc<Self>,
        event: Event,
        slot: OwnedSemaphorePermit,
        answer_by: Instant,
        no_lock: NoLock,
    ) -> Answer {
        let (refusal, unsettled) = no_lock.into_parts();
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
        let answer = match &outcome {
            Outcome::Completed { .. } => Answer::Processed,
            Outcome::Failed { retry_after, .. } => Answer::Failed(*retry_after),
        };
        if let Some(unsettled) = unsettled {
            self.settle(event, answer_by, unsettled, outcome);
        }
        answer
    }

    /// Asks in the background for a claim whose outcome nobody knew. Was it granted, or is it now, then what has just been delivered
    /// was its attempt: it is marked, and nothing is delivered again. Otherwise the event would stay in processing for good, for
    /// its provider has an answer and does not come back.
    fn settle(self: Arc<Self>, event: Event, answer_by: Instant, unsettled: Unsettled, outcome: Outcome) {
        let Ok(place) = self.settling.clone().try_acquire_owned() else { return };
        let drain = self.drain.clone();
        let settling = async move {
            let claim = OpenClaim::resume(&event.route, unsettled);
            if let Ok(lock) = self.ask(&event, answer_by, claim).await {
                let (route, identity) = event.into_name();
                // Whatever it is answered, the provider has been told.
                let _ = self.mark(&route, &identity, &lock, &outcome).await;
            }
            drop(place);
        };
        drain.spawn(settling.in_current_span());
    }
}
