//! The named cases of `docs/faults.md`, against the built program on each ledger.

mod application;
mod bodies;
mod cache;
mod callers;
mod cleanup;
mod fake_redis;
mod holders;
mod input;
mod outages;
mod processes;
mod replays;
mod replies;
mod states;

use anyhow::{Context as _, Result};
use oncegate_api::v1::{
    CheckAndLockRequest, CheckAndLockResponse, EventHistory, EventKey, HistoryRequest, MarkCompletedRequest,
    ResolveRequest, State, idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::{
    http_client,
    program::{Oncegate, Running},
};
use std::net::SocketAddr;
use tempfile::TempDir;
use tonic::{Status, transport::Channel};

use crate::setup::Ledger;

pub(crate) type Client = IdempotencyServiceClient<Channel>;

/// A sidecar as a process of its own.
pub(crate) struct Sidecar {
    pub(crate) program: Running,
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    directory: TempDir,
    ledger: Ledger,
}

impl Sidecar {
    pub(crate) async fn start(ledger: Ledger) -> Result<Self> {
        Self::start_with(ledger, |command| command).await
    }

    pub(crate) async fn start_with(ledger: Ledger, settings: impl FnOnce(Oncegate) -> Oncegate) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let program = settings(command(&directory, &ledger)?).start()?;
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut sidecar = Self { program, address: nowhere, admin: nowhere, directory, ledger };
        sidecar.find().await?;
        Ok(sidecar)
    }

    /// Kills it, and starts it again on the same store.
    pub(crate) async fn crash(&mut self) -> Result<()> {
        self.program.kill().await?;
        self.restart_with(|command| command).await
    }

    /// Starts it again on the same store, after it has been killed.
    pub(crate) async fn restart_with(&mut self, settings: impl FnOnce(Oncegate) -> Oncegate) -> Result<()> {
        self.program = settings(command(&self.directory, &self.ledger)?).start()?;
        self.find().await
    }

    async fn find(&mut self) -> Result<()> {
        self.address = self.program.address("sidecar").await?;
        self.admin = self.program.address("admin").await?;
        Ok(())
    }

    pub(crate) async fn client(&self) -> Result<Client> {
        client(self.address).await
    }

    /// The one value of a query by a connection that the product knows nothing of; SQL that both ledgers understand.
    pub(crate) async fn outside(&self, sql: &str) -> Result<String> {
        match &self.ledger {
            Ledger::Postgres(database) => database.query(sql).await,
            Ledger::Sqlite => {
                let shell = rusqlite::Connection::open(self.store())?;
                shell.busy_timeout(std::time::Duration::from_secs(5))?;
                Ok(shell.query_row(&format!("select cast(({sql}) as text)"), [], |row| row.get(0))?)
            }
        }
    }

    /// Where the embedded store is.
    pub(crate) fn store(&self) -> std::path::PathBuf {
        self.directory.path().join("oncegate.db")
    }

    pub(crate) fn database(&self) -> Option<&oncegate_e2e::postgres::Database> {
        match &self.ledger {
            Ledger::Postgres(database) => Some(database),
            Ledger::Sqlite => None,
        }
    }
}

fn command(directory: &TempDir, ledger: &Ledger) -> Result<Oncegate> {
    let command = Oncegate::new(directory.path(), ["sidecar"])?
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .env("ADMIN_LISTEN", "127.0.0.1:0");
    Ok(ledger.configure(command))
}

pub(crate) async fn client(address: SocketAddr) -> Result<Client> {
    Ok(IdempotencyServiceClient::connect(format!("http://{address}")).await?)
}

/// A number of the sidecar's metrics.
pub(crate) async fn metric(sidecar: &Sidecar, name: &str) -> Result<u64> {
    metric_at(sidecar.admin, name).await
}

/// One sample of a process's metrics.
pub(crate) async fn metric_at(admin: SocketAddr, name: &str) -> Result<u64> {
    let page = http_client::get(admin, "/metrics").await?;
    let page = String::from_utf8_lossy(&page.body).into_owned();
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(str::to_owned);
    Ok(line.with_context(|| format!("no {name} in\n{page}"))?.parse()?)
}

pub(crate) fn key(event_id: &str) -> Option<EventKey> {
    Some(EventKey { provider: "stripe".into(), event_id: event_id.into(), ..Default::default() })
}

pub(crate) fn claim(event_id: &str, claim_id: &str) -> CheckAndLockRequest {
    CheckAndLockRequest {
        key: key(event_id),
        event_type: "charge.succeeded".into(),
        claim_id: claim_id.into(),
        ..Default::default()
    }
}

pub(crate) fn completion(event_id: &str, fencing_token: i64) -> MarkCompletedRequest {
    MarkCompletedRequest { key: key(event_id), fencing_token, ..Default::default() }
}

/// Of a completed event, by force.
pub(crate) fn replay(event_id: &str) -> ResolveRequest {
    ResolveRequest {
        key: key(event_id),
        to: State::Pending.into(),
        force: true,
        reason: "asked to".into(),
        actor: "amara".into(),
        ..Default::default()
    }
}

pub(crate) async fn ask(client: &Client, request: CheckAndLockRequest) -> Result<CheckAndLockResponse, Status> {
    Ok(client.clone().check_and_lock(request).await?.into_inner())
}

pub(crate) async fn history(client: &Client, event_id: &str) -> Result<Option<EventHistory>, Status> {
    let request = HistoryRequest { key: key(event_id), ..Default::default() };
    match client.clone().history(request).await {
        Ok(response) => Ok(response.into_inner().events.into_iter().next()),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}
