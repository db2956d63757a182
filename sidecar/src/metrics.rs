//! The sidecar's metrics in Prometheus' text form. Every name, label and unit stands here.

use std::fmt::Write as _;

use oncegate_runtime::reload::Counts;

use crate::cache::stats::{CacheStats, Counter};

/// What the API counts.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Keys of completions' metadata that were left out: too large, or no JSON.
    pub(crate) metadata_left_out: Counter,
    /// Calls that came with another payload digest than the event's latest attempt.
    pub(crate) payload_changes: Counter,
    /// Calls without credentials that are known.
    pub(crate) unauthenticated: Counter,
    /// Calls of somebody known that the role or the tenant does not permit.
    pub(crate) permission_denied: Counter,
    /// Calls beyond a tenant's quota.
    pub(crate) quota_exceeded: Counter,
}

/// Everything that is counted.
pub(crate) fn render(metrics: &Metrics, cache: &CacheStats) -> String {
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
        ("redis", "unasked", &cache.redis_unasked),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "oncegate_cache_lookups_total{{layer=\"{layer}\",result=\"{result}\"}} {}", count.get());
    }
    text.push_str("# HELP oncegate_cache_refused_total Values in Redis that were not believed, by reason.\n");
    text.push_str("# TYPE oncegate_cache_refused_total counter\n");
    for (reason, count) in [
        ("malformed", &cache.redis_invalid_malformed),
        ("unverified", &cache.redis_invalid_unverified),
        ("version", &cache.redis_invalid_version),
        ("void", &cache.redis_voided),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "oncegate_cache_refused_total{{reason=\"{reason}\"}} {}", count.get());
    }
    text.push_str("# HELP oncegate_cache_writes_lost_total Entries that did not get into Redis.\n");
    text.push_str("# TYPE oncegate_cache_writes_lost_total counter\n");
    let _ = writeln!(text, "oncegate_cache_writes_lost_total {}", cache.redis_writes_lost.get());
    for (name, help, count) in [
        (
            "oncegate_metadata_keys_left_out_total",
            "Keys of completions' metadata that were not kept: too large, or no JSON.",
            &metrics.metadata_left_out,
        ),
        (
            "oncegate_payload_changes_total",
            "Calls on a known event with another payload than its latest attempt's.",
            &metrics.payload_changes,
        ),
        (
            "oncegate_calls_unauthenticated_total",
            "Calls that were denied for want of credentials that are known.",
            &metrics.unauthenticated,
        ),
        (
            "oncegate_calls_permission_denied_total",
            "Calls that were denied because the caller's role or tenants do not permit them.",
            &metrics.permission_denied,
        ),
        ("oncegate_calls_over_quota_total", "Calls beyond their tenant's quota.", &metrics.quota_exceeded),
    ] {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {}", count.get());
    }
    text
}

/// Files that were read again when they changed: `None` where there are none.
pub(crate) fn render_reloads<const N: usize>(text: &mut String, files: [(&str, Option<Counts>); N]) {
    text.push_str(
        "# HELP oncegate_sidecar_reloads_total Files that changed: replaced, or failed and the old content kept.\n",
    );
    text.push_str("# TYPE oncegate_sidecar_reloads_total counter\n");
    for (name, counts) in files {
        let Some(counts) = counts else { continue };
        for (result, count) in [("replaced", counts.replaced), ("failed", counts.failed)] {
            let _ = writeln!(text, "oncegate_sidecar_reloads_total{{files=\"{name}\",result=\"{result}\"}} {count}");
        }
    }
}
