//! What the cache has done, counted without locks.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn add(&self) {
        self.add_many(1);
    }

    /// So many more.
    pub fn add_many(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// So far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct CacheStats {
    /// Duplicates answered from the process's own layer.
    pub memory_hits: Counter,
    /// Look-ups that it could not answer.
    pub memory_misses: Counter,
    /// Duplicates answered from Redis.
    pub redis_hits: Counter,
    /// Look-ups that Redis had nothing usable for.
    pub redis_misses: Counter,
    /// Values in Redis that did not verify: forged, stale, or of another version. Should be 0.
    pub redis_invalid: Counter,
    /// Look-ups that failed or took too long.
    pub redis_errors: Counter,
    /// Look-ups that were not made, because Redis was known not to answer.
    pub redis_skipped: Counter,
    /// Entries that were not written to Redis: it failed, or more came than it takes.
    pub redis_writes_lost: Counter,
}
