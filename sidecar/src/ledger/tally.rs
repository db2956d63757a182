//! Duplicates and mismatches, counted in memory and written each second (L2): a duplicate costs no write of its own,
//! and a crash loses at most a second of counts.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use foldhash::fast::RandomState;
use tokio::sync::Notify;

use crate::event::{Event, Key, RowId, Time};

/// What has come in for one event since the last flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Calls answered with anything but the lock.
    pub duplicates: i64,
    /// Calls with another fingerprint or payload digest.
    pub mismatches: i64,
    /// When the last mismatch came.
    pub last_mismatch_time: Option<Time>,
    /// Where the event stands in the ledger, if whoever counted has read it: it is then not looked for by its key again.
    pub location: Option<Location>,
}

/// Where an event stands in the ledger: what its indexes that are not by key have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Its row.
    pub row: RowId,
    /// When it was created.
    pub create_time: Time,
}

impl From<&Event> for Location {
    fn from(event: &Event) -> Self {
        Location { row: event.row, create_time: event.create_time }
    }
}

impl Count {
    fn add(&mut self, other: Count) {
        self.duplicates += other.duplicates;
        self.mismatches += other.mismatches;
        self.last_mismatch_time = self.last_mismatch_time.max(other.last_mismatch_time);
        self.location = other.location.or(self.location);
    }
}

type Counts = HashMap<Key, Count, RandomState>;

/// Counts that wait to be written. Clones share them: whoever flushes writes what all of them count.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    counts: Arc<Mutex<Counts>>,
    full: Arc<Notify>,
}

impl Tally {
    /// More keys than this are flushed before the second is over.
    pub const KEYS_MAX: usize = 8_192;
    /// Beyond this, counts of further keys are lost rather than kept: memory stays bounded while the ledger is away.
    const KEYS_KEPT_MAX: usize = 8 * Self::KEYS_MAX;
    /// With more keys than this the calls that count wait for those who write, where they can.
    const KEYS_BEHIND: usize = 4 * Self::KEYS_MAX;
    /// How many keys one statement of a ledger with row locks writes: some milliseconds' worth, for marks of these events
    /// wait meanwhile.
    pub const FLUSH_MAX: usize = 256;

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Numbers are added under it; nothing there can panic half-way.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call on the event, which stands at `location` as far as that is known, was answered with anything but the lock.
    pub fn duplicate(&self, key: &Key, location: Option<Location>) {
        self.count(key, Count { duplicates: 1, location, ..Count::default() });
    }

    /// A call on the event came with another fingerprint or payload digest.
    pub fn mismatch(&self, key: &Key, time: Time) {
        self.count(key, Count { mismatches: 1, last_mismatch_time: Some(time), ..Count::default() });
    }

    fn count(&self, key: &Key, added: Count) {
        let mut counts = self.lock();
        let room = counts.len() < Self::KEYS_KEPT_MAX;
        // Most calls find the key: no clone then.
        match counts.get_mut(key) {
            Some(count) => count.add(added),
            None if room => {
                counts.insert(key.clone(), added);
                if counts.len() >= Self::KEYS_MAX {
                    self.full.notify_one();
                }
            }
            None => {}
        }
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// How many keys there is something to write of.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether a flush should not wait for the second.
    pub fn is_full(&self) -> bool {
        self.lock().len() >= Self::KEYS_MAX
    }

    /// Waits until a flush should not wait for the second any more. For one at a time; cancel-safe.
    pub async fn filled(&self) {
        self.full.notified().await;
    }

    /// Whether there is so much to write that counts may soon be lost.
    pub fn is_behind(&self) -> bool {
        self.len() >= Self::KEYS_BEHIND
    }

    /// Takes at most so many, in the order of the keys (unsorted ones deadlock, L3).
    pub fn take(&self, max: usize) -> Vec<(Key, Count)> {
        let mut waiting = self.lock();
        let mut counts: Vec<(Key, Count)> = if waiting.len() <= max {
            waiting.drain().collect()
        } else {
            let keys: Vec<Key> = waiting.keys().take(max).cloned().collect();
            keys.into_iter().filter_map(|key| waiting.remove_entry(&key)).collect()
        };
        drop(waiting);
        counts.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        counts
    }

    /// Puts back what could not be written, as far as there is room.
    pub fn restore(&self, counts: Vec<(Key, Count)>) {
        let mut waiting = self.lock();
        for (key, count) in counts {
            if waiting.len() >= Self::KEYS_KEPT_MAX && !waiting.contains_key(&key) {
                continue;
            }
            waiting.entry(key).or_default().add(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> Key {
        Key { tenant: "default".into(), provider: "stripe".into(), event_id: number.to_string() }
    }

    #[test]
    fn beyond_the_bound_keys_are_lost_whatever_is_counted_of_them_and_known_ones_are_not() {
        let (tally, now) = (Tally::default(), Time(7));
        for number in 0..Tally::KEYS_KEPT_MAX {
            tally.mismatch(&key(number), now);
        }
        let taken = tally.take(1);
        let freed = taken[0].0.clone();
        for number in Tally::KEYS_KEPT_MAX..Tally::KEYS_KEPT_MAX + 9 {
            tally.mismatch(&key(number), now);
            tally.duplicate(&key(number), None);
        }
        assert_eq!(tally.len(), Tally::KEYS_KEPT_MAX, "the first of the nine had the place that was free");
        tally.restore(taken);
        assert_eq!(tally.len(), Tally::KEYS_KEPT_MAX);
        let known = (0..2).map(key).find(|key| *key != freed).expect("one of them is another");
        tally.restore(vec![(known.clone(), Count { duplicates: 3, ..Count::default() })]);
        let all = tally.take(usize::MAX);
        assert!(!all.iter().any(|(key, _)| *key == freed), "there was no room for it");
        let counted = all.iter().find(|(key, _)| *key == known).map(|(_, count)| *count);
        let expected = Count { duplicates: 3, mismatches: 1, last_mismatch_time: Some(now), location: None };
        assert_eq!(counted, Some(expected));
    }
}
