//! Does the maintenance that the ledger needs each second to keep its queries
//! quick.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::ledger::Ledger;

const INTERVAL: Duration = Duration::from_secs(1);

/// Works until `shutdown`.
pub async fn run(ledger: Arc<dyn Ledger>, shutdown: CancellationToken) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let maintained = tokio::select! {
            maintained = ledger.maintain() => maintained,
            () = shutdown.cancelled() => return,
        };
        if let Err(error) = maintained {
            // An outage is reported elsewhere, and the next second tries again.
            tracing::debug!(error = &error as &dyn std::error::Error, "the ledger could not be maintained");
        }
    }
}
