//! Watches whether the ledger answers, for `grpc.health.v1`.
//!
//! The service stays ready while Postgres is down: it answers, with UNAVAILABLE, and taking every pod out of the load
//! balancer at once would only replace a clear answer with a refused connection (W23). Health tells the truth to those
//! who ask for the service by name.

use std::{sync::Arc, time::Duration};

use oncegate_api::v1::idempotency_service_server::SERVICE_NAME;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::ledger::Ledger;

const INTERVAL: Duration = Duration::from_secs(2);

/// Reports until `shutdown`, then reports not serving.
pub async fn run(ledger: Arc<dyn Ledger>, health: HealthReporter, shutdown: CancellationToken) {
    let mut serving: Option<bool> = None;
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = shutdown.cancelled() => break,
        }
        let answers = tokio::select! {
            checked = ledger.check() => checked.is_ok(),
            () = shutdown.cancelled() => break,
        };
        if serving != Some(answers) {
            match (serving, answers) {
                (_, false) => tracing::warn!("the ledger does not answer"),
                (Some(_), true) => tracing::info!("the ledger answers again"),
                (None, true) => {}
            }
            serving = Some(answers);
            set(&health, answers).await;
        }
    }
    set(&health, false).await;
    // Ends open Watch streams, each of which would hold up the drain until its time limit. They have been told.
    let mut health = health;
    health.clear_service_status("").await;
    health.clear_service_status(SERVICE_NAME).await;
}

/// Sets the answer for the API, and for the whole server, which has the empty name.
async fn set(health: &HealthReporter, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    health.set_service_status("", status).await;
    health.set_service_status(SERVICE_NAME, status).await;
}
