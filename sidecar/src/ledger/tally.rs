//! Duplicates and mismatches, counted in memory and written each second (L2): a duplicate costs no write of its own,
//! and a crash loses at most a second of counts.

use std::collections::HashMap;

use crate::event::{Key, Time};

/// What has come in for one event since the last flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Calls answered with anything but the lock.
    pub duplicates: i64,
    /// Calls with another fingerprint or payload digest.
    pub mismatches: i64,
    /// When the last mismatch came.
    pub last_mismatch_time: Option<Time>,
}

/// Counts that wait to be written.
#[derive(Debug, Default)]
pub struct Tally {
    counts: HashMap<Key, Count>,
}

impl Tally {
    /// More keys than this are flushed before the second is over, so that memory stays bounded.
    pub const KEYS_MAX: usize = 8_192;

    /// A call on the event was answered with anything but the lock.
    pub fn duplicate(&mut self, key: &Key) {
        self.entry(key).duplicates += 1;
    }

    /// A call on the event came with another fingerprint or payload digest.
    pub fn mismatch(&mut self, key: &Key, time: Time) {
        let count = self.entry(key);
        count.mismatches += 1;
        count.last_mismatch_time = count.last_mismatch_time.max(Some(time));
    }

    fn entry(&mut self, key: &Key) -> &mut Count {
        // Most calls find the key: no clone then.
        if !self.counts.contains_key(key) {
            self.counts.insert(key.clone(), Count::default());
        }
        self.counts.get_mut(key).expect("the key was inserted on the line above")
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Whether a flush should not wait for the second.
    pub fn is_full(&self) -> bool {
        self.counts.len() >= Self::KEYS_MAX
    }

    /// Takes everything, in the order of the keys (unsorted ones deadlock, L3).
    pub fn take(&mut self) -> Vec<(Key, Count)> {
        let mut counts: Vec<_> = self.counts.drain().collect();
        counts.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        counts
    }

    /// Puts back what could not be written.
    pub fn restore(&mut self, counts: Vec<(Key, Count)>) {
        for (key, count) in counts {
            let entry = self.entry(&key);
            entry.duplicates += count.duplicates;
            entry.mismatches += count.mismatches;
            entry.last_mismatch_time = entry.last_mismatch_time.max(count.last_mismatch_time);
        }
    }
}
