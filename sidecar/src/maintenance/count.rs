//! Counts the events for the metrics at intervals, never per scrape: there may be any number of scrapes.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;

use crate::{
    event::{Micros, Time},
    ledger::{Ledger, filter::StatsFilter},
    metrics::Metrics,
};

/// How old an event has to be for no provider to deliver it again by itself: they give up after three days at most, and a day is
/// for those that delivered late (`docs/providers.md`).
const ABANDONED_AFTER: Duration = Duration::from_secs(4 * 24 * 3_600);

/// Everything in two buckets: what is that old, from time 0 on, and what is younger, from the hour that is given with it. The
/// gauges report no times; with timings, each sidecar would read all stored histograms for nothing.
fn everything(now: SystemTime) -> (StatsFilter, Time) {
    let old = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().saturating_sub(ABANDONED_AFTER);
    let hours = i64::try_from(old.as_secs() / 3_600).unwrap_or(i64::MAX).clamp(1, 1_000_000_000);
    let young = Time(hours * Micros::HOUR.0);
    let filter = StatsFilter {
        tenant: None,
        provider: None,
        start_time: None,
        end_time: None,
        bucket: Some(Micros(young.0)),
        buckets_max: i64::MAX,
        counts_max: usize::MAX,
        by_provider: false,
        timings: false,
    };
    (filter, young)
}

/// Counts every `interval` until `shutdown`. If counting fails, the last count stays; the metrics say how old it
/// is.
pub(crate) async fn run(
    ledger: Arc<dyn Ledger>,
    metrics: Arc<Metrics>,
    interval: Duration,
    shutdown: CancellationToken,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let (everything, young) = everything(SystemTime::now());
        let report = tokio::select! {
            report = ledger.stats(everything) => report,
            () = shutdown.cancelled() => return,
        };
        match report {
            Ok(report) => metrics.counted(&report, young),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the events could not be counted");
            }
        }
    }
}
