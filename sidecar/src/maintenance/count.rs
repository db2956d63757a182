//! Counts the events for the metrics at intervals, never per scrape: there may be any number of scrapes.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    ledger::{Ledger, filter::StatsFilter},
    metrics::Metrics,
};

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
    // The gauges report no times. With timings, each sidecar would read all stored histograms for nothing.
    let everything = StatsFilter {
        tenant: None,
        provider: None,
        start_time: None,
        end_time: None,
        bucket: None,
        buckets_max: 0,
        counts_max: 1,
        by_provider: false,
        timings: false,
    };
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let report = tokio::select! {
            report = ledger.stats(everything.clone()) => report,
            () = shutdown.cancelled() => return,
        };
        match report {
            Ok(report) => metrics.counted(&report),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the events could not be counted");
            }
        }
    }
}
