//! `oncegate sidecar`.

use anyhow::Context as _;
use oncegate_runtime::config::Problems;

use crate::{
    failure::Failure,
    service::{AdminOptions, Service, log_sidecar},
    threads::ThreadOptions,
};

/// Serve the gRPC API: who may process an event, and how it ended
///
/// Uses the Postgres database that DATABASE_URL names, or ./oncegate.db where none is named. Serves until SIGTERM or
/// SIGINT, then finishes the calls under way and exits with 0.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate sidecar
  DATABASE_URL=postgres://oncegate@db.example.com/payments ADMIN_LISTEN=0.0.0.0:9090 oncegate sidecar")]
pub(crate) struct Sidecar {
    #[command(flatten)]
    sidecar: oncegate_sidecar::config::Options,

    #[command(flatten)]
    pub(crate) threads: ThreadOptions,

    #[command(flatten)]
    admin: AdminOptions,

    #[command(flatten)]
    pub(crate) telemetry: oncegate_runtime::telemetry::Options,
}

impl Sidecar {
    /// Everything that is wrong with its settings.
    pub(crate) fn problems(&self) -> Option<Problems> {
        self.sidecar.clone().validate().err()
    }

    pub(crate) async fn run(self) -> Result<(), Failure> {
        let settings = self.sidecar.validate()?;
        let service = Service::begin(&self.admin).await?;
        let Some(sidecar) = service.start(oncegate_sidecar::Sidecar::start(settings)).await else {
            service.end().await;
            return Ok(());
        };
        let sidecar = sidecar?;
        log_sidecar(&sidecar);
        service.show([sidecar.metrics()], [sidecar.certificates()]);
        service.tell(sidecar.facts());
        let shutdown = service.ready();
        let ended = sidecar.run(shutdown).await;
        service.end().await;
        Ok(ended.context("the sidecar failed")?)
    }
}
