//! Everything as processes, with a proxy in front of and behind each.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use super::{
    application::{Application, Guard, Temper},
    history::Recorder,
};
use crate::{
    clock,
    eventually::within,
    postgres::{Cluster, Database, Options},
    program::{Oncegate, Running},
    proxy::Proxy,
    redis::Redis,
};

/// The secret of Stripe's webhooks.
pub const SECRET: &str = "whsec_of_the_campaign";

/// How long locks of the gateway, and default locks of callers, last: short, so that many expire during a run. The
/// application has a second, and another second is the margin.
pub const LOCK: Duration = Duration::from_secs(3);

/// The options of the database server: few enough connections to be used up.
fn options() -> Options {
    Options { settings: vec![("max_connections".to_owned(), "50".to_owned())], ..Options::default() }
}

/// A process may be restarted while the machine is busy with everything else.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A sidecar, and the paths to and from it.
#[derive(Debug)]
pub struct Sidecar {
    /// The process; None while it is dead.
    pub program: Option<Running>,
    /// Between direct callers and it.
    pub from_callers: Proxy,
    /// Between its gateway and it.
    pub from_gateway: Proxy,
    /// Between it and Postgres.
    pub to_postgres: Proxy,
    /// Between it and Redis.
    pub to_redis: Proxy,
    /// How far its wall clock is from the right one, in seconds.
    pub skew: i64,
    /// Where it serves its metrics.
    pub admin: SocketAddr,
}

/// A gateway, and the paths to and from it.
#[derive(Debug)]
pub struct Gateway {
    /// The process; None while it is dead.
    pub program: Option<Running>,
    /// Between providers and it.
    pub from_providers: Proxy,
    /// Between it and the application.
    pub to_application: Proxy,
    /// How far its wall clock is from the right one, in seconds.
    pub skew: i64,
    /// Where it serves its metrics.
    pub admin: SocketAddr,
}

/// The whole of it. Each gateway has a sidecar of its own; all sidecars share one Postgres and one Redis.
#[derive(Debug)]
pub struct World {
    /// Sidecars.
    pub sidecars: Vec<Sidecar>,
    /// Gateways, each with the sidecar of the same number.
    pub gateways: Vec<Gateway>,
    /// Redis.
    pub redis: Redis,
    /// What is delivered to.
    pub application: Application,
    /// What callers saw.
    pub recorder: Recorder,
    /// The events' database. Removed together with its cluster, never separately: the cluster may be down.
    pub database: Database,
    /// Its server.
    pub cluster: Cluster,
    directory: TempDir,
}

impl World {
    /// Starts everything: this many sidecars, each with a gateway.
    pub async fn start(count: usize, guard: Guard, temper: Temper) -> Result<Self> {
        let cluster = Cluster::start(options()).await?;
        let database = cluster.database().await?;
        let redis = Redis::start().await?;
        let recorder = Recorder::default();
        let application = Application::start(guard, temper, recorder.clone()).await?;
        let mut world = Self {
            sidecars: Vec::new(),
            gateways: Vec::new(),
            redis,
            application,
            recorder,
            database,
            cluster,
            directory: tempfile::tempdir()?,
        };
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        for number in 0..count {
            world.sidecars.push(Sidecar {
                program: None,
                from_callers: Proxy::start(nowhere).await?,
                from_gateway: Proxy::start(nowhere).await?,
                to_postgres: Proxy::start(world.cluster.address()).await?,
                to_redis: Proxy::start(world.redis.address()).await?,
                skew: 0,
                admin: nowhere,
            });
            world.gateways.push(Gateway {
                program: None,
                from_providers: Proxy::start(nowhere).await?,
                to_application: Proxy::start(world.application.address()).await?,
                skew: 0,
                admin: nowhere,
            });
            world.start_sidecar(number).await?;
            world.start_gateway(number).await?;
        }
        Ok(world)
    }

    /// Starts a sidecar, with its clock skewed as set. It needs Postgres for that, so this retries until Postgres
    /// is there.
    pub async fn start_sidecar(&mut self, number: usize) -> Result<()> {
        let sidecar = &mut self.sidecars[number];
        sidecar.program = None;
        let mut last = None;
        let started = within(START_DEADLINE, async || {
            let started = async {
                let command = Oncegate::new(self.directory.path(), ["sidecar"])?
                    .env("SIDECAR_LISTEN", "127.0.0.1:0")
                    .env("ADMIN_LISTEN", "127.0.0.1:0")
                    .env(
                        "DATABASE_URL",
                        format!("postgres://postgres@{}/{}", sidecar.to_postgres.address(), self.database.name()),
                    )
                    .env("REDIS_URL", format!("redis://{}", sidecar.to_redis.address()))
                    .env("LOCK_DURATION", format!("{}s", LOCK.as_secs()))
                    // An event that runs out of attempts never completes, which is a different promise.
                    .env("ATTEMPTS_MAX", "0")
                    .env("SIDECAR_DRAIN", "3s");
                let command = if sidecar.skew == 0 { command } else { clock::skewed(command, sidecar.skew)? };
                let mut program = command.start()?;
                let address = program.address("sidecar").await?;
                let admin = program.address("admin").await?;
                anyhow::Ok((program, address, admin))
            };
            match started.await {
                Ok(started) => Some(started),
                Err(error) => {
                    last = Some(error);
                    None
                }
            }
        })
        .await;
        let Some((program, address, admin)) = started else {
            return Err(last.context("no error")?.context("a sidecar does not start"));
        };
        sidecar.program = Some(program);
        sidecar.admin = admin;
        sidecar.from_callers.set_target(address);
        sidecar.from_gateway.set_target(address);
        Ok(())
    }

    /// Starts a gateway, with its clock skewed as set.
    pub async fn start_gateway(&mut self, number: usize) -> Result<()> {
        let sidecar = self.sidecars[number].from_gateway.address();
        let gateway = &mut self.gateways[number];
        gateway.program = None;
        let command = Oncegate::new(self.directory.path(), ["gateway"])?
            .env("GATEWAY_LISTEN", "127.0.0.1:0")
            .env("ADMIN_LISTEN", "127.0.0.1:0")
            .env("SIDECAR_URL", format!("http://{sidecar}"))
            .env("UPSTREAM_URL", format!("http://{}/payments", gateway.to_application.address()))
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env("HOSTNAME", format!("gateway-{number}"))
            .env("UPSTREAM_TIMEOUT", "1s")
            .env("UPSTREAM_CONNECT_TIMEOUT", "500ms")
            .env("GATEWAY_LOCK_DURATION", format!("{}s", LOCK.as_secs()))
            .env("GATEWAY_LOCK_MARGIN", "1s")
            .env("GATEWAY_WAIT_DURATION", "1s")
            .env("GATEWAY_ANSWER_TIMEOUT", "5s")
            .env("GATEWAY_DRAIN", "2s");
        let command = if gateway.skew == 0 { command } else { clock::skewed(command, gateway.skew)? };
        let mut program = command.start()?;
        let address = program.address("gateway").await?;
        gateway.admin = program.address("admin").await?;
        gateway.program = Some(program);
        gateway.from_providers.set_target(address);
        Ok(())
    }

    /// The paths by which callers reach the sidecars.
    pub fn sidecar_urls(&self) -> Vec<String> {
        self.sidecars.iter().map(|sidecar| format!("http://{}", sidecar.from_callers.address())).collect()
    }

    /// The paths by which providers reach the gateways.
    pub fn gateway_addresses(&self) -> Vec<SocketAddr> {
        self.gateways.iter().map(|gateway| gateway.from_providers.address()).collect()
    }

    /// Creates a standby that has everything committed, and kills the primary. Returns the standby.
    ///
    /// # Errors
    /// When one of them cannot be started, asked or killed.
    pub async fn lose_primary(&mut self) -> Result<Cluster> {
        let standby = self.cluster.standby(options()).await?;
        self.cluster.wait_for_standby(false).await?;
        // From here on commits wait for it, so everything acknowledged is there.
        self.cluster.make_standby_synchronous().await?;
        self.cluster.kill()?;
        Ok(standby)
    }

    /// Promotes a standby and redirects everybody to it.
    ///
    /// # Errors
    /// When it cannot be promoted.
    pub async fn promote(&mut self, standby: Cluster) -> Result<()> {
        standby.promote().await?;
        for sidecar in &self.sidecars {
            sidecar.to_postgres.set_target(standby.address());
            sidecar.to_postgres.reset();
        }
        self.cluster = standby;
        Ok(())
    }

    /// Redirects everybody to another Redis, and kills the previous one.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn replace_redis(&mut self, replica: Redis) -> Result<()> {
        self.redis.kill()?;
        for sidecar in &self.sidecars {
            sidecar.to_redis.set_target(replica.address());
            sidecar.to_redis.reset();
        }
        self.redis = replica;
        Ok(())
    }

    /// A URL of the database that bypasses the proxies.
    pub fn database_url(&self) -> String {
        self.cluster.url(self.database.name())
    }
}
