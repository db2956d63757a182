//! `oncegate gateway`.

use anyhow::Context as _;
use oncegate_runtime::config::Problems;

use crate::{
    failure::Failure,
    service::{AdminOptions, Service, log_gateway},
    threads::ThreadOptions,
};

/// Take webhooks, and deliver each event once
///
/// Verifies signatures, asks the sidecar for the lock, delivers the event to the application at UPSTREAM_URL, and
/// answers the provider. Serves until SIGTERM or SIGINT, then finishes the deliveries under way and exits with 0.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  UPSTREAM_URL=http://127.0.0.1:3000/payments STRIPE_WEBHOOK_SECRET=whsec_... oncegate gateway
  oncegate gateway --upstream-url http://app:3000/payments --stripe-webhook-secret-file /run/secrets/stripe")]
pub(crate) struct Gateway {
    #[command(flatten)]
    gateway: oncegate_gateway::config::Options,

    #[command(flatten)]
    pub(crate) threads: ThreadOptions,

    #[command(flatten)]
    admin: AdminOptions,

    #[command(flatten)]
    pub(crate) telemetry: oncegate_runtime::telemetry::Options,
}

impl Gateway {
    /// Everything that is wrong with its settings.
    pub(crate) fn problems(&self) -> Option<Problems> {
        self.gateway.clone().validate().err()
    }

    pub(crate) async fn run(self) -> Result<(), Failure> {
        let settings = self.gateway.validate()?;
        let service = Service::begin(&self.admin).await?;
        let channel = oncegate_gateway::sidecar::channel(&settings);
        let (sidecars, certificates) = (channel.metrics(), channel.certificates());
        let gateway = oncegate_gateway::Gateway::bind(settings, channel).await?;
        service.show([gateway.metrics(), sidecars], [gateway.certificates(), certificates]);
        service.control(gateway.control());
        log_gateway(&gateway);
        let shutdown = service.ready();
        gateway.run(shutdown).await.context("the gateway failed")?;
        service.end().await;
        Ok(())
    }
}
