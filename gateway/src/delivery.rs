//! The life of one event behind the gateway: claim, deliver, mark.
//!
//! The invariants: while a route enforces, nothing is sent without a lock that outlasts the delivery (G8); what was sent is
//! marked, however long that takes (G9); only an acknowledged completion is answered with success. If the process dies
//! between sending and marking, the lock expires and the provider's next try is a new attempt with a higher fencing
//! token (S3).

mod backoff;
mod claim;
mod mark;
mod observe;

use std::{
    error::Error as StdError,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use backoff::Backoff;
use claim::{NoLock, OpenClaim, Unsettled};
use http::HeaderMap;
use mark::settled;
use oncegate_runtime::{
    detach::Detach,
    logging::event_digest,
    shutdown::{CancellationToken, Drain},
    throttle::Throttle,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout_at},
};
use tracing::{Instrument as _, Span, field};

use crate::{
    answer::{Answer, RetryAfter},
    body::Received,
    config::Settings,
    enforcement::Enforcement,
    key::Identity,
    metrics::{ClaimLabel, Metrics},
    route::Route,
    sidecar::{Attempt, CallError, CallErrorKind, Grant, Sidecar},
    upstream::{Hold, Outcome, Parcel, Reply, Upstream},
};

/// A verified event.
pub(crate) struct Event {
    pub(crate) route: Arc<Route>,
    pub(crate) identity: Identity,
    /// The provider's name for this delivery; empty when it gives none.
    pub(crate) delivery_id: String,
    /// As they came in; only a few are passed on.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Received,
}

impl Event {
    /// What a mark needs of it. The body has been sent or never will be: its share of the budget is somebody else's now.
    fn into_name(self) -> (Arc<Route>, Identity) {
        (self.route, self.identity)
    }
}

/// Long enough to recover one lost reply. A sidecar that stays in trouble is not worth a provider's wait.
const CLAIM_PATIENCE_MAX: Duration = Duration::from_secs(4);

/// Takes events to the application, with a limit on how many are under way at once.
pub(crate) struct Courier {
    sidecar: Sidecar,
    upstream: Upstream,
    metrics: Arc<Metrics>,
    slots: Arc<Semaphore>,
    slots_max: usize,
    /// Places for claims that are asked for after their delivery, while a route observes.
    settling: Arc<Semaphore>,
    lock_margin: Duration,
    upstream_connect_timeout: Duration,
    wait_duration: Duration,
    sidecar_timeout: Duration,
    /// How long a provider waits for a claim whose outcome stays unknown.
    claim_patience: Duration,
    drain: Drain,
    /// Cancelled when the drain time is over: deliveries that still wait for the application count as timed out (G9).
    stop: CancellationToken,
    /// Attempts that were given up unmarked after that.
    unmarked: AtomicUsize,
    unavailable: Throttle,
}

/// The lock of one attempt.
struct Lock {
    claim_id: String,
    fencing_token: i64,
    attempt: i32,
    /// By our own monotonic clock, counted from before the call that granted it was sent (S5).
    ends: Instant,
}

impl Lock {
    fn new(claim_id: String, grant: Grant, asked: Instant) -> Self {
        Self { claim_id, fencing_token: grant.fencing_token, attempt: grant.attempt, ends: asked + grant.remaining }
    }

    fn remaining(&self) -> Duration {
        self.ends.saturating_duration_since(Instant::now())
    }

    fn attempt<'a>(&'a self, route: &'a Route, identity: &'a Identity) -> Attempt<'a> {
        Attempt { route, identity, claim_id: &self.claim_id, fencing_token: self.fencing_token }
    }
}

impl Courier {
    pub(crate) fn new(settings: &Settings, sidecar: Sidecar, upstream: Upstream, metrics: Arc<Metrics>) -> Self {
        Self {
            sidecar,
            upstream,
            metrics,
            slots: Arc::new(Semaphore::new(settings.deliveries_max)),
            slots_max: settings.deliveries_max,
            settling: Arc::new(Semaphore::new(observe::SETTLING_MAX)),
            lock_margin: settings.lock.margin,
            upstream_connect_timeout: settings.upstream.connect_timeout,
            wait_duration: settings.wait_duration,
            sidecar_timeout: settings.sidecar_timeout,
            claim_patience: CLAIM_PATIENCE_MAX.min(settings.answer_timeout / 2),
            drain: Drain::new(),
            stop: CancellationToken::new(),
            unmarked: AtomicUsize::new(0),
            unavailable: Throttle::default(),
        }
    }

    /// How many events may be under way.
    pub(crate) fn under_way_max(&self) -> usize {
        self.slots_max
    }

    /// Events between verification and their answer or mark.
    pub(crate) fn under_way(&self) -> usize {
        self.slots_max.saturating_sub(self.slots.available_permits())
    }

    /// Handles an event and answers by `answer_by`. Dropping the future, or the deadline, ends only the waiting: the event
    /// goes on in the background (G8).
    pub(crate) async fn handle(self: &Arc<Self>, event: Event, answer_by: Instant) -> Answer {
        // Covers most events that come again: there is no lock to get, and nothing that has to outlive the request.
        if event.route.enforcement.get() == Enforcement::Enforce && self.sidecar.is_duplicate(&event) {
            let answer = Answer::AlreadyProcessed;
            self.metrics.claimed(&event.route.provider, ClaimLabel::of(&answer));
            return answer;
        }
        // Before the lock: an event that is refused here is as if it had never come.
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            self.metrics.claimed(&event.route.provider, ClaimLabel::Failed);
            return Answer::Overloaded;
        };
        match timeout_at(answer_by, self.start(event, slot, answer_by)).await {
            Ok(answer) => answer,
            Err(_) => Answer::Continues,
        }
    }

    /// Not part of `handle`, whose future would then hold the whole life of an event in addition to its box: several
    /// kilobytes that would be moved with every request.
    fn start(
        self: &Arc<Self>,
        event: Event,
        slot: OwnedSemaphorePermit,
        answer_by: Instant,
    ) -> Detach<impl Future<Output = Answer> + Send + use<>> {
        // A span of its own, because the event may outlive its request.
        let span = tracing::info_span!(
            "event",
            otel.kind = "internal",
            oncegate.provider = event.route.provider.name(),
            oncegate.event = digest(&event.route, &event.identity),
            oncegate.attempt = field::Empty,
            oncegate.fencing_token = field::Empty,
            oncegate.outcome = field::Empty,
        );
        Detach::new(self.clone().live(event, slot, answer_by).instrument(span), &self.drain)
    }

    /// Waits for events in the background. What is left after `limit` is stopped and marked as timed out, for which the
    /// sidecar gets two more of its time-outs. Says how many could not even be marked.
    pub(crate) async fn finish(&self, limit: Duration) -> usize {
        let left = self.drain.within(limit).await;
        if left == 0 {
            return 0;
        }
        tracing::warn!(deliveries = left, "drain time is over, recording deliveries under way as timed out");
        self.stop.cancel();
        self.drain.within(2 * self.sidecar_timeout).await + self.unmarked.load(Relaxed)
    }

    /// Claim, attempt, record.
    async fn live(self: Arc<Self>, event: Event, slot: OwnedSemaphorePermit, answer_by: Instant) -> Answer {
        // Read once: an event is handled the way it began.
        let enforcement = event.route.enforcement.get();
        let claim = OpenClaim::begin(&event.route, enforcement, self.claim_patience);
        let mut lock = match self.claim(&event, answer_by, claim).await {
            Ok(lock) => lock,
            // Except a reused delivery id: the switch lets duplicates through, never a forgery.
            Err(no_lock)
                if enforcement == Enforcement::Observe && !matches!(no_lock, NoLock::Answer(Answer::Conflict)) =>
            {
                return self.observe(event, slot, answer_by, no_lock).await;
            }
            Err(NoLock::Answer(answer)) => return answer,
            Err(NoLock::Unsettled(unsettled)) => {
                // The provider need not wait for a sidecar in trouble: its next try learns what became of this claim.
                self.settle_later(event, slot, answer_by, unsettled);
                return Answer::Unavailable(RetryAfter::SOON);
            }
        };
        let outcome = match self.attempt(&event, &mut lock, enforcement).await {
            Ok(outcome) => outcome,
            Err(answer) => return answer,
        };
        let (route, identity) = event.into_name();
        match enforcement {
            Enforcement::Enforce => self.record(&route, &identity, &lock, outcome, slot).await,
            Enforcement::Observe => {
                // What the sidecar says of it changes nothing, so the answer does not wait for it.
                let answer = settled(&outcome, &lock);
                let drain = self.drain.clone();
                drain.spawn(async move { self.record(&route, &identity, &lock, outcome, slot).await });
                answer
            }
        }
    }

    /// Goes on in the background with an event whose claim is unsettled. Not part of `live`, which would need room on its
    /// stack for that future of several kilobytes.
    fn settle_later(
        self: Arc<Self>,
        event: Event,
        slot: OwnedSemaphorePermit,
        answer_by: Instant,
        unsettled: Unsettled,
    ) {
        let drain = self.drain.clone();
        drain.spawn(self.resume(event, slot, answer_by, unsettled).in_current_span());
    }

    /// The same for a claim that was handed back. Nobody waits for the answer.
    async fn resume(
        self: Arc<Self>,
        event: Event,
        slot: OwnedSemaphorePermit,
        answer_by: Instant,
        unsettled: Unsettled,
    ) {
        let claim = OpenClaim::resume(&event.route, unsettled);
        let Ok(mut lock) = self.claim(&event, answer_by, claim).await else { return };
        if let Ok(outcome) = self.attempt(&event, &mut lock, Enforcement::Enforce).await {
            let (route, identity) = event.into_name();
            self.record(&route, &identity, &lock, outcome, slot).await;
        }
    }

    /// One try at the application under its lock. Err: the lock is somebody else's, so there is nothing to record, only an
    /// answer.
    async fn attempt(&self, event: &Event, lock: &mut Lock, enforcement: Enforcement) -> Result<Outcome, Answer> {
        let route = &event.route;
        let started = Instant::now();
        let covered = match enforcement {
            Enforcement::Enforce => self.cover(event, lock).await,
            Enforcement::Observe => Ok(route.application.timeout),
        };
        let outcome = match covered {
            Ok(_) if self.stop.is_cancelled() => Outcome::nothing_sent("gateway ended before anything was sent"),
            Ok(timeout) => Outcome::of(self.send(event, Some(lock), timeout).await, route.policy, timeout),
            Err(NotCovered::Unsure(outcome)) => outcome,
            Err(NotCovered::Lost(answer)) => return Err(answer),
        };
        self.metrics.delivered(&route.provider, outcome.label());
        let span = Span::current();
        span.record("oncegate.attempt", lock.attempt);
        span.record("oncegate.fencing_token", lock.fencing_token);
        span.record("oncegate.outcome", outcome.label().name());
        tracing::info!(
            provider = route.provider.name(),
            event = digest(route, &event.identity),
            fencing_token = lock.fencing_token,
            attempt = lock.attempt,
            outcome = outcome.label().name(),
            elapsed = ?started.elapsed(),
            "attempt ended"
        );
        Ok(outcome)
    }

    /// Marks an attempt, and says what the provider is answered. The event is under way until then.
    async fn record(
        &self,
        route: &Route,
        identity: &Identity,
        lock: &Lock,
        outcome: Outcome,
        slot: OwnedSemaphorePermit,
    ) -> Answer {
        let marked = self.mark(route, identity, lock, &outcome).await;
        drop(slot);
        marked.map_or_else(|answer| answer, |()| settled(&outcome, lock))
    }

    /// Makes sure that the lock outlasts the delivery (G8): one that a repeated claim got back, or that was waited for, has
    /// less left than it was granted with. One half of the margin is for the calls until here, the other is kept for the
    /// mark. Says how long the application has.
    async fn cover(&self, event: &Event, lock: &mut Lock) -> Result<Duration, NotCovered> {
        let timeout = event.route.application.timeout;
        let kept = self.lock_margin / 2;
        if lock.remaining() < timeout + kept {
            self.extend(event, lock, timeout + self.lock_margin).await?;
        }
        // Never into the part that is kept, or a second attempt could begin while this one is still at work.
        let left = timeout.min(lock.remaining().saturating_sub(kept));
        // With less, a connection that was never made could not be told from an answer that never came.
        if left <= self.upstream_connect_timeout { Err(NotCovered::unsure()) } else { Ok(left) }
    }

    /// Extends the lock, asking as often as it takes while there is something left of it. `needed` is what an extended one has
    /// to have.
    async fn extend(&self, event: &Event, lock: &mut Lock, needed: Duration) -> Result<(), NotCovered> {
        let mut backoff = Backoff::claims();
        loop {
            let asked = Instant::now();
            match self.sidecar.extend(lock.attempt(&event.route, &event.identity)).await {
                Ok(grant) => {
                    lock.ends = asked + grant.remaining;
                    // The time that the answer was on its way is no reason to give up: the next attempt would find the
                    // sidecar just as slow, and so would every other until the event is dead. The application gets less
                    // time instead.
                    if grant.remaining >= needed {
                        return Ok(());
                    }
                    tracing::error!(
                        event = digest(&event.route, &event.identity),
                        remaining = ?grant.remaining,
                        needed = ?needed,
                        "extended lock is still too short"
                    );
                    return Err(NotCovered::unsure());
                }
                Err(error) => self.not_extended(event, lock, &error)?,
            }
            tokio::select! {
                () = sleep(backoff.next()) => {}
                () = self.stop.cancelled() => return Err(NotCovered::unsure()),
            }
        }
    }

    /// What a failed extension means. Ok: nothing is decided, ask again.
    fn not_extended(&self, event: &Event, lock: &Lock, error: &CallError) -> Result<(), NotCovered> {
        match error.kind {
            CallErrorKind::Unknown | CallErrorKind::Unavailable { .. } if !lock.remaining().is_zero() => Ok(()),
            CallErrorKind::LockLost { completed } => {
                self.metrics.locks_lost.add();
                Err(NotCovered::Lost(lock_lost(completed)))
            }
            CallErrorKind::Unknown
            | CallErrorKind::Unavailable { .. }
            | CallErrorKind::ClaimEnded
            | CallErrorKind::Mismatch
            | CallErrorKind::OutcomeConflict
            | CallErrorKind::NotFound
            | CallErrorKind::Rejected => {
                let status = &error.status as &dyn StdError;
                tracing::warn!(event = digest(&event.route, &event.identity), status, "lock cannot be extended");
                Err(NotCovered::unsure())
            }
        }
    }

    async fn send(&self, event: &Event, lock: Option<&Lock>, timeout: Duration) -> Reply {
        let parcel = Parcel {
            route: &event.route,
            identity: &event.identity,
            headers: &event.headers,
            body: &event.body.bytes,
            timeout,
            hold: lock.map(|lock| Hold {
                attempt: lock.attempt,
                fencing_token: lock.fencing_token,
                // Less the time that reaching the application may take, or by its clock the lock would end later than it
                // does (S5).
                remaining: lock.remaining().saturating_sub(self.upstream_connect_timeout),
            }),
        };
        let started = Instant::now();
        let reply = tokio::select! {
            reply = self.upstream.deliver(&parcel) => reply,
            () = self.stop.cancelled() => Reply::Stopped,
        };
        self.metrics.upstream(&event.route.provider, started.elapsed());
        reply
    }
}

/// Why nothing was sent although a lock was granted.
enum NotCovered {
    /// The lock may still be ours: the attempt has to be marked.
    Unsure(Outcome),
    /// It is somebody else's.
    Lost(Answer),
}

impl NotCovered {
    fn unsure() -> Self {
        Self::Unsure(Outcome::nothing_sent("lock could not be extended to cover the delivery, nothing was sent"))
    }
}

/// G6: success if somebody completed the event meanwhile, otherwise the provider asks again.
fn lock_lost(completed: bool) -> Answer {
    if completed { Answer::AlreadyProcessed } else { Answer::Unsettled(RetryAfter::SOON) }
}

/// The event in logs and spans.
pub(crate) fn digest(route: &Route, identity: &Identity) -> String {
    event_digest(&route.tenant, route.provider.name(), &identity.event_id)
}
