//! The sidecar: a gRPC service that grants each event to one caller and remembers how it ended.
//!
//! Inside, arrows point one way: `grpc → maintenance → coordinator → cache → ledger → event`. `event` is the domain and knows
//! no I/O; `ledger` decides (S1); nothing above it grants anything, and the cache only repeats what it said. `access` is used
//! by `grpc` and knows none of them; `method` defines what it is asked about. `metrics` is given what it counts as values (of
//! `event`, `cache::stats`, `coordinator` and `ledger`) and calls nobody; only `grpc` and `maintenance` count in it.

pub mod access;
pub mod cache;
pub mod config;
pub mod coordinator;
pub mod event;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod grpc;
pub mod ledger;
mod lockstep;
pub mod maintenance;
pub mod method;
pub mod metrics;

use std::{error::Error, io, path::PathBuf, sync::Arc};

use oncegate_runtime::{
    admin,
    metrics::certificates::{CertificateFile, Certificates},
    reload::{Files, FilesError},
    secret::ReadError,
    server::{self, Address, Http2, Listener, Peer, Protocol, TowerToHyperService},
    tls::{ClientTls, Lent, ServerTls},
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic_health::server::HealthReporter;

use crate::{
    cache::{Cache, RedisOptions, RedisUrlError},
    config::{Settings, Store},
    coordinator::Coordinator,
    grpc::access::Door,
    ledger::{
        Ledger,
        postgres::{self, PostgresLedger, PostgresSettings, Target},
        sqlite::{self, SqliteLedger, SqliteSettings},
    },
    maintenance::{count, sweep, watch},
    metrics::{Gauges, Metrics},
};

/// Why the sidecar does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is in use or not ours.
    #[error("cannot listen on {address} (SIDECAR_LISTEN)")]
    Listen {
        /// As configured.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file with the database's URL cannot be read.
    #[error("the database's URL cannot be read (DATABASE_URL_FILE)")]
    DatabaseUrl(#[source] ReadError),
    /// The same, while it was changed.
    #[error("the database's URL cannot be used (DATABASE_URL_FILE)")]
    DatabaseFile(#[source] FilesError),
    /// The database cannot be used.
    #[error("the Postgres ledger cannot be opened (DATABASE_URL)")]
    Postgres(#[source] postgres::OpenError),
    /// The URL of Redis is invalid.
    #[error("REDIS_URL {0}")]
    Redis(#[source] RedisUrlError),
    /// The embedded store cannot be used.
    #[error("the embedded store {} cannot be opened", path.display())]
    Embedded {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: sqlite::OpenError,
    },
}

/// Why the sidecar stopped serving before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A task it depends on is gone, which takes a panic: the log has its message. Only a new process brings the task back.
    #[error("a task that the sidecar works through has ended")]
    TaskEnded,
}

/// The sidecar, with its ledger open and its listener bound.
pub struct Sidecar {
    service: grpc::Service,
    health: HealthReporter,
    coordinator: Arc<Coordinator>,
    metrics: Arc<Metrics>,
    listener: Option<(Listener, Address)>,
    /// The database, unless it is the embedded store.
    target: Option<Target>,
    /// The certificates that the database's connections read for themselves, by their names in the metric.
    lent: Vec<(&'static str, Lent)>,
    settings: Settings,
}

impl Sidecar {
    /// Opens the ledger and binds the listener; serves nothing yet.
    ///
    /// # Errors
    /// When the address is taken, the ledger cannot be opened (a file with its URL not read among other reasons), its schema does
    /// not fit, or the URL of Redis cannot be used. That Redis cannot be reached is no error.
    pub async fn start(settings: Settings) -> Result<Sidecar, StartError> {
        // The address first: a second process on the same address should fail before it touches the store.
        let listener = match &settings.listen {
            Some(address) => {
                let error = |source| StartError::Listen { address: address.clone(), source };
                let listener = Listener::bind(address).await.map_err(error)?;
                let bound = listener.local_addr().map_err(error)?;
                Some((listener, bound))
            }
            None => None,
        };
        let metrics = Arc::new(Metrics::default());
        let (ledger, target) = open(&settings, &metrics).await?;
        let cache = Cache::new(&settings.cache, ledger.standing()).map_err(StartError::Redis)?;
        let coordinator = Coordinator::new(ledger, cache, settings.limits);
        let (service, health) =
            grpc::Service::new(coordinator.clone(), Arc::new(settings.policy.clone()), metrics.clone());
        let lent = lent(&settings.store);
        Ok(Sidecar { service, health, coordinator, metrics, listener, target, lent, settings })
    }

    /// Where the gRPC service listens, if it does.
    pub fn local_addr(&self) -> Option<&Address> {
        self.listener.as_ref().map(|(_, address)| address)
    }

    /// The services, for callers in the same process: no socket, and no access checks.
    pub fn service(&self) -> grpc::Service {
        self.service.clone()
    }

    /// The API itself, for callers in the same process: nothing is encoded, and there are no access checks.
    pub fn api(&self) -> grpc::Local {
        self.service.local()
    }

    /// What the admin listener shows under `/metrics`.
    pub fn metrics(&self) -> admin::Metrics {
        let (metrics, coordinator) = (self.metrics.clone(), self.coordinator.clone());
        let (cache, access) = (coordinator.cache_stats(), self.settings.access.clone());
        let target = self.target.clone();
        Arc::new(move || {
            let certificates = access.tls.as_ref().map(ServerTls::counts);
            let identities = access.directory.as_ref().map(|files| files.counts());
            let gauges = Gauges {
                occupancy: coordinator.occupancy(),
                is_breaker_open: coordinator.is_redis_left_alone(),
                is_ledger_up: coordinator.is_ledger_up(),
                durability_warnings: coordinator
                    .ledger()
                    .durability()
                    .map_or(0, |durability| durability.warnings.len()),
                certificates,
                identities,
                database: target.as_ref().and_then(Target::counts),
            };
            metrics.render(&cache, &gauges)
        })
    }

    /// When the certificates end: the listener's, and those for the database and Redis.
    pub fn certificates(&self) -> Certificates {
        let (tls, lent) = (self.settings.access.tls.clone(), self.lent.clone());
        let redis = self.settings.cache.redis.as_ref().and_then(RedisOptions::tls).cloned();
        Arc::new(move || {
            let listener = tls
                .as_ref()
                .map(ServerTls::ends)
                .map(|ends| [("SIDECAR_TLS_CERT_FILE", ends.own), ("SIDECAR_TLS_CLIENT_CA_FILE", ends.authorities)]);
            let redis = redis.as_ref().map(ClientTls::ends);
            let redis = redis.map(|ends| [("REDIS_CA_FILE", ends.authorities), ("REDIS_CLIENT_CERT_FILE", ends.own)]);
            let database = lent.iter().map(|(setting, file)| (*setting, file.end()));
            let all = listener.into_iter().chain(redis).flatten().chain(database);
            all.map(|(setting, end)| CertificateFile { setting, end }).collect()
        })
    }

    /// What `/readyz` says of the store: how it is set, and what an acknowledged completion survives.
    pub fn facts(&self) -> admin::Facts {
        let ledger = self.coordinator.ledger().clone();
        Arc::new(move || match ledger.durability() {
            Some(durability) => durability.to_string(),
            None => match ledger.trouble() {
                Some(why) => format!("the store is not connected: {why}\n"),
                None => "the store is not connected\n".to_owned(),
            },
        })
    }

    /// Serves until `shutdown`, then drains: waiting callers are answered with what is known, calls under way finish within
    /// the drain time, what the ledger keeps in memory is written. Dropping the future drops the listener and the calls under
    /// way; what the ledger was asked to do still happens, but what it keeps in memory is lost.
    ///
    /// # Errors
    /// When the sidecar has drained because it can no longer serve: whatever supervises the process should restart it.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let shutdown = shutdown.child_token();
        let supervised = tokio::spawn(supervise(self.coordinator.clone(), shutdown.clone()));
        let watch = tokio::spawn(watch::run(self.coordinator.ledger().clone(), self.health.clone(), shutdown.clone()));
        let stopping = tokio::spawn({
            let (coordinator, shutdown) = (self.coordinator.clone(), shutdown.clone());
            async move {
                shutdown.cancelled().await;
                coordinator.stop_waiting();
            }
        });
        let sweep = tokio::spawn(sweep::run(self.coordinator.ledger().clone(), shutdown.clone()));
        let (interval, stop) = (self.settings.count_interval, shutdown.clone());
        let count = tokio::spawn(count::run(self.coordinator.ledger().clone(), self.metrics.clone(), interval, stop));
        let access = self.settings.access;
        // End with this function.
        let mut watches = JoinSet::new();
        if let Some(target) = self.target {
            watches.spawn(target.watch(access.reload));
        }
        for (_, file) in self.lent {
            watches.spawn(file.watch(access.reload));
        }
        match self.listener {
            Some((listener, _)) => {
                if let Some(tls) = &access.tls {
                    watches.spawn(tls.clone().watch(access.reload));
                }
                let door = access.directory.map(|directory| {
                    watches.spawn(Files::watch(directory.clone(), access.reload));
                    Door::new(directory, self.metrics.clone())
                });
                let protocol =
                    Protocol::Http2(Http2 { streams_max: self.settings.limits.streams_max(), ..Http2::default() });
                let options =
                    server::Options { tls: access.tls, protocol, ..server::Options::http2(self.settings.drain) };
                let service = self.service;
                let service = move |peer: &Peer| {
                    let service = service.clone();
                    TowerToHyperService::new(match &door {
                        None => service,
                        Some(door) => service.guarded(door.clone(), peer.clone()),
                    })
                };
                server::serve_each(listener, service, options, shutdown).await;
            }
            None => shutdown.cancelled().await,
        }
        // All end with the shutdown; an error would be a panic that has been reported.
        drop(watch.await);
        drop(sweep.await);
        drop(stopping.await);
        drop(count.await);
        self.coordinator.close().await;
        supervised.await.unwrap_or(Err(RunError::TaskEnded))
    }
}

/// Ends the service when it can no longer serve. Before `shutdown` that is an error, afterwards it is what was asked for.
async fn supervise(coordinator: Arc<Coordinator>, shutdown: CancellationToken) -> Result<(), RunError> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => Ok(()),
        () = coordinator.ended() => {
            tracing::error!("a task that the sidecar works through has ended, so the sidecar ends");
            shutdown.cancel();
            Err(RunError::TaskEnded)
        }
    }
}

/// The certificates of the database's connections. Opening the database has already verified that they exist.
fn lent(store: &Store) -> Vec<(&'static str, Lent)> {
    let Store::Postgres(source) = store else { return Vec::new() };
    let files = source.read_one().map(|url| postgres::certificate_files(url.expose())).unwrap_or_default();
    let lent = files.into_iter().filter_map(|(kind, path)| {
        let (setting, read) = match kind {
            postgres::CertificateFile::Authorities => ("DATABASE_URL sslrootcert", Lent::authorities(path)),
            postgres::CertificateFile::Own => ("DATABASE_URL sslcert", Lent::chain(path)),
        };
        let unread = |error| tracing::warn!(setting, error = &error as &dyn Error, "nothing is told of its end");
        Some((setting, read.map_err(unread).ok()?))
    });
    lent.collect()
}

/// A ledger, and the database that it is in unless it is the embedded store.
type Opened = (Arc<dyn Ledger>, Option<Target>);

async fn open(settings: &Settings, metrics: &Metrics) -> Result<Opened, StartError> {
    match &settings.store {
        Store::Postgres(source) => {
            let url = source.read_one().map_err(StartError::DatabaseUrl)?;
            if settings.migrate {
                postgres::migrate::run(url.expose()).await.map_err(StartError::Postgres)?;
            }
            let target = match source.path() {
                None => Target::given(url.expose()).map_err(StartError::Postgres)?,
                Some(path) => Target::in_file(path).map_err(StartError::DatabaseFile)?,
            };
            let settings = PostgresSettings { metrics: metrics.ledger.clone(), ..PostgresSettings::default() };
            let ledger = PostgresLedger::open(&target, &settings).await.map_err(StartError::Postgres)?;
            Ok((Arc::new(ledger), Some(target)))
        }
        Store::Embedded(path) => {
            let metrics = metrics.ledger.clone();
            let ledger =
                SqliteLedger::open(path, &SqliteSettings { migrate: true, metrics, ..SqliteSettings::default() })
                    .map_err(|source| StartError::Embedded { path: path.clone(), source })?;
            Ok((Arc::new(ledger), None))
        }
    }
}

/// What `migrate` did, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// What was migrated: "postgres" or the embedded store's file.
    pub store: String,
    /// The schema's version before; 0: there was none.
    pub from: i64,
    /// The schema's version after.
    pub to: i64,
}

/// Compares the counts and percentiles that the store keeps with its rows, beside a running service.
///
/// # Errors
/// When the store cannot be read or its schema does not fit.
pub async fn check(store: &Store) -> Result<ledger::check::Report, StartError> {
    match store {
        Store::Postgres(source) => {
            let url = source.read_one().map_err(StartError::DatabaseUrl)?;
            postgres::check(url.expose()).await.map_err(StartError::Postgres)
        }
        Store::Embedded(path) => {
            let error = |source| StartError::Embedded { path: path.clone(), source };
            let file = path.clone();
            // It reads all of the file.
            match tokio::task::spawn_blocking(move || sqlite::check(&file)).await {
                Ok(checked) => checked.map_err(error),
                Err(failed) => std::panic::resume_unwind(failed.into_panic()),
            }
        }
    }
}

/// Applies the migrations missing in the store's schema.
///
/// # Errors
/// When the store cannot be opened or a migration fails.
pub async fn migrate(store: &Store) -> Result<Migrated, StartError> {
    match store {
        Store::Postgres(source) => {
            let url = source.read_one().map_err(StartError::DatabaseUrl)?;
            let done = postgres::migrate::run(url.expose()).await.map_err(StartError::Postgres)?;
            Ok(Migrated { store: "postgres".into(), from: done.from, to: done.to })
        }
        Store::Embedded(path) => {
            let done =
                SqliteLedger::migrate(path).map_err(|source| StartError::Embedded { path: path.clone(), source })?;
            Ok(Migrated { store: path.display().to_string(), from: done.from, to: done.to })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn started(directory: &tempfile::TempDir) -> Sidecar {
        let file = directory.path().join("oncegate.db");
        let options = ["--sidecar-listen", "127.0.0.1:0", "--store", file.to_str().unwrap()];
        Sidecar::start(config::Options::of(&options).validate().unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn a_sidecar_whose_ledger_has_ended_ends_too_and_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let sidecar = started(&directory).await;
        let coordinator = sidecar.coordinator.clone();
        let running = tokio::spawn(sidecar.run(CancellationToken::new()));
        assert!(!running.is_finished());
        // The end of its writer, for whatever reason.
        coordinator.close().await;
        let ended = tokio::time::timeout(Duration::from_secs(20), running).await.unwrap().unwrap();
        assert!(matches!(ended, Err(RunError::TaskEnded)));
    }

    #[tokio::test]
    async fn a_sidecar_that_is_told_to_end_ends_well() {
        let directory = tempfile::tempdir().unwrap();
        let sidecar = started(&directory).await;
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(sidecar.run(shutdown.clone()));
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(20), running).await.unwrap().unwrap().unwrap();
    }
}
