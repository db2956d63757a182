//! Callers that wait for the outcome of a running attempt, by event. A lost wake-up costs one interval of the net, never an
//! answer.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, futures::OwnedNotified};

use crate::event::{Event, FencingToken, Key, KeyDigest, State};

pub(super) struct Waiters {
    events: Mutex<Events>,
    max: usize,
}

#[derive(Default)]
struct Events {
    by_digest: HashMap<KeyDigest, Waited>,
    /// Over all events.
    waiting: usize,
}

/// An event that somebody waits for.
struct Waited {
    key: Key,
    changed: Arc<Notify>,
    count: usize,
    /// What the waiters know about it, for the net to compare with.
    seen: Option<(State, FencingToken)>,
}

impl Waiters {
    pub(super) fn new(max: usize) -> Waiters {
        Waiters { events: Mutex::new(Events::default()), max }
    }

    /// How many wait, and how many may.
    pub(super) fn load(&self) -> (usize, usize) {
        (self.lock().waiting, self.max)
    }

    /// A seat among the waiters, or none when all are taken. Given back when dropped.
    pub(super) fn enter(self: &Arc<Self>, key: &Key) -> Option<Seat> {
        let mut events = self.lock();
        if events.waiting >= self.max {
            return None;
        }
        events.waiting += 1;
        let digest = KeyDigest::of(key);
        let waited = events.by_digest.entry(digest).or_insert_with(|| Waited {
            key: key.clone(),
            changed: Arc::new(Notify::new()),
            count: 0,
            seen: None,
        });
        waited.count += 1;
        Some(Seat { waiters: self.clone(), digest, changed: waited.changed.clone() })
    }

    /// Something has happened to the event.
    pub(super) fn wake(&self, digest: &KeyDigest) {
        if let Some(waited) = self.lock().by_digest.get(digest) {
            waited.changed.notify_waiters();
        }
    }

    /// The events that are waited for and were seen running.
    pub(super) fn keys(&self) -> Vec<Key> {
        self.lock().by_digest.values().filter(|waited| waited.seen.is_some()).map(|waited| waited.key.clone()).collect()
    }

    /// Wakes the waiters of an event that is no longer as they saw it.
    pub(super) fn compare(&self, digest: &KeyDigest, state: State, fencing_token: FencingToken) {
        if let Some(waited) = self.lock().by_digest.get(digest)
            && waited.seen.is_some_and(|seen| seen != (state, fencing_token))
        {
            waited.changed.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Events> {
        // No code that holds the lock can panic half-way through a change.
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller's place among the waiters.
pub(super) struct Seat {
    waiters: Arc<Waiters>,
    digest: KeyDigest,
    changed: Arc<Notify>,
}

impl Seat {
    /// Completes at the next change after this call, even one that happens before it is first polled.
    pub(super) fn woken(&self) -> OwnedNotified {
        // `notify_waiters` reaches every future that was made before it, polled or not.
        self.changed.clone().notified_owned()
    }

    /// Records what the caller knows about the event. If others know something else, the event has changed since one of them
    /// asked: all are woken here to ask once more, because the net compares with what was seen last and would find nothing to
    /// tell them.
    pub(super) fn saw(&self, event: &Event) {
        if let Some(waited) = self.waiters.lock().by_digest.get_mut(&self.digest) {
            let seen = (event.state, event.fencing_token);
            if waited.seen.replace(seen).is_some_and(|before| before != seen) {
                waited.changed.notify_waiters();
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut events = self.waiters.lock();
        events.waiting -= 1;
        if let Some(waited) = events.by_digest.get_mut(&self.digest) {
            waited.count -= 1;
            if waited.count == 0 {
                events.by_digest.remove(&self.digest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::event::{RowId, Time, fixture::claim};

    /// An event that is held under a token.
    fn held(token: i64) -> Event {
        Event::inserted(&claim("evt_1", "claim"), RowId(1), FencingToken(token), Time(1))
    }

    #[test]
    fn what_one_waiter_sees_hides_no_change_from_another() {
        let waiters = Arc::new(Waiters::new(2));
        let (before, after) = (held(1), held(2));
        let (first, second) = (waiters.enter(&before.key).unwrap(), waiters.enter(&before.key).unwrap());
        let woken = first.woken();
        first.saw(&before);
        second.saw(&before);
        assert!(woken.now_or_never().is_none(), "both have seen the same");
        // Taken over by another process, whose notification is lost: the second waiter asks again and finds out.
        let woken = first.woken();
        second.saw(&after);
        assert!(woken.now_or_never().is_some());
        // Neither the net nor asking again brings them anything new.
        let woken = first.woken();
        first.saw(&after);
        waiters.compare(&KeyDigest::of(&after.key), after.state, after.fencing_token);
        assert!(woken.now_or_never().is_none(), "it is known to all");
    }
}
