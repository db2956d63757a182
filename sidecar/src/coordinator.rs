//! The coordinator: what a call goes through between the API and the ledger. It bounds the calls under way, answers plain
//! duplicates from the cache, and lets callers wait for the outcome of a running attempt. It grants nothing itself (S1).

mod replays;
mod waiters;

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use oncegate_runtime::{
    detach::Detach,
    metrics::Counter,
    shutdown::{CancellationToken, Drain},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit, broadcast},
    time::timeout,
};

use crate::{
    cache::{Cache, Ticket, entry::Completion, stats::CacheStats},
    event::{Claim, Claimed, Decision, Event, Extend, Key, KeyDigest, Lock, Mark, Marked, Payload, Resolve},
    ledger::{Announcement, Error, Heard, Ledger},
};
use waiters::{Seat, Waiters};

/// How often the events that somebody waits for are looked up, all in one read: the safety net for changes made by another
/// process and for lost wake-ups (L9).
const NET_INTERVAL: Duration = Duration::from_millis(200);

/// The minimum time a waiting caller waits for a place among the calls, even when its own time is up.
const PATIENCE_MIN: Duration = Duration::from_millis(100);

/// Bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Claims on the ledger at once, and as many of the calls that extend, end or resolve an attempt; beyond it they are
    /// refused as overloaded. Claims that may wait have the same number of places of their own, and queue for them. A call does
    /// not occupy a place while it waits for an outcome.
    pub calls_max: usize,
    /// Calls waiting for an outcome; beyond it "in progress" is answered at once (L9).
    pub waiting_max: usize,
}

impl Limits {
    /// Places for the calls of each kind, where the configuration does not say.
    pub const CALLS_MAX: usize = 1_024;
    /// Seats for waiting calls, where the configuration does not say.
    pub const WAITING_MAX: usize = 4_096;

    /// How many calls one connection may have under way: all that may be at the ledger or waiting, and some that only read. A
    /// client usually has one connection, and with a lower limit its waiting calls would block the very marks they are waiting
    /// for.
    pub fn streams_max(&self) -> u32 {
        const READS: usize = 64;
        let all = self.calls_max.saturating_mul(2).saturating_add(self.waiting_max).saturating_add(READS);
        u32::try_from(all).unwrap_or(u32::MAX)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits { calls_max: Limits::CALLS_MAX, waiting_max: Limits::WAITING_MAX }
    }
}

/// The places that are taken.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Occupancy {
    /// Calls on the ledger of the kind (claims, claims that may wait, others) that has the most.
    pub(crate) calls: usize,
    /// How many of each kind may be there.
    pub(crate) calls_max: usize,
    /// Calls that wait for an outcome.
    pub(crate) waiting: usize,
    /// How many may wait.
    pub(crate) waiting_max: usize,
    /// Calls refused so far for lack of a place.
    pub(crate) refused: u64,
}

/// What CheckAndLock is answered with.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "made once a call and taken apart at once; a box would cost more")]
pub enum Answer {
    /// By the ledger.
    Decided(Claimed),
    /// By the cache: a plain duplicate of a completed event.
    Completed(Key, Completion),
}

/// How long closing waits for marks and resolutions under way: longer than any call waits for the ledger.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(5);

/// See the module.
pub struct Coordinator {
    ledger: Arc<dyn Ledger>,
    cache: Arc<Cache>,
    claims: Semaphore,
    /// As many places for claims whose callers may wait: these queue for a place, and all that wait for one event ask again at
    /// the same moment. In a shared pool, callers who do not wait would be refused meanwhile, since queued callers go first.
    seated: Semaphore,
    /// As many places for calls on locks already granted: refusing a completion costs a second delivery, refusing a claim only
    /// delays one.
    others: Semaphore,
    calls_max: usize,
    /// Calls refused for lack of a place.
    refused: Counter,
    waiters: Arc<Waiters>,
    /// Marks and resolutions under way: they continue if their caller goes away, and are waited for when draining.
    tasks: Drain,
    closing: CancellationToken,
    /// Cancelled when a task that the coordinator depends on has ended.
    ended: CancellationToken,
}

impl Coordinator {
    /// A coordinator over a ledger. Its background tasks run until [`Coordinator::close`].
    pub fn new(ledger: Arc<dyn Ledger>, cache: Cache, limits: Limits) -> Arc<Coordinator> {
        let coordinator = Arc::new(Coordinator {
            ledger,
            cache: Arc::new(cache),
            claims: Semaphore::new(limits.calls_max),
            seated: Semaphore::new(limits.calls_max),
            others: Semaphore::new(limits.calls_max),
            calls_max: limits.calls_max,
            refused: Counter::new(),
            waiters: Arc::new(Waiters::new(limits.waiting_max)),
            tasks: Drain::new(),
            closing: CancellationToken::new(),
            ended: CancellationToken::new(),
        });
        let (ledger, closing) = (coordinator.ledger.clone(), coordinator.closing.clone());
        coordinator.rely_on(cast_net(ledger.clone(), coordinator.waiters.clone(), closing.clone()));
        coordinator.rely_on(replays::follow(ledger.clone(), coordinator.cache.clone(), closing.clone()));
        let announcements = ledger.announcements();
        coordinator.rely_on(heed(announcements, coordinator.cache.clone(), coordinator.waiters.clone(), closing));
        coordinator
    }

    /// Runs a task without which calls would be answered wrongly or not at all.
    fn rely_on(&self, task: impl Future<Output = ()> + Send + 'static) {
        // Dropped with the task, even on a panic.
        let ended = self.ended.clone().drop_guard();
        tokio::spawn(async move {
            task.await;
            drop(ended);
        });
    }

    fn admit<'a>(&self, places: &'a Semaphore) -> Result<SemaphorePermit<'a>, Error> {
        // Refused rather than queued: a call that waits here until its deadline helps nobody.
        places.try_acquire().map_err(|_| self.overloaded())
    }

    fn overloaded(&self) -> Error {
        self.refused.add();
        Error::overloaded()
    }

    /// How many calls are under way, and how many may be.
    pub(crate) fn occupancy(&self) -> Occupancy {
        let (waiting, waiting_max) = self.waiters.load();
        let places = [&self.claims, &self.seated, &self.others];
        let calls = places.map(|places| self.calls_max - places.available_permits()).into_iter().fold(0, usize::max);
        Occupancy { calls, calls_max: self.calls_max, waiting, waiting_max, refused: self.refused.get() }
    }

    /// The ledger, for what needs no coordination: lists, counts, Cleanup and its upkeep. Calls on single events go through the
    /// coordinator, which bounds them and tells caches and waiters what they change.
    pub fn ledger(&self) -> &Arc<dyn Ledger> {
        &self.ledger
    }

    /// Whether Redis has stopped answering and is not being asked.
    pub(crate) fn is_redis_left_alone(&self) -> bool {
        self.cache.is_redis_left_alone()
    }

    /// Whether the ledger is connected and may decide.
    pub(crate) fn is_ledger_up(&self) -> bool {
        self.ledger.standing().borrow().is_some()
    }

    /// Whether this process knows at `now`, without asking anybody, that a CheckAndLock of the event carrying nothing but its
    /// payload would be answered as a plain duplicate. If so, it is counted as one. False says nothing about the event.
    pub(crate) fn is_duplicate(&self, key: &Key, payload: Payload<'_>, now: Instant) -> bool {
        let is_duplicate = self.cache.has_duplicate(key, payload, now);
        if is_duplicate {
            self.ledger.count_duplicate(key);
        }
        is_duplicate
    }

    /// CheckAndLock, waiting at most for `wait` while the answer is "in progress". Cancel-safe: a lock that was granted
    /// to a caller who has gone away is found again by its `claim_id`, or expires.
    ///
    /// # Errors
    /// As the ledger's, and [`Error::Overloaded`].
    pub async fn claim(&self, claim: Claim, wait: Duration) -> Result<Answer, Error> {
        let (completion, ticket) = self.cache.look_up(&claim).await;
        if let Some(completion) = completion {
            self.ledger.count_duplicate(&claim.key);
            return Ok(Answer::Completed(claim.key, completion));
        }
        // A deadline on the monotonic clock; the ledger's clock is not ours to compare with (S5).
        let until = Instant::now() + wait;
        // Taken before asking, so that an outcome between the answer and the wait is not missed.
        let seat = if wait.is_zero() { None } else { self.waiters.enter(&claim.key) };
        match seat {
            None => {
                let claimed = self.ask(claim).await?;
                self.cache.told(&ticket, &claimed);
                Ok(Answer::Decided(claimed))
            }
            // Boxed, so that calls that do not wait reserve no space for it.
            Some(seat) => Box::pin(self.claim_seated(claim, &ticket, seat, until)).await,
        }
    }

    /// Asks again whenever the event's outcome may be there, until `until`.
    async fn claim_seated(
        &self,
        mut claim: Claim,
        ticket: &Ticket,
        seat: Seat,
        until: Instant,
    ) -> Result<Answer, Error> {
        loop {
            let woken = seat.woken();
            let left = until.saturating_duration_since(Instant::now());
            claim.waiting = !left.is_zero() && !self.closing.is_cancelled();
            let claimed = {
                // A caller with a seat may wait for a place too: the outcome is there to be told.
                let patience = left.max(PATIENCE_MIN);
                let mut place = pin!(self.seated.acquire());
                let permit = tokio::select! {
                    biased;
                    permit = timeout(patience, &mut place) => permit,
                    () = self.closing.cancelled() => timeout(PATIENCE_MIN, place).await,
                };
                let Ok(Ok(_permit)) = permit else { return Err(self.overloaded()) };
                self.ledger.claim(claim.clone()).await?
            };
            let retry_after = match claimed.decision {
                Decision::InProgress { retry_after } if claim.waiting => retry_after,
                _ => {
                    self.cache.told(ticket, &claimed);
                    return Ok(Answer::Decided(claimed));
                }
            };
            seat.saw(&claimed.event);
            // The lock's expiry and the end of a pause are known times; an outcome wakes us. The remaining time is computed
            // anew, since getting a place and an answer took time.
            let left = until.saturating_duration_since(Instant::now());
            let pause = retry_after.to_std().clamp(Duration::from_millis(1), left.max(Duration::from_millis(1)));
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep(pause) => {}
                () = self.closing.cancelled() => {}
            }
            // A completion is in the cache by now, and a crowd need not ask the ledger.
            if let (Some(completion), _) = self.cache.look_up(&claim).await {
                self.ledger.count_duplicate(&claim.key);
                return Ok(Answer::Completed(claim.key, completion));
            }
        }
    }

    async fn ask(&self, claim: Claim) -> Result<Claimed, Error> {
        let _permit = self.admit(&self.claims)?;
        self.ledger.claim(claim).await
    }

    /// MarkCompleted and MarkFailed. Continues if the caller goes away.
    ///
    /// # Errors
    /// As the ledger's, and [`Error::Overloaded`].
    pub async fn mark(&self, mark: Mark) -> Result<Marked, Error> {
        let _permit = self.admit(&self.others)?;
        let (ledger, waiters, cache) = (self.ledger.clone(), self.waiters.clone(), self.cache.clone());
        let marked = async move {
            let ticket = cache.ticket(&mark.key);
            let digest = ticket.digest();
            let answer = ledger.mark(mark).await;
            if let Ok(marked) = &answer {
                if !marked.repeated {
                    // Only after the commit was acknowledged (C2), and right after it, so its age is zero.
                    cache.fill(&ticket, &marked.event, marked.event.update_time);
                }
                // Also for a repetition: the first call may have been cut off before it could announce.
                ledger.announce(Announcement { digest, fencing_token: marked.event.fencing_token, resolved: false });
            }
            // Also after an error: the change may have happened.
            waiters.wake(&digest);
            answer
        };
        // Callers that wait for the outcome are woken even if this caller has gone away.
        Detach::new(marked, &self.tasks).await
    }

    /// ExtendLock.
    ///
    /// # Errors
    /// As the ledger's, and [`Error::Overloaded`].
    pub async fn extend(&self, extend: Extend) -> Result<Lock, Error> {
        let _permit = self.admit(&self.others)?;
        self.ledger.extend(extend).await
    }

    /// Resolve. Continues if the caller goes away; `ended` is given the result whether or not anybody still waits.
    ///
    /// # Errors
    /// As the ledger's, and [`Error::Overloaded`].
    pub async fn resolve(
        &self,
        resolve: Resolve,
        ended: impl FnOnce(&Result<Event, Error>) + Send + 'static,
    ) -> Result<Event, Error> {
        let _permit = match self.admit(&self.others) {
            Ok(permit) => permit,
            Err(error) => {
                ended(&Err(error.clone()));
                return Err(error);
            }
        };
        let (ledger, waiters, cache) = (self.ledger.clone(), self.waiters.clone(), self.cache.clone());
        let task = self.tasks.spawn(async move {
            let key = resolve.key.clone();
            let answer = ledger.resolve(resolve).await;
            if let Ok(event) = &answer {
                cache.resolved(event).await;
                ledger.announce(Announcement {
                    digest: KeyDigest::of(&key),
                    fencing_token: event.fencing_token,
                    resolved: true,
                });
            }
            waiters.wake(&KeyDigest::of(&key));
            ended(&answer);
            answer
        });
        task.await.unwrap_or(Err(Error::OutcomeUnknown))
    }

    /// What the cache has done so far.
    pub fn cache_stats(&self) -> Arc<CacheStats> {
        self.cache.stats()
    }

    /// Cancelled when the service begins to shut down.
    pub(crate) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Runs what [`Coordinator::close`] is to wait for.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.tasks.spawn(task));
    }

    /// Answers waiting callers with what is known, lets marks under way finish, and closes the ledger.
    pub async fn close(&self) {
        self.closing.cancel();
        let left = self.tasks.within(CLOSE_TIME_MAX).await;
        if left > 0 {
            tracing::warn!(left, "calls were still under way when the ledger was closed");
        }
        self.ledger.close().await;
        self.cache.close().await;
    }

    /// Waits until calls can no longer be answered properly: the service begins to shut down, or a task it depends on is gone,
    /// which takes a panic. Cancel-safe.
    pub async fn ended(&self) {
        tokio::select! {
            () = self.ledger.ended() => {}
            () = self.ended.cancelled() => {}
        }
    }

    /// Answers the callers waiting for an outcome with what is known now: the first step of a drain.
    pub fn stop_waiting(&self) {
        self.closing.cancel();
    }
}

/// Looks up all events that somebody waits for, in one read, and wakes the waiters of those that have changed (L9).
async fn cast_net(ledger: Arc<dyn Ledger>, waiters: Arc<Waiters>, closing: CancellationToken) {
    let mut interval = tokio::time::interval(NET_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = closing.cancelled() => return,
        }
        let keys = waiters.keys();
        if keys.is_empty() {
            continue;
        }
        // If the ledger is unreachable, callers learn it when they next ask.
        if let Ok(found) = ledger.peek(keys).await {
            for (key, state, fencing_token) in found {
                waiters.compare(&KeyDigest::of(&key), state, fencing_token);
            }
        }
    }
}

/// Wakes those waiting for an event that another process has changed, and drops it from the cache.
async fn heed(
    mut announcements: broadcast::Receiver<Heard>,
    cache: Arc<Cache>,
    waiters: Arc<Waiters>,
    closing: CancellationToken,
) {
    loop {
        let announcement = tokio::select! {
            announcement = announcements.recv() => announcement,
            () = closing.cancelled() => return,
        };
        match announcement {
            Ok(Heard::Changed(announcement)) => {
                if announcement.resolved {
                    cache.void(announcement.digest, announcement.fencing_token);
                }
                waiters.wake(&announcement.digest);
            }
            // The net finds what waiters missed; the cache is cleared here instead of waiting for the next read of the replays.
            Ok(Heard::Missed) | Err(broadcast::error::RecvError::Lagged(_)) => cache.clear(),
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::CacheSettings,
        event::{Ending, Micros, fixture},
        ledger::sqlite::{SqliteLedger, SqliteSettings},
    };

    /// Long, because only a failure ever uses it up.
    const DEADLINE: Duration = Duration::from_secs(60);

    // L9
    #[tokio::test]
    async fn a_waiter_hears_of_an_outcome_that_nobody_tells() {
        let directory = tempfile::tempdir().unwrap();
        let settings = SqliteSettings { migrate: true, ..SqliteSettings::default() };
        let ledger = Arc::new(SqliteLedger::open(&directory.path().join("oncegate.db"), &settings).unwrap());
        let cache = Cache::new(&CacheSettings::default(), ledger.standing()).unwrap();
        let coordinator = Coordinator::new(ledger.clone(), cache, Limits::default());
        // Twice: the net is cast once at the beginning, and has to be cast again.
        for event_id in ["evt_1", "evt_2"] {
            let claim = |claim_id| Claim { lock_duration: Micros::DAY, ..fixture::claim(event_id, claim_id) };
            let Decision::Acquired(lock) = ledger.claim(claim("holder")).await.unwrap().decision else {
                panic!("held")
            };
            let waiting = coordinator.claim(claim("waiter"), 60 * DEADLINE);
            let outcome = async {
                while coordinator.waiters.keys().is_empty() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                // As another process would, and its notification is lost.
                let mark = Mark {
                    key: claim("holder").key,
                    fencing_token: lock.fencing_token,
                    claim_id: None,
                    ending: Ending::Completed { metadata: None },
                    result: None,
                    attempts_max: None,
                };
                ledger.mark(mark).await.unwrap();
            };
            let both = async { tokio::join!(waiting, outcome) };
            let (answer, ()) = tokio::time::timeout(DEADLINE, both).await.expect("it is woken");
            let Answer::Decided(claimed) = answer.unwrap() else { panic!("the cache has not heard of it") };
            assert_eq!(claimed.decision, Decision::AlreadyCompleted);
        }
        coordinator.close().await;
    }
}
