//! `oncegate all`.

use anyhow::Context as _;
use oncegate_gateway::{
    config::SIDECAR_URL_DEFAULT,
    sidecar::{Connection, Question, Reach},
};
use oncegate_runtime::{config::Problems, server::Address, shutdown::CancellationToken};
use oncegate_sidecar::event::Payload;

use crate::{
    failure::Failure,
    service::{AdminOptions, Service, log_gateway, log_sidecar},
    threads::ThreadOptions,
};

/// Serve both, in one process, for a single machine
///
/// The gateway calls the sidecar in its own process, with no socket between; the sidecar listens as well, for services
/// that call it themselves. Serves until SIGTERM or SIGINT, then finishes the deliveries under way and exits with 0.
///
/// So the settings of the way to a sidecar are checked and not used: SIDECAR_URL, SIDECAR_CA_FILE, SIDECAR_CLIENT_CERT_FILE,
/// SIDECAR_CLIENT_KEY_FILE, SIDECAR_TOKEN, SIDECAR_TOKEN_FILE, SIDECAR_INSECURE, SIDECAR_RESOLVE_INTERVAL and
/// SIDECAR_CONNECT_TIMEOUT. They may be there for the commands that ask a sidecar; a warning says so where SIDECAR_URL leads
/// elsewhere. Machines that are to share their events need one database (DATABASE_URL), or `oncegate gateway` on each and a
/// sidecar for all.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  UPSTREAM_URL=http://127.0.0.1:3000/payments STRIPE_WEBHOOK_SECRET=whsec_... oncegate all
  DATABASE_URL=postgres://oncegate@127.0.0.1/payments oncegate all --upstream-url http://127.0.0.1:3000/payments \\
      --stripe-webhook-secret-file /run/secrets/stripe")]
pub(crate) struct All {
    #[command(flatten)]
    sidecar: oncegate_sidecar::config::Options,

    #[command(flatten)]
    gateway: oncegate_gateway::config::Options,

    #[command(flatten)]
    pub(crate) threads: ThreadOptions,

    #[command(flatten)]
    admin: AdminOptions,

    #[command(flatten)]
    pub(crate) telemetry: oncegate_runtime::telemetry::Options,
}

impl All {
    /// Everything that is wrong with its settings.
    pub(crate) fn problems(&self) -> Option<Problems> {
        both(self.sidecar.clone().validate(), self.gateway.clone().validate()).err()
    }

    pub(crate) async fn run(self) -> Result<(), Failure> {
        let sidecar_url = self.gateway.sidecar_url.clone();
        let (sidecar, gateway) = both(self.sidecar.validate(), self.gateway.validate())?;
        let service = Service::begin(&self.admin).await?;
        let Some(sidecar) = service.start(oncegate_sidecar::Sidecar::start(sidecar)).await else {
            service.end().await;
            return Ok(());
        };
        let sidecar = sidecar?;
        if is_elsewhere(&sidecar_url, &gateway.sidecar, sidecar.local_addr()) {
            tracing::warn!(
                sidecar_url,
                "SIDECAR_URL is set and not used: the gateway calls the sidecar in its own process, and no other; to \
                 share events with other machines takes one database, see DATABASE_URL"
            );
        }
        let gateway = oncegate_gateway::Gateway::bind(gateway, within(&sidecar)).await?;
        log_sidecar(&sidecar);
        service.tell(sidecar.facts());
        service.show([sidecar.metrics(), gateway.metrics()], [sidecar.certificates(), gateway.certificates()]);
        service.control(gateway.control());
        log_gateway(&gateway);
        let shutdown = service.ready();
        serve_both(sidecar, gateway, shutdown).await?;
        service.end().await;
        Ok(())
    }
}

/// Whether somebody seems to believe that another sidecar is called than the own one.
fn is_elsewhere(url: &str, reach: &Reach, own: Option<&Address>) -> bool {
    url != SIDECAR_URL_DEFAULT && !own.is_some_and(|own| reach.is_at(own))
}

/// How a gateway reaches a sidecar in the same process.
pub(crate) fn within(sidecar: &oncegate_sidecar::Sidecar) -> Connection {
    let (service, api) = (sidecar.api(), sidecar.api());
    Connection::within(service, move |Question { tenant, provider, event_id, payload, payload_digest }| {
        api.is_duplicate(tenant, provider, event_id, Payload { bytes: payload, digest: payload_digest })
    })
}

/// The settings of both, or the problems of both.
pub(crate) fn both<A, B>(a: Result<A, Problems>, b: Result<B, Problems>) -> Result<(A, B), Problems> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(problems), Ok(_)) | (Ok(_), Err(problems)) => Err(problems),
        (Err(a), Err(b)) => Err(a.and(b)),
    }
}

/// Serves until `shutdown`. The gateway drains first, since its deliveries end with calls to the sidecar.
pub(crate) async fn serve_both(
    sidecar: oncegate_sidecar::Sidecar,
    gateway: oncegate_gateway::Gateway,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let sidecar_stop = CancellationToken::new();
    let mut sidecar = tokio::spawn(sidecar.run(sidecar_stop.clone()));
    let gateway_stop = shutdown.child_token();
    let mut gateway = std::pin::pin!(gateway.run(gateway_stop.clone()));
    let gateway = tokio::select! {
        ended = &mut gateway => ended,
        // Without a sidecar there is nothing to serve with: the gateway ends too.
        ended = &mut sidecar => {
            gateway_stop.cancel();
            // Only the reason why the sidecar ended matters.
            let _ = gateway.await;
            ended.context("the sidecar failed")?.context("the sidecar failed")?;
            anyhow::bail!("the sidecar ended by itself");
        }
    };
    sidecar_stop.cancel();
    sidecar.await.context("the sidecar failed")?.context("the sidecar failed")?;
    gateway.context("the gateway failed")
}

#[cfg(test)]
mod tests {
    use oncegate_gateway::config::Options;

    use super::*;

    #[test]
    fn a_sidecar_is_elsewhere_unless_it_is_the_default_or_the_own_one() {
        let is_elsewhere = |url: &str, own: Option<&str>| {
            let options = Options {
                sidecar_url: url.into(),
                upstream_url: Some("http://127.0.0.1:3000".into()),
                stripe_webhook_secret: Some("whsec_test".into()),
                ..Options::default()
            };
            let own = own.map(|own| own.parse().unwrap());
            super::is_elsewhere(url, &options.validate().unwrap().sidecar, own.as_ref())
        };
        for own in [Some("127.0.0.1:50051"), Some("127.0.0.1:1"), Some("unix:/run/s.sock"), None] {
            assert!(!is_elsewhere(SIDECAR_URL_DEFAULT, own), "{own:?}");
            assert!(is_elsewhere("https://sidecar.payments:50051", own), "{own:?}");
        }
        assert!(!is_elsewhere("https://localhost:1", Some("127.0.0.1:1")));
        assert!(!is_elsewhere("unix:/run/s.sock", Some("unix:/run/s.sock")));
        assert!(is_elsewhere("http://127.0.0.1:1", Some("127.0.0.1:2")));
        assert!(is_elsewhere("http://127.0.0.1:1,http://sidecar:1", Some("127.0.0.1:1")), "not all of it is here");
    }
}
