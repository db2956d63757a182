//! What the tests of the whole program start from: `oncegate all` on either ledger, an application behind it.

use std::net::SocketAddr;

use anyhow::Result;
use oncegate_api::v1::{EventHistory, EventKey, HistoryRequest, idempotency_service_client::IdempotencyServiceClient};
use oncegate_e2e::{
    http_client::{self, Answer},
    postgres::Database,
    program::{Oncegate, Running},
    stripe,
    upstream::Upstream,
};
use tempfile::TempDir;
use tonic::transport::Channel;

/// Where the gateway takes Stripe's webhooks.
pub(crate) const STRIPE: &str = "/webhooks/payments/stripe";

/// The secret that they are signed with.
pub(crate) const SECRET: &str = "whsec_of_the_end_to_end_tests";

/// The store that a test runs on.
#[derive(Debug)]
pub(crate) enum Ledger {
    /// The embedded one, in the directory that the program runs in.
    Sqlite,
    /// A database of the test's own.
    Postgres(Database),
}

impl Ledger {
    pub(crate) async fn postgres() -> Result<Self> {
        Ok(Self::Postgres(Database::create().await?))
    }

    /// The command with the settings that make it use this store.
    pub(crate) fn configure(&self, command: Oncegate) -> Oncegate {
        match self {
            Self::Sqlite => command,
            Self::Postgres(database) => command.env("DATABASE_URL", database.url()),
        }
    }
}

/// Makes one test for each ledger of a function that takes one.
macro_rules! on_each_ledger {
    ($($test:ident),+ $(,)?) => {
        $(
            mod $test {
                #[tokio::test]
                async fn on_sqlite() -> anyhow::Result<()> {
                    super::$test($crate::setup::Ledger::Sqlite).await
                }

                #[tokio::test]
                async fn on_postgres() -> anyhow::Result<()> {
                    super::$test($crate::setup::Ledger::postgres().await?).await
                }
            }
        )+
    };
}
pub(crate) use on_each_ledger;

/// `oncegate all` and the application behind it.
#[derive(Debug)]
pub(crate) struct Everything {
    pub(crate) upstream: Upstream,
    pub(crate) program: Running,
    pub(crate) gateway: SocketAddr,
    pub(crate) sidecar: SocketAddr,
    pub(crate) admin: SocketAddr,
    // Ends after the program that uses them.
    pub(crate) directory: TempDir,
    ledger: Ledger,
    settings: Vec<(&'static str, &'static str)>,
}

impl Everything {
    pub(crate) async fn start(ledger: Ledger) -> Result<Self> {
        Self::start_with(ledger, &[]).await
    }

    /// With settings beside those that every test has.
    pub(crate) async fn start_with(ledger: Ledger, settings: &[(&'static str, &'static str)]) -> Result<Self> {
        let more = |command| with(command, settings);
        Ok(Self { settings: settings.to_vec(), ..Self::start_as(ledger, more).await? })
    }

    /// With whatever else the command should have, until it is restarted.
    pub(crate) async fn start_as(ledger: Ledger, settings: impl FnOnce(Oncegate) -> Oncegate) -> Result<Self> {
        let upstream = Upstream::start().await?;
        let directory = tempfile::tempdir()?;
        let program = settings(command(&directory, &upstream, &ledger)?).start()?;
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut everything = Self {
            upstream,
            program,
            gateway: nowhere,
            sidecar: nowhere,
            admin: nowhere,
            directory,
            ledger,
            settings: Vec::new(),
        };
        everything.find().await?;
        Ok(everything)
    }

    /// Starts the program again after it has ended.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        self.program = with(command(&self.directory, &self.upstream, &self.ledger)?, &self.settings).start()?;
        self.find().await
    }

    async fn find(&mut self) -> Result<()> {
        self.gateway = self.program.address("gateway").await?;
        self.sidecar = self.program.address("sidecar").await?;
        self.admin = self.program.address("admin").await?;
        Ok(())
    }

    /// The store, to look into.
    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Sends a body as Stripe does.
    pub(crate) async fn send(&self, body: &[u8]) -> Result<Answer> {
        send_signed(self.gateway, &stripe::sign(SECRET, body), body).await
    }

    /// Asks the sidecar.
    pub(crate) async fn client(&self) -> Result<IdempotencyServiceClient<Channel>> {
        Ok(IdempotencyServiceClient::connect(format!("http://{}", self.sidecar)).await?)
    }

    /// What the sidecar remembers of one of Stripe's events.
    pub(crate) async fn history(&self, event_id: &str) -> Result<Option<EventHistory>> {
        let key = EventKey { provider: "stripe".into(), event_id: event_id.into(), ..Default::default() };
        let request = HistoryRequest { key: Some(key), ..Default::default() };
        match self.client().await?.history(request).await {
            Ok(response) => Ok(response.into_inner().events.into_iter().next()),
            Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    /// How many events there are.
    pub(crate) async fn events(&self) -> Result<usize> {
        let response = self.client().await?.history(HistoryRequest::default()).await?;
        Ok(response.into_inner().events.len())
    }
}

fn with(command: Oncegate, settings: &[(&'static str, &'static str)]) -> Oncegate {
    settings.iter().fold(command, |command, (name, value)| command.env(name, value))
}

fn command(directory: &TempDir, upstream: &Upstream, ledger: &Ledger) -> Result<Oncegate> {
    let command = Oncegate::new(directory.path(), ["all"])?
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("ADMIN_LISTEN", "127.0.0.1:0")
        .env("UPSTREAM_URL", upstream.url())
        .env("STRIPE_WEBHOOK_SECRET", SECRET);
    Ok(ledger.configure(command))
}

/// Sends a body with a signature, whatever it says.
pub(crate) async fn send_signed(gateway: SocketAddr, signature: &str, body: &[u8]) -> Result<Answer> {
    let headers = [(stripe::HEADER, signature), ("content-type", "application/json; charset=utf-8")];
    http_client::post(gateway, STRIPE, &headers, body.to_vec()).await
}

/// The gateway's word for what became of a webhook.
pub(crate) fn word(answer: &Answer) -> String {
    format!("{} {}", answer.status.as_u16(), answer.json()["status"].as_str().unwrap_or("-"))
}
