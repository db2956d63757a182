//! The life of one event behind the gateway: claim, deliver, mark.
//!
//! The invariants: while it enforces, nothing is sent without a lock that outlasts the delivery (G8); what was sent is marked, however long that
//! takes (G9); only an acknowledged completion is answered with success. If the process dies between
//! sending and marking, the lock expires and the provider's next try is a new attempt with a higher fencing token (S3).

mod backoff;
mod observe;

use std::{
    error::Error as StdError,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use backoff::Backoff;
use http::HeaderMap;
use oncegate_runtime::{
    detach::Detach,
    shutdown::{CancellationToken, Drain},
    throttle::Throttle,
};
use sha2::{Digest as _, Sha256};
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
    metrics::{Claimed, Metrics},
    route::Route,
    sidecar::{Attempt, Claim, Failure, Grant, Kind, MarkedFailure, Sidecar},
    upstream::{Hold, Outcome, Parcel, Reply, Upstream, nothing_sent, outcome},
};

/// A verified event.
pub(crate) struct Event {
    pub(crate) route: Arc<Route>,
    pub(crate) identity: Identity,
    /// The provider's name for this delivery; empty when it gives none.
    pub(crate) delivery_id: String,
    /// As they came in; few of them go on.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Received,
}

/// A reply that was lost once is had again within this; a sidecar that stays in trouble is not worth a provider's wait.
const CLAIM_PATIENCE_MAX: Duration = Duration::from_secs(4);

/// A claim whose outcome is unknown, to be repeated as it is.
struct Unsettled {
    claim_id: String,
    first_asked: Instant,
}

/// Why there is no lock.
enum NoLock {
    Answer(Answer),
    Unsettled(Unsettled),
}

/// Takes events to the application, at most so many at once.
pub(crate) struct Courier {
    sidecar: Sidecar,
    upstream: Upstream,
    metrics: Arc<Metrics>,
    slots: Arc<Semaphore>,
    slots_max: usize,
    lock_margin: Duration,
    upstream_connect_timeout: Duration,
    wait_duration: Duration,
    sidecar_timeout: Duration,
    /// How long a provider waits for a claim whose outcome stays unknown.
    claim_patience: Duration,
    drain: Drain,
    /// Cancelled when the drain is over: what is still waiting for the application counts as timed out (G9).
    stop: CancellationToken,
    /// Attempts that were given up unmarked because of that.
    unmarked: AtomicUsize,
    unavailable: Throttle,
}

/// A version 4 UUID. From the thread's own generator: asking the system for each costs a system call a webhook.
fn new_claim_id() -> String {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string()
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
        // Most of what comes again: there is no lock to be had, and nothing that would have to outlive the request.
        if event.route.enforcement.get() == Enforcement::Enforce && self.sidecar.is_duplicate(&event) {
            let answer = Answer::AlreadyProcessed;
            self.metrics.claimed(&event.route.provider, Claimed::of(&answer));
            return answer;
        }
        // Before the lock: an event that is refused here is as if it had never come.
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            self.metrics.claimed(&event.route.provider, Claimed::Failed);
            return Answer::Overloaded;
        };
        match timeout_at(answer_by, self.start(event, slot, answer_by)).await {
            Ok(answer) => answer,
            Err(_) => Answer::Continues,
        }
    }

    /// Not a part of `handle`, whose future would then have room for the whole life of an event beside the box that it is
    /// in: several kilobytes that are moved with every request.
    fn start(
        self: &Arc<Self>,
        event: Event,
        slot: OwnedSemaphorePermit,
        answer_by: Instant,
    ) -> Detach<impl Future<Output = Answer> + Send + use<>> {
        // Its own span: it goes on when the request has ended.
        let span = tracing::info_span!(
            "event",
            otel.kind = "internal",
            oncegate.provider = event.route.provider.name(),
            oncegate.event = short(&event.route, &event.identity),
            oncegate.attempt = field::Empty,
            oncegate.fencing_token = field::Empty,
            oncegate.outcome = field::Empty,
        );
        Detach::new(self.clone().live(event, slot, answer_by, None).instrument(span), &self.drain)
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

    async fn live(
        self: Arc<Self>,
        event: Event,
        slot: OwnedSemaphorePermit,
        answer_by: Instant,
        unsettled: Option<Unsettled>,
    ) -> Answer {
        // Read once: an event is handled the way it began. What is taken up again began by enforcing: its provider was
        // sent away to come again, and that try, or the one that settled it meanwhile, is what is delivered.
        let observing = unsettled.is_none() && event.route.enforcement.get() == Enforcement::Observe;
        let mut lock = match self.claim(&event, answer_by, unsettled, observing).await {
            Ok(lock) => {
                self.metrics.claimed(&event.route.provider, Claimed::Acquired);
                lock
            }
            // Not so what comes under the name of another delivery: the switch lets duplicates through, never a forgery.
            Err(no_lock) if observing && !matches!(no_lock, NoLock::Answer(Answer::Conflict)) => {
                return self.observe(event, slot, no_lock).await;
            }
            Err(NoLock::Answer(answer)) => {
                self.metrics.claimed(&event.route.provider, Claimed::of(&answer));
                return answer;
            }
            Err(NoLock::Unsettled(unsettled)) => {
                // The provider need not wait for a sidecar that is in trouble: its next try finds what became of this.
                let drain = self.drain.clone();
                drain.spawn(self.resume(event, slot, answer_by, unsettled).in_current_span());
                return Answer::Unavailable(RetryAfter::SOON);
            }
        };
        let started = Instant::now();
        let covered = if observing { Ok(event.route.target.timeout) } else { self.cover(&event, &mut lock).await };
        let outcome = match covered {
            Ok(_) if self.stop.is_cancelled() => nothing_sent("gateway ended before anything was sent"),
            Ok(timeout) => {
                let reply = self.send(&event, Some(&lock), timeout).await;
                outcome(reply, event.route.policy, timeout)
            }
            Err(NotCovered::Unsure(outcome)) => outcome,
            Err(NotCovered::Lost(answer)) => return answer,
        };
        self.metrics.delivered(&event.route.provider, outcome.label());
        let span = Span::current();
        span.record("oncegate.attempt", lock.attempt);
        span.record("oncegate.fencing_token", lock.fencing_token);
        span.record("oncegate.outcome", outcome.label().name());
        // The body has been sent or never will be: its share of the budget is somebody else's while we mark.
        let Event { route, identity, headers, body, .. } = event;
        drop((headers, body));
        tracing::info!(
            provider = route.provider.name(),
            event = short(&route, &identity),
            fencing_token = lock.fencing_token,
            attempt = lock.attempt,
            outcome = outcome.label().name(),
            elapsed = ?started.elapsed(),
            "attempt ended"
        );
        if observing {
            // What the sidecar says of it changes nothing, so the answer does not wait for it.
            let answer = settled(outcome.clone(), &lock);
            let drain = self.drain.clone();
            drain.spawn(async move {
                let _ = self.mark(&route, &identity, &lock, &outcome).await;
                drop(slot);
            });
            return answer;
        }
        let marked = self.mark(&route, &identity, &lock, &outcome).await;
        drop(slot);
        marked.map_or_else(|answer| answer, |()| settled(outcome, &lock))
    }

    /// Goes on with an event whose claim is unsettled. Boxed: the future is one that it is itself a part of.
    fn resume(
        self: Arc<Self>,
        event: Event,
        slot: OwnedSemaphorePermit,
        answer_by: Instant,
        unsettled: Unsettled,
    ) -> Pin<Box<dyn Future<Output = Answer> + Send>> {
        Box::pin(self.live(event, slot, answer_by, Some(unsettled)))
    }

    /// CheckAndLock until its outcome is known (G9). One that stays unknown for longer than a provider should wait for it
    /// is given back unsettled, to be taken up again in the background.
    /// While `observing` nothing is waited for: the event is delivered whatever comes of it.
    async fn claim(
        &self,
        event: &Event,
        answer_by: Instant,
        unsettled: Option<Unsettled>,
        observing: bool,
    ) -> Result<Lock, NoLock> {
        let Event { route, identity, .. } = event;
        let resumed = unsettled.is_some();
        let Unsettled { claim_id, first_asked } =
            unsettled.unwrap_or_else(|| Unsettled { claim_id: new_claim_id(), first_asked: Instant::now() });
        let mut unknown = resumed;
        let mut stopped = false;
        let mut backoff = Backoff::claims();
        loop {
            let asked = Instant::now();
            // Nobody waits for the outcome of a repeated claim's rival; and no wait may outlast the provider's.
            let wait = if unknown || observing {
                Duration::ZERO
            } else {
                let rest = answer_by.saturating_duration_since(asked).saturating_sub(self.sidecar_timeout);
                self.wait_duration.min(rest)
            };
            let claimed = tokio::select! {
                claimed = self.sidecar.claim(event, &claim_id, wait) => claimed,
                // It may wait for another's outcome for longer than there is time. Asked once more it does not, and a lock
                // that it has by now is marked.
                () = self.stop.cancelled(), if !stopped => {
                    (stopped, unknown) = (true, true);
                    continue;
                }
            };
            match claimed {
                Ok(claim) => return granted(claim, claim_id, asked, route).map_err(NoLock::Answer),
                Err(failure) => match failure.kind {
                    Kind::Unknown | Kind::Unavailable { .. }
                        if unknown && !resumed && (observing || first_asked.elapsed() >= self.claim_patience) =>
                    {
                        return Err(NoLock::Unsettled(Unsettled { claim_id, first_asked }));
                    }
                    Kind::Unknown => {
                        unknown = true;
                        self.metrics.claims_unknown.add();
                        tracing::warn!(
                            event = short(route, identity),
                            code = ?failure.status.code(),
                            "outcome of a claim is unknown, repeating it"
                        );
                    }
                    // The earlier call's outcome is as unknown as before.
                    Kind::Unavailable { .. } if unknown => {}
                    _ => return Err(NoLock::Answer(self.claim_refused(route, identity, &failure))),
                },
            }
            // A lock granted to the first call has ended by now; nobody is blocked by it any longer.
            if first_asked.elapsed() >= route.target.lock_duration {
                tracing::error!(event = short(route, identity), "giving up a claim whose outcome stayed unknown");
                return Err(NoLock::Answer(Answer::Unavailable(RetryAfter::SOON)));
            }
            self.metrics.claims_repeated.add();
            tokio::select! {
                () = sleep(backoff.next()) => {}
                () = self.stop.cancelled() => return Err(NoLock::Answer(Answer::Unavailable(RetryAfter::SOON))),
            }
        }
    }

    fn claim_refused(&self, route: &Route, identity: &Identity, failure: &Failure) -> Answer {
        let event = short(route, identity);
        let status = &failure.status as &dyn StdError;
        match failure.kind {
            Kind::Unavailable { retry_after } => {
                if let Some(unreported) = self.unavailable.pass() {
                    tracing::warn!(event, status, unreported, "sidecar is unavailable");
                }
                Answer::Unavailable(retry_after.map_or(RetryAfter::SOON, RetryAfter::after))
            }
            Kind::Mismatch => {
                tracing::error!(event, status, "event was first claimed with something else");
                Answer::Conflict
            }
            Kind::LockLost { completed: true } => Answer::AlreadyProcessed,
            // A repeated claim came so late that its attempt has ended: the next delivery finds out how.
            Kind::LockLost { completed: false } | Kind::ClaimEnded => Answer::Unsettled(RetryAfter::SOON),
            Kind::Unknown | Kind::OutcomeConflict | Kind::NotFound | Kind::Rejected => {
                tracing::error!(event, status, "sidecar refuses the claim");
                Answer::Defect
            }
        }
    }

    /// Makes sure that the lock outlasts the delivery (G8): one that a repeated claim got back, or that was waited for, has
    /// less left than it was granted with. One half of the margin is for the calls until here, the other is kept for the
    /// mark. Says how long the application has.
    async fn cover(&self, event: &Event, lock: &mut Lock) -> Result<Duration, NotCovered> {
        let Event { route, identity, .. } = event;
        let timeout = route.target.timeout;
        let kept = self.lock_margin / 2;
        let mut backoff = Backoff::claims();
        while lock.remaining() < timeout + kept {
            let asked = Instant::now();
            match self.sidecar.extend(lock.attempt(route, identity)).await {
                Ok(grant) => {
                    lock.ends = asked + grant.remaining;
                    let needed = timeout + self.lock_margin;
                    if grant.remaining < needed {
                        tracing::error!(
                            event = short(route, identity),
                            remaining = ?grant.remaining,
                            needed = ?needed,
                            "extended lock is still too short"
                        );
                        return Err(NotCovered::unsure());
                    }
                    // What the answer's way took is no reason to give up: the next attempt would find the sidecar as slow,
                    // and so would each until the event is dead. The application gets less time instead.
                    break;
                }
                Err(failure) => match failure.kind {
                    Kind::Unknown | Kind::Unavailable { .. } if !lock.remaining().is_zero() => {
                        tokio::select! {
                            () = sleep(backoff.next()) => {}
                            () = self.stop.cancelled() => return Err(NotCovered::unsure()),
                        }
                    }
                    Kind::LockLost { completed } => {
                        self.metrics.locks_lost.add();
                        return Err(NotCovered::Lost(lock_lost(completed)));
                    }
                    _ => {
                        let status = &failure.status as &dyn StdError;
                        tracing::warn!(event = short(route, identity), status, "lock cannot be extended");
                        return Err(NotCovered::unsure());
                    }
                },
            }
        }
        // Never past what is kept, or a second attempt could begin while this one is at work.
        let left = timeout.min(lock.remaining().saturating_sub(kept));
        // In less a connection that was never made could not be told from an answer that never came.
        if left <= self.upstream_connect_timeout { Err(NotCovered::unsure()) } else { Ok(left) }
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
                // Not what it takes to reach the application: by its clock the lock would end later than it does (S5).
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

    /// Marks until the mark is answered (G9): late ones are valid (S3), and one that is lost would cost the rest of the
    /// lock and a second delivery. Ends early only when the process has to. Anything but a recorded mark is an answer.
    async fn mark(&self, route: &Route, identity: &Identity, lock: &Lock, outcome: &Outcome) -> Result<(), Answer> {
        let mut backoff = Backoff::marks();
        loop {
            // Read before the call, so that there is one more try after the stop.
            let last = self.stop.is_cancelled();
            let Err(failure) = self.mark_once(lock.attempt(route, identity), lock, outcome).await else {
                return Ok(());
            };
            let advised = self.mark_refused(route, identity, lock, &failure)?;
            if last {
                tracing::error!(event = short(route, identity), "ending before the attempt could be marked");
                self.unmarked.fetch_add(1, Relaxed);
                return Err(Answer::Unavailable(RetryAfter::SOON));
            }
            let pause = backoff.next().max(advised.min(Backoff::MARKS_MAX));
            tracing::warn!(
                event = short(route, identity),
                status = &failure.status as &dyn StdError,
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
        failure: &Failure,
    ) -> Result<Duration, Answer> {
        let event = short(route, identity);
        let status = &failure.status as &dyn StdError;
        match failure.kind {
            Kind::Unavailable { retry_after } => Ok(retry_after.unwrap_or_default()),
            Kind::Unknown => Ok(Duration::ZERO),
            Kind::LockLost { completed } => {
                self.metrics.locks_lost.add();
                tracing::warn!(event, fencing_token = lock.fencing_token, completed, "lock was lost");
                Err(lock_lost(completed))
            }
            // The first result stands (S3).
            Kind::OutcomeConflict => {
                tracing::error!(event, status, "another outcome of this attempt was recorded before");
                Err(Answer::Unsettled(RetryAfter::SOON))
            }
            Kind::ClaimEnded | Kind::Mismatch | Kind::NotFound | Kind::Rejected => {
                tracing::error!(event, status, "sidecar refuses the mark");
                Err(Answer::Defect)
            }
        }
    }

    async fn mark_once(&self, attempt: Attempt<'_>, lock: &Lock, outcome: &Outcome) -> Result<(), Failure> {
        match outcome {
            Outcome::Completed { code } => self.sidecar.mark_completed(attempt, *code).await,
            Outcome::Failed { kind, error, code, pause, .. } => {
                let retry_after = if *pause { Some(lock.remaining()).filter(|rest| !rest.is_zero()) } else { None };
                let failure = MarkedFailure { kind: *kind, error: error.clone(), retry_after, code: *code };
                self.sidecar.mark_failed(attempt, failure).await
            }
        }
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
        Self::Unsure(nothing_sent("lock could not be extended to cover the delivery, nothing was sent"))
    }
}

fn granted(claim: Claim, claim_id: String, asked: Instant, route: &Route) -> Result<Lock, Answer> {
    match claim {
        Claim::Acquired(grant) => Ok(Lock::new(claim_id, grant, asked)),
        Claim::Completed => Err(Answer::AlreadyProcessed),
        Claim::InProgress(after) => Err(Answer::InProgress(route.policy.in_progress, RetryAfter::after(after))),
        Claim::Paused(after) => Err(Answer::Paused(RetryAfter::after(after))),
        Claim::Refused => Err(Answer::Held(route.policy.held)),
    }
}

/// G6: success if somebody completed the event meanwhile, otherwise the provider asks again.
fn lock_lost(completed: bool) -> Answer {
    if completed { Answer::AlreadyProcessed } else { Answer::Unsettled(RetryAfter::SOON) }
}

/// The answer once the mark is recorded.
fn settled(outcome: Outcome, lock: &Lock) -> Answer {
    match outcome {
        Outcome::Completed { .. } => Answer::Processed,
        Outcome::Failed { pause: true, .. } => Answer::Failed(Some(RetryAfter::after(lock.remaining()))),
        Outcome::Failed { retry_after, .. } => Answer::Failed(retry_after),
    }
}

/// An event in logs: enough to find the lines that belong together, and nothing of the event (W17).
pub(crate) fn short(route: &Route, identity: &Identity) -> String {
    let mut hash = Sha256::new();
    for part in [route.tenant.as_str(), "/", route.provider.name(), "/", &identity.event_id] {
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..6])
}
