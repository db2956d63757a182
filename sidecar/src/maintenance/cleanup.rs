//! Cleanup: bounded steps over the events in order of creation. Safe when two run at once and when one is killed: each step is
//! one transaction, and the next run finds whatever is left. Its pace adapts to the calls (`pace`).

use std::{
    future::Future,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::{
    coordinator::Coordinator,
    ledger::{
        Error,
        filter::{CleanupProgress, CleanupScope},
        load::Seen,
    },
    maintenance::pace::Pace,
};

/// Progress is reported no more often than this.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);
/// How often a step is tried again when the ledger does not answer, before the run ends.
const TRIES_MAX: u32 = 5;

/// What a run reports.
pub enum Update<'a> {
    /// Totals so far; `done` on the last.
    Progress(&'a CleanupProgress),
    /// The run ended early. What was deleted stays deleted.
    Failed(Error),
}

/// How a run ended.
#[derive(Clone, Debug)]
pub enum End {
    /// Nothing is left to examine.
    Done,
    /// Nobody was listening any more.
    CallerGone,
    /// The service is shutting down.
    Stopping,
    /// The ledger failed.
    Failed(Error),
}

/// Runs a Cleanup to its end, or until `tell` says that nobody is listening or the service shuts down: the next run finds
/// whatever is left. Returns the totals of what it did.
pub async fn run<F, T>(coordinator: &Coordinator, scope: &CleanupScope, mut tell: F) -> (CleanupProgress, End)
where
    F: FnMut(Update<'_>) -> T,
    T: Future<Output = bool>,
{
    let mut progress = CleanupProgress::default();
    let mut told = Instant::now();
    let mut tries = 0;
    let load = coordinator.ledger().load();
    let mut pace = Pace::new(scope.dry_run);
    let mut seen = Seen::default();
    if let Some(load) = &load {
        // Measure from here on.
        load.look(&mut seen);
    }
    loop {
        let begun = Instant::now();
        let stepped = {
            let _step = load.as_ref().map(|load| load.step());
            coordinator.ledger().cleanup_step(scope, &mut progress).await
        };
        let step = begun.elapsed();
        match stepped {
            Ok(()) => tries = 0,
            Err(error @ (Error::Unavailable { .. } | Error::Overloaded { .. } | Error::OutcomeUnknown))
                if tries < TRIES_MAX =>
            {
                tries += 1;
                tracing::warn!(error = &error as &dyn std::error::Error, tries, "a step of the cleanup is tried again");
                rest(Duration::from_millis(200) * tries, coordinator.closing()).await;
                if !coordinator.closing().is_cancelled() {
                    continue;
                }
            }
            Err(error) => {
                tell(Update::Failed(error.clone())).await;
                return (progress, End::Failed(error));
            }
        }
        if progress.done || told.elapsed() >= REPORT_INTERVAL {
            told = Instant::now();
            if !tell(Update::Progress(&progress)).await {
                return (progress, End::CallerGone);
            }
        }
        if progress.done {
            return (progress, End::Done);
        }
        if coordinator.closing().is_cancelled() {
            tell(Update::Failed(Error::unavailable())).await;
            return (progress, End::Stopping);
        }
        // The foreground goes first.
        match load.as_ref().map_or(Duration::ZERO, |load| pace.after(step, load.look(&mut seen))) {
            Duration::ZERO => tokio::task::yield_now().await,
            pause => rest(pause, coordinator.closing()).await,
        }
    }
}

async fn rest(pause: Duration, closing: &CancellationToken) {
    drop(tokio::time::timeout(pause, closing.cancelled()).await);
}
