//! Counts the events for the metrics at intervals, never per scrape: there may be any number of scrapes.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    event::{Micros, Time},
    ledger::{Ledger, filter::StatsFilter},
    metrics::Metrics,
};

/// How old an event has to be for no provider to deliver it again by itself: they give up after three days at most, and a day is
/// for those that delivered late (`docs/providers.md`).
const ABANDONED_AFTER: Micros = Micros(4 * Micros::DAY.0);

/// Everything in two buckets: what is that old at the database's time, from time 0 on, and what is younger, from the hour that is
/// given with it. The gauges report no times; with timings, each sidecar would read all stored histograms for nothing.
fn everything(now: Time) -> (StatsFilter, Time) {
    let young = now.minus(ABANDONED_AFTER).hour().max(Time(Micros::HOUR.0));
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
    // The database's. Before it is known, what is counted tells it and nothing else.
    let mut now: Option<Time> = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let (everything, young) = everything(now.unwrap_or(Time(0)));
        let report = tokio::select! {
            report = ledger.stats(everything) => report,
            () = shutdown.cancelled() => return,
        };
        match report {
            Ok(report) => {
                if now.replace(report.as_of).is_some() {
                    metrics.counted(&report, young);
                } else {
                    ticks.reset_immediately();
                }
            }
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the events could not be counted");
            }
        }
    }
}
