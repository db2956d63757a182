//! The process's own layer: bounded by bytes, entries live a minute at most (C6).

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use quick_cache::{Weighter, sync};

use super::entry::{Entry, KeyDigest};

const STRIPES: usize = 64;
const AGE_MAX: Duration = Duration::from_secs(60);

pub(super) struct Memory {
    entries: Option<sync::Cache<KeyDigest, (Instant, Entry), ByBytes>>,
    /// One writer at a time per stripe: comparing and putting must be one step.
    stripes: [Mutex<()>; STRIPES],
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<KeyDigest, (Instant, Entry)> for ByBytes {
    fn weight(&self, _: &KeyDigest, (_, entry): &(Instant, Entry)) -> u64 {
        // The key, the entry, and what the table needs for each.
        const OVERHEAD: usize = size_of::<KeyDigest>() + size_of::<(Instant, Entry)>() + 32;
        u64::try_from(OVERHEAD + entry.heap_bytes()).unwrap_or(u64::MAX)
    }
}

impl Memory {
    pub(super) fn new(bytes_max: u64) -> Memory {
        let entries = (bytes_max > 0).then(|| {
            // Grows as it is used: an idle process should not pay for the full size.
            sync::Cache::with_weighter(1_024, bytes_max, ByBytes)
        });
        Memory { entries, stripes: [const { Mutex::new(()) }; STRIPES] }
    }

    pub(super) fn get(&self, digest: KeyDigest) -> Option<Entry> {
        let entries = self.entries.as_ref()?;
        let (since, entry) = entries.get(&digest)?;
        if since.elapsed() > AGE_MAX {
            entries.remove(&digest);
            return None;
        }
        Some(entry)
    }

    /// Keeps an entry, unless one with a higher token is there: a slow caller must not undo a tombstone.
    pub(super) fn put(&self, digest: KeyDigest, entry: Entry) {
        let Some(entries) = &self.entries else { return };
        let stripe = &self.stripes[digest.stripe(STRIPES)];
        let _held = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = entries
            .peek(&digest)
            .is_some_and(|(since, held)| held.fencing_token > entry.fencing_token && since.elapsed() <= AGE_MAX);
        if !newer {
            entries.insert(digest, (Instant::now(), entry));
        }
    }

    pub(super) fn clear(&self) {
        if let Some(entries) = &self.entries {
            entries.clear();
        }
    }
}
