//! The sidecar's configuration: options as given, and the settings that they come to.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use oncegate_runtime::{
    config::{Checks, Problems, Span, duration},
    secret::{SecretText, Source},
};

use crate::{coordinator::Limits, event::Micros};

/// Options of the sidecar. Every one is also an environment variable.
#[derive(clap::Args, Clone, Debug)]
// A process may take the options of both services: the groups that clap names after the types would clash.
#[group(skip)]
#[command(next_help_heading = "Sidecar")]
pub struct Options {
    /// Where the gRPC service listens. Anything but loopback needs --insecure, for the service is not yet able to tell
    /// callers apart: keep it within the pod or the cluster's own network.
    #[arg(long, env = "SIDECAR_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub sidecar_listen: SocketAddr,

    /// Permits to serve without TLS and tokens on an address that others can reach.
    #[arg(long, env = "ONCEGATE_INSECURE")]
    pub insecure: bool,

    /// Postgres, as postgres://user:password@host:port/database. Without it the embedded store is used.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<SecretText>,

    /// A file that holds the URL of the database.
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE")]
    pub database_url_file: Option<PathBuf>,

    /// The embedded store's file, where no database is given. One process at a time.
    #[arg(long, env = "ONCEGATE_STORE", default_value = "./oncegate.db", value_name = "FILE")]
    pub store: PathBuf,

    /// Applies missing migrations to DATABASE_URL at start. The embedded store always does.
    #[arg(long, env = "ONCEGATE_MIGRATE")]
    pub migrate: bool,

    /// How long a lock lasts when the caller does not say: the first version's five minutes. 1s to 24h.
    #[arg(long, env = "LOCK_DURATION", default_value = "5m", value_parser = duration, value_name = "DURATION")]
    pub lock_duration: Duration,

    /// Attempts at one event before it is dead; 0 for no cap. Paystack alone delivers about 76 times in three days.
    #[arg(long, env = "ATTEMPTS_MAX", default_value_t = 100, value_name = "COUNT")]
    pub attempts_max: u32,

    /// The same for single providers, as paystack=200,stripe=0.
    #[arg(long, env = "PROVIDER_ATTEMPTS_MAX", value_delimiter = ',', value_name = "PROVIDER=COUNT")]
    pub provider_attempts_max: Vec<String>,

    /// Events younger than this are never deleted, whatever Cleanup is asked for: the longest time over which
    /// providers deliver again by themselves, with a margin.
    #[arg(long, env = "RETENTION_MIN", default_value = "6d", value_parser = duration, value_name = "DURATION")]
    pub retention_min: Duration,

    /// Calls on the ledger at once; beyond it they are refused as OVERLOADED.
    #[arg(long, env = "SIDECAR_CALLS_MAX", default_value_t = 1_024, value_name = "COUNT")]
    pub sidecar_calls_max: usize,

    /// Calls that wait for a running attempt; beyond it they are told "in progress" at once.
    #[arg(long, env = "SIDECAR_WAITING_MAX", default_value_t = 4_096, value_name = "COUNT")]
    pub sidecar_waiting_max: usize,

    /// How long calls under way may take after the signal to stop.
    #[arg(long, env = "SIDECAR_DRAIN", default_value = "15s", value_parser = duration, value_name = "DURATION")]
    pub sidecar_drain: Duration,
}

/// Where events are kept.
#[derive(Clone, Debug)]
pub enum Store {
    /// A Postgres database.
    Postgres(Source),
    /// The embedded store's file.
    Embedded(PathBuf),
}

/// What the service promises its callers when they do not say otherwise.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The default lock (S6).
    pub lock_duration: Micros,
    /// The default cap (S7); 0: none.
    pub attempts_max: i32,
    /// Caps of single providers.
    pub provider_attempts_max: BTreeMap<String, i32>,
    /// What Cleanup cannot undercut.
    pub retention_min: Duration,
}

impl Policy {
    /// The cap for a provider's events.
    pub fn attempts_max(&self, provider: &str) -> i32 {
        self.provider_attempts_max.get(provider).copied().unwrap_or(self.attempts_max)
    }
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            lock_duration: Micros(300_000_000),
            attempts_max: 100,
            provider_attempts_max: BTreeMap::new(),
            retention_min: Duration::from_secs(6 * 24 * 3_600),
        }
    }
}

/// The sidecar's settings, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen; None: only in this process.
    pub listen: Option<SocketAddr>,
    /// Where events are kept.
    pub store: Store,
    /// Whether to apply missing migrations at start.
    pub migrate: bool,
    /// Defaults for callers.
    pub policy: Policy,
    /// Bounds on calls.
    pub limits: Limits,
    /// How long calls under way may take after the signal to stop.
    pub drain: Duration,
}

impl Options {
    /// Checks the options.
    ///
    /// # Errors
    /// Everything that is wrong with them, at once.
    pub fn validate(self) -> Result<Settings, Problems> {
        let mut checks = Checks::new();
        if !self.sidecar_listen.ip().is_loopback() && !self.insecure {
            checks.problem(
                "SIDECAR_LISTEN",
                format!(
                    "{} can be reached by others, and the service has neither TLS nor tokens: listen on a loopback \
                     address, or say --insecure",
                    self.sidecar_listen
                ),
            );
        }
        let database = checks
            .take(Source::choose("DATABASE_URL", self.database_url, self.database_url_file))
            .flatten();
        checks.within(
            "LOCK_DURATION",
            Span(self.lock_duration),
            Span(Duration::from_secs(1))..=Span(Duration::from_secs(86_400)),
        );
        let attempts_max = checks.take(cap("ATTEMPTS_MAX", self.attempts_max)).unwrap_or_default();
        let mut provider_attempts_max = BTreeMap::new();
        for entry in self.provider_attempts_max.iter().filter(|entry| !entry.trim().is_empty()) {
            let parsed = entry.split_once('=').and_then(|(provider, count)| {
                Some((provider.trim().to_owned(), count.trim().parse::<u32>().ok()?))
            });
            match parsed {
                Some((provider, count)) if !provider.is_empty() => {
                    if let Some(count) = checks.take(cap("PROVIDER_ATTEMPTS_MAX", count)) {
                        provider_attempts_max.insert(provider, count);
                    }
                }
                Some(_) | None => checks.problem(
                    "PROVIDER_ATTEMPTS_MAX",
                    format!("{entry:?} given, has to be PROVIDER=COUNT, as paystack=200"),
                ),
            }
        }
        checks.within(
            "RETENTION_MIN",
            Span(self.retention_min),
            Span(Duration::from_secs(3_600))..=Span(Duration::from_secs(100 * 365 * 86_400)),
        );
        for (setting, value) in
            [("SIDECAR_CALLS_MAX", self.sidecar_calls_max), ("SIDECAR_WAITING_MAX", self.sidecar_waiting_max)]
        {
            checks.within(setting, value, 1..=1_000_000);
        }
        checks.finish()?;
        Ok(Settings {
            listen: Some(self.sidecar_listen),
            store: database.map_or(Store::Embedded(self.store), Store::Postgres),
            migrate: self.migrate,
            policy: Policy {
                lock_duration: self.lock_duration.into(),
                attempts_max,
                provider_attempts_max,
                retention_min: self.retention_min,
            },
            limits: Limits { calls_max: self.sidecar_calls_max, waiting_max: self.sidecar_waiting_max },
            drain: self.sidecar_drain,
        })
    }
}

fn cap(setting: &'static str, count: u32) -> Result<i32, oncegate_runtime::config::Problem> {
    i32::try_from(count).map_err(|_| {
        oncegate_runtime::config::Problem::new(setting, format!("{count} given, may be at most {}", i32::MAX))
    })
}
