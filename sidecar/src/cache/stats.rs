//! What the cache has done, counted without locks.

pub use oncegate_runtime::metrics::Counter;

/// See the module.
#[derive(Debug, Default)]
pub struct CacheStats {
    /// Duplicates answered from the process's own layer.
    pub memory_hits: Counter,
    /// Look-ups that it could not answer.
    pub memory_misses: Counter,
    /// Look-ups of events that it knows, and that are not for a cache to answer: more than one attempt, another payload, a copy
    /// of the call that completed it. No other layer is asked.
    pub memory_referred: Counter,
    /// Look-ups that no layer was asked for, because it was not known what had been replayed in the last seconds (C7).
    pub unsure: Counter,
    /// Duplicates answered from Redis.
    pub redis_hits: Counter,
    /// Look-ups that Redis had nothing usable for.
    pub redis_misses: Counter,
    /// Values in Redis that were not ours to believe, whatever the reason. Should be 0.
    pub redis_invalid: Counter,
    /// Of these, too short, too long, or inconsistent.
    pub redis_invalid_malformed: Counter,
    /// Of these, not authenticated by the database's key: forged, changed, or copied from another event or database.
    pub redis_invalid_unverified: Counter,
    /// Of these, ours by their key, and written by another version.
    pub redis_invalid_version: Counter,
    /// Look-ups that found, in either layer, what is void: the event was replayed since, or the entry is older than any may
    /// be; or that found a tombstone. Also counted as misses.
    pub voided: Counter,
    /// Look-ups that failed or took too long.
    pub redis_errors: Counter,
    /// Look-ups that were not made, because Redis was known not to answer.
    pub redis_skipped: Counter,
    /// Look-ups that were not made, because the last calls were of new events: the ledger is asked at once.
    pub redis_unasked: Counter,
    /// Entries that were not written to Redis: it failed, or more came than it takes.
    pub redis_writes_lost: Counter,
}

impl CacheStats {
    /// The look-ups by layer and result.
    pub(crate) fn lookups(&self) -> [(&'static str, &'static str, u64); 10] {
        [
            ("memory", "hit", self.memory_hits.get()),
            ("memory", "miss", self.memory_misses.get()),
            ("memory", "referred", self.memory_referred.get()),
            ("memory", "unsure", self.unsure.get()),
            ("redis", "hit", self.redis_hits.get()),
            ("redis", "miss", self.redis_misses.get()),
            ("redis", "invalid", self.redis_invalid.get()),
            ("redis", "error", self.redis_errors.get()),
            ("redis", "skipped", self.redis_skipped.get()),
            ("redis", "unasked", self.redis_unasked.get()),
        ]
    }

    /// The values that were not believed, by reason.
    pub(crate) fn refused(&self) -> [(&'static str, u64); 4] {
        [
            ("malformed", self.redis_invalid_malformed.get()),
            ("unverified", self.redis_invalid_unverified.get()),
            ("version", self.redis_invalid_version.get()),
            ("void", self.voided.get()),
        ]
    }
}
