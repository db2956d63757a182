//! How a batch left the events that more than one of its callers asks for.

use std::collections::{HashMap, HashSet};

use super::Queued;
use crate::event::{Event, Key, Time};

/// Events as the batch left them, with the database's time: what further callers of the same keys are judged by.
#[derive(Default)]
pub(super) struct Dealt {
    /// The only keys worth keeping.
    followed: HashSet<Key>,
    events: HashMap<Key, (Event, Time)>,
}

impl Dealt {
    /// For the events that `followers` ask for as well.
    pub(super) fn with(followers: &[Queued]) -> Dealt {
        Dealt { followed: followers.iter().filter_map(|queued| queued.op.key().cloned()).collect(), ..Dealt::default() }
    }

    /// Keeps an event as it stands `now`, if further callers ask for it.
    pub(super) fn keep(&mut self, event: &Event, now: Time) {
        if self.followed.contains(&event.key) {
            self.events.insert(event.key.clone(), (event.clone(), now));
        }
    }

    /// The event as the batch left it, and when that was.
    pub(super) fn get(&self, key: &Key) -> Option<(&Event, Time)> {
        self.events.get(key).map(|(event, now)| (event, *now))
    }
}
