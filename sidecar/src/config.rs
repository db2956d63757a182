//! The sidecar's configuration: options as given, and the settings that they come to.

mod access;

use std::{collections::BTreeMap, error::Error as _, fmt, num::NonZeroU32, path::PathBuf, time::Duration};

use clap::builder::BoolishValueParser;
use oncegate_api::limits::{LOCK_DURATION_MAX, LOCK_DURATION_MIN};
use oncegate_runtime::{
    config::{Checks, Problem, Problems, ShownDuration, byte_size, duration, scheme},
    secret::{SecretSource, SecretText, file},
    server::Address,
    tls::ClientTlsFiles,
};

pub use self::access::{Access, ClientAuth};
use crate::{
    cache::{CacheSettings, RedisOptions},
    coordinator::Limits,
    event::Micros,
    ledger::{filter::RETENTION_MIN, postgres},
};

/// Redis's default port.
const REDIS_PORT: u16 = 6_379;

/// Options of the sidecar. Every one is also an environment variable.
#[derive(clap::Args, Clone, Debug)]
// A process may take the options of both services: the groups that clap names after the types would clash.
#[group(skip)]
#[command(next_help_heading = "Sidecar")]
pub struct Options {
    /// Where the gRPC service listens: address and port, or unix:/path/of/a.sock for callers in the same pod (of which
    /// some need an option, docs/errors.md). Anything but loopback and Unix sockets needs TLS and identities
    /// (SIDECAR_TOKENS_FILE), or --insecure.
    #[arg(long, env = "SIDECAR_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub sidecar_listen: Address,

    /// The listener's certificate in PEM, its own first and the intermediates behind it: TLS is spoken, and nothing else.
    /// Read again when it changes, as are the other files of this kind.
    #[arg(long, env = "SIDECAR_TLS_CERT_FILE", value_name = "FILE", value_parser = file)]
    pub sidecar_tls_cert_file: Option<PathBuf>,

    /// The private key of the listener's certificate, in PEM.
    #[arg(long, env = "SIDECAR_TLS_KEY_FILE", value_name = "FILE", value_parser = file)]
    pub sidecar_tls_key_file: Option<PathBuf>,

    /// The authorities of client certificates, in PEM: mutual TLS. A certificate of another, or one that has expired, ends
    /// the handshake.
    #[arg(long, env = "SIDECAR_TLS_CLIENT_CA_FILE", value_name = "FILE", value_parser = file)]
    pub sidecar_tls_client_ca_file: Option<PathBuf>,

    /// Whether callers have to have a certificate, where there is an authority for them. optional: those without are known
    /// by their token.
    #[arg(long, env = "SIDECAR_TLS_CLIENT_AUTH", value_name = "WHEN", default_value = "required")]
    pub sidecar_tls_client_auth: ClientAuth,

    /// A file in TOML with the identities that may call: name, role (caller, operator, cleanup), tenants, tokens or names in
    /// certificates, and when they end. Whoever is not in it is refused, and who is taken out of it from then on. Without
    /// it everybody who can connect may do everything.
    #[arg(long, env = "SIDECAR_TOKENS_FILE", value_name = "FILE", value_parser = file)]
    pub sidecar_tokens_file: Option<PathBuf>,

    /// How often the files with certificates, identities and the database's URL are looked at for changes.
    #[arg(long, env = "SIDECAR_ACCESS_RELOAD", default_value = "10s", value_parser = duration, value_name = "DURATION")]
    pub sidecar_access_reload: Duration,

    /// Calls per second and tenant that claim, list or count; beyond it they are refused as QUOTA_EXCEEDED. Marks and
    /// extensions are never refused. A gateway's calls count too: a genuine webhook beyond the quota gets 503, and comes
    /// again, so stay far above the tenant's busiest second. 0: no quota.
    #[arg(long, env = "SIDECAR_TENANT_CALLS_PER_SECOND", default_value_t = 0, value_name = "COUNT")]
    pub sidecar_tenant_calls_per_second: u32,

    /// Permits to serve without TLS, or without identities, on an address that others can reach.
    #[arg(long, env = "ONCEGATE_INSECURE", value_parser = BoolishValueParser::new())]
    pub insecure: bool,

    /// Where events are kept.
    #[command(flatten)]
    pub store: StoreOptions,

    /// Redis, which makes duplicates cheap and can do nothing else: redis://[user:password@]host[:port][/database], rediss://
    /// for TLS, redis-cluster://host:port?node=host:port, redis-sentinel://host:port?sentinelServiceName=name. Without
    /// it, and without REDIS_HOST, none is used. The embedded store needs none.
    #[arg(long, env = "REDIS_URL", value_name = "URL", hide_env_values = true)]
    pub redis_url: Option<SecretText>,

    /// A file that holds the URL of Redis.
    #[arg(long, env = "REDIS_URL_FILE", value_name = "FILE", value_parser = file)]
    pub redis_url_file: Option<PathBuf>,

    /// Redis by its host, as the first version was configured.
    #[arg(long, env = "REDIS_HOST", value_name = "HOST")]
    pub redis_host: Option<String>,

    /// The port that goes with REDIS_HOST [default: 6379].
    #[arg(long, env = "REDIS_PORT", value_name = "PORT")]
    pub redis_port: Option<u16>,

    /// The password of Redis, with REDIS_HOST or a REDIS_URL that has none.
    #[arg(long, env = "REDIS_PASSWORD", value_name = "PASSWORD", hide_env_values = true)]
    pub redis_password: Option<SecretText>,

    /// A file that holds the password.
    #[arg(long, env = "REDIS_PASSWORD_FILE", value_name = "FILE", value_parser = file)]
    pub redis_password_file: Option<PathBuf>,

    /// The authorities that the certificate of Redis has to lead to, in PEM, for rediss:// in REDIS_URL; by default the
    /// system's. Read at the start, as are the other two for Redis.
    #[arg(long, env = "REDIS_CA_FILE", value_name = "FILE", value_parser = file)]
    pub redis_ca_file: Option<PathBuf>,

    /// The sidecar's own certificate in PEM, where Redis asks for one.
    #[arg(long, env = "REDIS_CLIENT_CERT_FILE", value_name = "FILE", value_parser = file)]
    pub redis_client_cert_file: Option<PathBuf>,

    /// Its private key, in PEM.
    #[arg(long, env = "REDIS_CLIENT_KEY_FILE", value_name = "FILE", value_parser = file)]
    pub redis_client_key_file: Option<PathBuf>,

    /// The most memory that the process's own cache of completed events takes. 0B: none is cached.
    #[arg(long, env = "CACHE_SIZE", default_value = "32MiB", value_parser = byte_size, value_name = "SIZE")]
    pub cache_size: u64,

    /// Applies missing migrations to DATABASE_URL at start. The embedded store always does.
    #[arg(long, env = "ONCEGATE_MIGRATE", value_parser = BoolishValueParser::new())]
    pub migrate: bool,

    /// How long a lock lasts when the caller does not say: the first version's five minutes. 1s to 24h.
    #[arg(long, env = "LOCK_DURATION", default_value = "5m", value_parser = duration, value_name = "DURATION")]
    pub lock_duration: Duration,

    /// Attempts at one event before it is dead; 0 for no cap. Paystack alone delivers about 76 times in three days.
    #[arg(long, env = "ATTEMPTS_MAX", default_value_t = Policy::ATTEMPTS_MAX, value_name = "COUNT")]
    pub attempts_max: u32,

    /// The same for single providers, as paystack=200,stripe=0.
    #[arg(long, env = "PROVIDER_ATTEMPTS_MAX", value_delimiter = ',', value_name = "PROVIDER=COUNT")]
    pub provider_attempts_max: Vec<String>,

    /// Events younger than this are never deleted, whatever Cleanup is asked for: the longest time over which
    /// providers deliver again by themselves, with a margin. Caches keep what is completed until an hour before it: with 1h
    /// or less they keep nothing.
    #[arg(long, env = "RETENTION_MIN", default_value = "6d", value_parser = duration, value_name = "DURATION")]
    pub retention_min: Duration,

    /// Claims on the ledger at once, and as many calls that extend, end or resolve an attempt; beyond it they are refused as
    /// OVERLOADED.
    #[arg(long, env = "SIDECAR_CALLS_MAX", default_value_t = Limits::CALLS_MAX, value_name = "COUNT")]
    pub sidecar_calls_max: usize,

    /// Calls that wait for a running attempt; beyond it they are told "in progress" at once.
    #[arg(long, env = "SIDECAR_WAITING_MAX", default_value_t = Limits::WAITING_MAX, value_name = "COUNT")]
    pub sidecar_waiting_max: usize,

    /// How often the events are counted by state for the metrics. Not by each scrape: every sidecar counts them all.
    #[arg(long, env = "COUNT_INTERVAL", default_value = "15s", value_parser = duration, value_name = "DURATION")]
    pub count_interval: Duration,

    /// How long calls under way may take after the signal to stop.
    #[arg(long, env = "SIDECAR_DRAIN", default_value = "15s", value_parser = duration, value_name = "DURATION")]
    pub sidecar_drain: Duration,
}

/// Where events are kept: what commands that need nothing else of a sidecar take as well.
#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct StoreOptions {
    /// Postgres, as postgres://user:password@host:port/database. Unset, and not merely empty: the embedded store. Parameters
    /// that are not known are refused.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<SecretText>,

    /// A file that holds the URL of the database. It is read again: another user, password or TLS parameter goes for new
    /// connections, another host, port or database takes a restart.
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE", value_parser = file)]
    pub database_url_file: Option<PathBuf>,

    /// The embedded store's file, instead of a database: ./oncegate.db if neither is given. One process at a time.
    #[arg(long, env = "ONCEGATE_STORE", value_name = "FILE", value_parser = file)]
    pub store: Option<PathBuf>,
}

impl StoreOptions {
    /// Checks the options.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn validate(self) -> Result<Store, Problem> {
        let given = match (&self.database_url, &self.database_url_file) {
            (Some(_), _) => Some("DATABASE_URL"),
            (None, Some(_)) => Some("DATABASE_URL_FILE"),
            (None, None) => None,
        };
        let database = SecretSource::choose("DATABASE_URL", self.database_url, self.database_url_file)?;
        // Elsewhere a blank setting is treated as unset. Here that would silently give each process a ledger of its own.
        if let (Some(setting), None) = (given, &database) {
            return Err(Problem::new(
                setting,
                "given and empty, has to lead to a Postgres database: unset it for the embedded store",
            ));
        }
        let store = self.store.filter(|file| !file.as_os_str().is_empty());
        // Usually one is given on the command line and the other in the environment: neither may be silently ignored.
        if let (Some(setting), Some(store)) = (given, &store) {
            return Err(Problem::new(
                "ONCEGATE_STORE",
                format!(
                    "{} is given beside {setting}: one of them says where events are kept, unset the other",
                    store.display()
                ),
            ));
        }
        if let Some(source) = &database {
            let setting = if source.path().is_some() { "DATABASE_URL_FILE" } else { "DATABASE_URL" };
            let url = source.read_one().map_err(|error| Problem::from_error(setting, &error))?;
            database_url(setting, url.expose())?;
        }
        Ok(match database {
            Some(source) => Store::Postgres(source),
            None => Store::Embedded(store.unwrap_or_else(|| "./oncegate.db".into())),
        })
    }
}

/// Where events are kept.
#[derive(Clone, Debug)]
pub enum Store {
    /// A Postgres database.
    Postgres(SecretSource),
    /// The embedded store's file.
    Embedded(PathBuf),
}

impl fmt::Display for Store {
    /// For people; without the URL, which may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Store::Postgres(_) => write!(f, "the Postgres database"),
            Store::Embedded(file) => write!(f, "{}", file.display()),
        }
    }
}

/// What the service promises its callers when they do not say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The default lock (S6).
    pub lock_duration: Micros,
    /// The default cap (S7), if there is one.
    pub attempts_max: Option<NonZeroU32>,
    /// The same for single providers.
    pub provider_attempts_max: BTreeMap<String, Option<NonZeroU32>>,
    /// What Cleanup cannot undercut.
    pub retention_min: Duration,
    /// Calls per second and tenant; None: no quota.
    pub tenant_calls_per_second: Option<NonZeroU32>,
}

impl Policy {
    /// The default cap, where the configuration does not say.
    pub const ATTEMPTS_MAX: u32 = 100;

    /// The cap for a provider's events, if there is one.
    pub fn attempts_max(&self, provider: &str) -> Option<NonZeroU32> {
        self.provider_attempts_max.get(provider).copied().unwrap_or(self.attempts_max)
    }
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            lock_duration: Micros(300_000_000),
            attempts_max: NonZeroU32::new(Policy::ATTEMPTS_MAX),
            provider_attempts_max: BTreeMap::new(),
            retention_min: RETENTION_MIN,
            tenant_calls_per_second: None,
        }
    }
}

/// The sidecar's settings, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen; None: only in this process.
    pub listen: Option<Address>,
    /// Who may call on that address.
    pub access: Access,
    /// Where events are kept.
    pub store: Store,
    /// Whether to apply missing migrations at start.
    pub migrate: bool,
    /// Defaults for callers.
    pub policy: Policy,
    /// The cache of completed events.
    pub cache: CacheSettings,
    /// Bounds on calls.
    pub limits: Limits,
    /// How often the events are counted for the metrics.
    pub count_interval: Duration,
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
        let access = access::access(&self, &mut checks);
        self.without_redis(&mut checks);
        let store = checks.take(self.store.validate());
        checks.within(
            "LOCK_DURATION",
            ShownDuration(self.lock_duration),
            ShownDuration(LOCK_DURATION_MIN)..=ShownDuration(LOCK_DURATION_MAX),
        );
        let certificates = checks.take(redis_certificates(
            self.redis_ca_file,
            self.redis_client_cert_file,
            self.redis_client_key_file,
        ));
        let redis = certificates
            .and_then(|certificates| {
                checks.take(redis(
                    (self.redis_url, self.redis_url_file),
                    (self.redis_host, self.redis_port.unwrap_or(REDIS_PORT)),
                    (self.redis_password, self.redis_password_file),
                    &certificates,
                ))
            })
            .flatten();
        let attempts_max = checks.take(cap("ATTEMPTS_MAX", self.attempts_max));
        let mut provider_attempts_max = BTreeMap::new();
        for entry in self.provider_attempts_max.iter().filter(|entry| !entry.trim().is_empty()) {
            let parsed = entry
                .split_once('=')
                .and_then(|(provider, count)| Some((provider.trim().to_owned(), count.trim().parse::<u32>().ok()?)));
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
            ShownDuration(self.retention_min),
            ShownDuration(Duration::from_secs(3_600))..=ShownDuration(Duration::from_secs(100 * 365 * 86_400)),
        );
        for (setting, value) in
            [("SIDECAR_CALLS_MAX", self.sidecar_calls_max), ("SIDECAR_WAITING_MAX", self.sidecar_waiting_max)]
        {
            checks.within(setting, value, 1..=1_000_000);
        }
        checks.within(
            "COUNT_INTERVAL",
            ShownDuration(self.count_interval),
            ShownDuration(Duration::from_millis(100))..=ShownDuration(Duration::from_secs(3_600)),
        );
        checks.finish()?;
        let store = store.expect("a store that cannot be used is a problem");
        let attempts_max = attempts_max.expect("a cap that cannot be used is a problem");
        let embedded = matches!(store, Store::Embedded(_));
        if embedded && redis.is_some() {
            tracing::warn!("the embedded store is used by one process and needs no redis: it is not used");
        }
        Ok(Settings {
            listen: Some(self.sidecar_listen),
            access,
            store,
            migrate: self.migrate,
            policy: Policy {
                lock_duration: self.lock_duration.into(),
                attempts_max,
                provider_attempts_max,
                retention_min: self.retention_min,
                tenant_calls_per_second: NonZeroU32::new(self.sidecar_tenant_calls_per_second),
            },
            cache: CacheSettings {
                memory_bytes_max: self.cache_size,
                redis: if embedded { None } else { redis },
                retention_min: self.retention_min,
            },
            limits: Limits { calls_max: self.sidecar_calls_max, waiting_max: self.sidecar_waiting_max },
            count_interval: self.count_interval,
            drain: self.sidecar_drain,
        })
    }
}

/// Only the URL's scheme and the names of its parameters are reported: the URL may hold a password.
fn database_url(setting: &'static str, url: &str) -> Result<(), Problem> {
    const WANTED: &str =
        "has to be postgres://user:password@host:port/database; the embedded store's file is ONCEGATE_STORE";
    match scheme(url.trim()) {
        Some(known) if postgres::is_scheme(known) => {}
        Some(other) => return Err(Problem::new(setting, format!("begins with {other}://, {WANTED}"))),
        None => return Err(Problem::new(setting, format!("not a URL: {WANTED}"))),
    }
    match postgres::options(url) {
        Ok(_) => Ok(()),
        Err(error) => Err(Problem::from_error(setting, error.source().unwrap_or(&error))),
    }
}

impl Options {
    /// Redis settings given without naming a Redis: whoever set them believes that it is used.
    fn without_redis(&self, checks: &mut Checks) {
        let text = |text: &Option<SecretText>| matches!(SecretSource::choose("", text.clone(), None), Ok(Some(_)));
        let file = |path: &Option<PathBuf>| path.as_deref().is_some_and(access::is_given);
        let host = self.redis_host.as_ref().is_some_and(|host| !host.trim().is_empty());
        let url = text(&self.redis_url) || file(&self.redis_url_file);
        if self.redis_port.is_some() && !host {
            checks.problem(
                "REDIS_PORT",
                "given, and no REDIS_HOST that it goes with: in REDIS_URL the port is a part of it",
            );
        }
        if host || url {
            return;
        }
        for (setting, given) in [
            ("REDIS_PASSWORD", text(&self.redis_password)),
            ("REDIS_PASSWORD_FILE", file(&self.redis_password_file)),
            ("REDIS_CA_FILE", file(&self.redis_ca_file)),
            ("REDIS_CLIENT_CERT_FILE", file(&self.redis_client_cert_file)),
            ("REDIS_CLIENT_KEY_FILE", file(&self.redis_client_key_file)),
        ] {
            if given {
                checks.problem(setting, "given, and neither REDIS_URL nor REDIS_HOST: no Redis would be used");
            }
        }
    }
}

/// A setting's value and the file that may hold it instead.
type Given = (Option<SecretText>, Option<PathBuf>);

fn redis_certificates(
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<ClientTlsFiles, Problem> {
    let identity = match (access::given(certificate), access::given(key)) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (Some(_), None) => {
            return Err(Problem::new(
                "REDIS_CLIENT_KEY_FILE",
                "missing: the certificate in REDIS_CLIENT_CERT_FILE needs its key",
            ));
        }
        (None, Some(_)) => {
            return Err(Problem::new(
                "REDIS_CLIENT_CERT_FILE",
                "missing: the key in REDIS_CLIENT_KEY_FILE needs its certificate",
            ));
        }
    };
    Ok(ClientTlsFiles { ca: access::given(ca), identity })
}

fn redis(
    url: Given,
    server: (Option<String>, u16),
    password: Given,
    certificates: &ClientTlsFiles,
) -> Result<Option<RedisOptions>, Problem> {
    let read = |setting: &'static str, source: Option<SecretSource>| {
        source
            .map(|source| source.read_one())
            .transpose()
            .map_err(|error| Problem::from_error(format!("{setting}_FILE"), &error))
    };
    let url = read("REDIS_URL", SecretSource::choose("REDIS_URL", url.0, url.1)?)?;
    let password = read("REDIS_PASSWORD", SecretSource::choose("REDIS_PASSWORD", password.0, password.1)?)?;
    let host = server.0.filter(|host| !host.trim().is_empty());
    let named = if certificates.ca.is_some() {
        Some("REDIS_CA_FILE")
    } else {
        certificates.identity.as_ref().map(|_| "REDIS_CLIENT_CERT_FILE")
    };
    // Whoever configures certificates believes that the connection is encrypted.
    let in_the_clear = |setting| {
        Problem::new(setting, "given, and Redis is not called by TLS: that takes a REDIS_URL that begins with rediss")
    };
    match (url, host) {
        (Some(_), Some(host)) => {
            Err(Problem::new("REDIS_HOST", format!("{host} given, and REDIS_URL as well: keep one")))
        }
        (Some(url), None) => {
            let options = RedisOptions::from_url(url.expose(), certificates)
                .map_err(|error| Problem::from_error("REDIS_URL", &error))?;
            if let Some(setting) = named.filter(|_| options.tls().is_none()) {
                return Err(in_the_clear(setting));
            }
            let Some(password) = password else { return Ok(Some(options)) };
            let contradiction =
                || Problem::new("REDIS_PASSWORD", "given, and REDIS_URL has another password: keep one");
            options.with_password(password.expose()).map(Some).ok_or_else(contradiction)
        }
        (None, Some(host)) => {
            if let Some(setting) = named {
                return Err(in_the_clear(setting));
            }
            Ok(Some(RedisOptions::from_parts(&host, server.1, password.map(|p| p.expose().to_owned()))))
        }
        (None, None) => Ok(None),
    }
}

/// A cap as given, 0 for none. What the ledgers count attempts in bounds it.
fn cap(setting: &'static str, count: u32) -> Result<Option<NonZeroU32>, Problem> {
    if i32::try_from(count).is_err() {
        return Err(Problem::new(setting, format!("{count} given, may be at most {}", i32::MAX)));
    }
    Ok(NonZeroU32::new(count))
}

#[cfg(test)]
impl Options {
    /// What these arguments say, and nothing that the environment does.
    pub(crate) fn of(arguments: &[&str]) -> Options {
        use clap::{Args as _, Command, FromArgMatches as _, builder::Resettable};

        let command = Options::augment_args(Command::new("sidecar").no_binary_name(true))
            .mut_args(|argument| argument.env(Resettable::Reset));
        Options::from_arg_matches(&command.get_matches_from(arguments)).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those with a unit are written in the options as people read them, and in the types as numbers.
    #[test]
    fn what_no_option_says_is_what_the_settings_default_to() {
        let settings = Options::of(&[]).validate().unwrap();
        assert_eq!(settings.policy, Policy::default());
        assert_eq!(settings.limits, Limits::default());
        let (cache, default) = (settings.cache, CacheSettings::default());
        assert_eq!(
            (cache.memory_bytes_max, cache.retention_min, cache.redis.is_none()),
            (default.memory_bytes_max, default.retention_min, default.redis.is_none())
        );
    }
}
