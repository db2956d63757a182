//! What the people who run it see: metrics with a real Prometheus, traces with a collector, logs, alerts and dashboards.

mod access_lines;
mod alerts;
mod environment;
mod metrics;
mod scrape;
mod series;
mod traces;

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Result;
use oncegate_api::v1::idempotency_service_client::IdempotencyServiceClient;
use oncegate_e2e::{
    eventually,
    http_client::{self, Answer},
    postgres::Database,
    program::{Oncegate, Running},
    stripe,
    upstream::Upstream,
};
use oncegate_runtime::metrics::Family;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::setup::{SECRET, STRIPE};

/// A sidecar and a gateway, as processes of their own, with an application behind them.
struct Services {
    upstream: Upstream,
    sidecar: Running,
    gateway: Running,
    address: SocketAddr,
    sidecar_address: SocketAddr,
    sidecar_admin: SocketAddr,
    gateway_admin: SocketAddr,
    _directory: TempDir,
    database: Database,
}

impl Services {
    async fn client(&self) -> Result<IdempotencyServiceClient<Channel>> {
        Ok(IdempotencyServiceClient::connect(format!("http://{}", self.sidecar_address)).await?)
    }

    /// Both with these settings as well.
    async fn start(settings: &[(&str, &str)]) -> Result<Self> {
        let database = Database::create().await?;
        let upstream = Upstream::start().await?;
        let directory = tempfile::tempdir()?;
        let command = |name| -> Result<Oncegate> {
            let command = Oncegate::new(directory.path(), [name])?.env("ADMIN_LISTEN", "127.0.0.1:0");
            Ok(settings.iter().fold(command, |command, (name, value)| command.env(name, value)))
        };
        let mut sidecar = command("sidecar")?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("DATABASE_URL", database.url())
            .env("COUNT_INTERVAL", "200ms")
            .start()?;
        let sidecar_address = sidecar.address("sidecar").await?;
        let mut gateway = command("gateway")?
            .env("GATEWAY_LISTEN", "127.0.0.1:0")
            .env("SIDECAR_URL", format!("http://{sidecar_address}"))
            .env("UPSTREAM_URL", upstream.url())
            .env("STRIPE_WEBHOOK_SECRET", format!("whsec_the_one_before,{SECRET}"))
            .start()?;
        let sidecar_admin = sidecar.address("admin").await?;
        eventually("the events are counted, and no row is missing any more", async || {
            page(sidecar_admin).await.ok()?.contains("oncegate_events{").then_some(())
        })
        .await;
        Ok(Self {
            address: gateway.address("gateway").await?,
            sidecar_admin,
            gateway_admin: gateway.address("admin").await?,
            upstream,
            sidecar,
            gateway,
            sidecar_address,
            _directory: directory,
            database,
        })
    }

    async fn send(&self, body: &[u8], headers: &[(&str, &str)]) -> Result<Answer> {
        let signature = stripe::sign(SECRET, body);
        let mut all = vec![(stripe::HEADER, signature.as_str()), ("content-type", "application/json")];
        all.extend_from_slice(headers);
        http_client::post(self.address, STRIPE, &all, body.to_vec()).await
    }
}

/// The page of an admin listener.
async fn page(admin: SocketAddr) -> Result<String> {
    let answer = http_client::get(admin, "/metrics").await?;
    Ok(String::from_utf8(answer.body.to_vec())?)
}

/// The sum of all rows of a metric that have these labels.
fn sum(page: &str, name: &str, labels: &[&str]) -> f64 {
    page.lines()
        .filter_map(|line| {
            let (row, value) = line.rsplit_once(' ')?;
            let (found, rest) = row.split_once('{').unwrap_or((row, ""));
            let wanted = found == name && labels.iter().all(|label| rest.contains(label));
            wanted.then(|| value.parse::<f64>().unwrap_or(f64::NAN))
        })
        .sum()
}

/// A file of the repository.
fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn sidecar_families() -> impl Iterator<Item = &'static Family> {
    oncegate_sidecar::metrics::FAMILIES.iter().copied().flatten().copied()
}

fn gateway_families() -> impl Iterator<Item = &'static Family> {
    let own = oncegate_gateway::metrics::FAMILIES.iter().copied();
    own.chain(oncegate_gateway::metrics::POOL_FAMILIES.iter().copied())
}

fn process_families() -> impl Iterator<Item = &'static Family> {
    let certificates = oncegate_runtime::metrics::certificates::FAMILIES.iter().copied();
    oncegate_runtime::metrics::process::FAMILIES.iter().copied().chain(certificates)
}

fn all_families() -> impl Iterator<Item = &'static Family> {
    process_families().chain(sidecar_families()).chain(gateway_families())
}
