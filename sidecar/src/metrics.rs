//! The sidecar's metrics in Prometheus' text form. Every name, label and unit stands here.

use std::fmt::Write as _;

use crate::cache::stats::CacheStats;

/// The cache's look-ups by layer and result, and the writes that were lost.
pub(crate) fn render(cache: &CacheStats) -> String {
    let mut text = String::new();
    text.push_str("# HELP oncegate_cache_lookups_total Look-ups of completed events, by layer and result.\n");
    text.push_str("# TYPE oncegate_cache_lookups_total counter\n");
    for (layer, result, count) in [
        ("memory", "hit", &cache.memory_hits),
        ("memory", "miss", &cache.memory_misses),
        ("redis", "hit", &cache.redis_hits),
        ("redis", "miss", &cache.redis_misses),
        ("redis", "invalid", &cache.redis_invalid),
        ("redis", "error", &cache.redis_errors),
        ("redis", "skipped", &cache.redis_skipped),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "oncegate_cache_lookups_total{{layer=\"{layer}\",result=\"{result}\"}} {}", count.get());
    }
    text.push_str("# HELP oncegate_cache_writes_lost_total Entries that did not get into Redis.\n");
    text.push_str("# TYPE oncegate_cache_writes_lost_total counter\n");
    let _ = writeln!(text, "oncegate_cache_writes_lost_total {}", cache.redis_writes_lost.get());
    text
}
