//! Reads which events were replayed, for the cache (C7).

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{cache::Cache, ledger::Ledger};

/// Several times within [`BEHIND_MAX`](crate::cache::BEHIND_MAX): one read may be slow or fail.
const INTERVAL: Duration = Duration::from_millis(500);

/// Reads until `closing`: immediately after the ledger has reconnected, because the cache does not answer before that.
pub(super) async fn follow(ledger: Arc<dyn Ledger>, cache: Arc<Cache>, closing: CancellationToken) {
    let mut standing = ledger.standing();
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        let alive = tokio::select! {
            _ = interval.tick() => true,
            changed = standing.changed() => changed.is_ok(),
            () = closing.cancelled() => false,
        };
        if !alive {
            return;
        }
        let Some(reading) = cache.reading() else { continue };
        let read = tokio::select! {
            read = ledger.replays(reading.standing(), reading.after()) => read,
            () = closing.cancelled() => return,
        };
        match read {
            Ok(replayed) => {
                cache.read(&reading, replayed);
                if std::mem::take(&mut failing) {
                    tracing::info!("it is known again what was replayed, and the cache answers");
                }
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(
                        error,
                        "what was replayed cannot be read; duplicates are answered by the ledger meanwhile"
                    );
                }
            }
        }
    }
}
