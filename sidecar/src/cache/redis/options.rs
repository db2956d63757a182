//! Where Redis is, by a URL or in parts: one server, Sentinel or Cluster (C5), in the clear or by TLS.

use std::fmt;

use fred::types::config::{Config, ServerConfig};
use oncegate_runtime::{
    config::scheme,
    reload::FilesError,
    tls::{ClientTls, ClientTlsFiles},
};
use rustls::ClientConfig;

/// Where Redis is, and how to get in.
#[derive(Clone)]
pub struct RedisOptions {
    pub(super) config: Config,
    tls: Option<ClientTls>,
}

impl fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The configuration holds passwords.
        f.debug_struct("RedisOptions").finish_non_exhaustive()
    }
}

/// The URL cannot be used. Does not hold it, because it may contain a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "is no URL of Redis: redis://[user:password@]host[:port][/database], rediss:// for TLS, \
     redis-cluster://host:port?node=..., or redis-sentinel://host:port?sentinelServiceName=..."
)]
pub struct RedisUrlError;

/// Redis cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum RedisOptionsError {
    /// By its URL.
    #[error(transparent)]
    Url(#[from] RedisUrlError),
    /// By what its URL begins with.
    #[error("begins with {0}://, and {RedisUrlError}")]
    Scheme(String),
    /// By the files for TLS, or the system's trust roots.
    #[error("begins with rediss://, and TLS cannot be set up")]
    Tls(#[source] FilesError),
}

/// The library's schemes for servers that are reached by TCP. It takes any other one for `redis`, in the clear.
const SCHEMES: [&str; 4] = ["redis", "rediss", "valkey", "valkeys"];

fn is_of_redis(scheme: &str) -> bool {
    let scheme = scheme.to_ascii_lowercase();
    let server = ["-cluster", "-sentinel"].iter().find_map(|kind| scheme.strip_suffix(kind)).unwrap_or(&scheme);
    SCHEMES.contains(&server)
}

/// The URL without its TLS, if its scheme says that there is to be some.
pub(super) fn in_the_clear(url: &str, scheme: &str) -> Option<String> {
    let rest = &url[scheme.len()..];
    let scheme = scheme.to_ascii_lowercase();
    [("rediss", "redis"), ("valkeys", "valkey")]
        .iter()
        .find_map(|(by_tls, plain)| Some(format!("{plain}{}{rest}", scheme.strip_prefix(by_tls)?)))
}

impl RedisOptions {
    /// One server, Sentinel or Cluster, as the URL says (C5); with these certificates, where it says TLS. They are read now.
    ///
    /// # Errors
    /// When it cannot be used, or TLS cannot be set up.
    pub fn from_url(url: &str, certificates: &ClientTlsFiles) -> Result<RedisOptions, RedisOptionsError> {
        // The library overlooks blanks around it, and so must what is decided by it here: whether there is to be TLS.
        let url = url.trim();
        let scheme = scheme(url).ok_or(RedisUrlError)?;
        if !is_of_redis(scheme) {
            return Err(RedisOptionsError::Scheme(scheme.to_owned()));
        }
        // The library's own way to TLS takes the system's roots alone, and fails if it does not like a single one.
        let by_tls = in_the_clear(url, scheme);
        let mut config = Config::from_url(by_tls.as_deref().unwrap_or(url)).map_err(|_| RedisUrlError)?;
        // That one is about the first connection: Redis is not needed at start (C4).
        config.fail_fast = false;
        let tls = match by_tls {
            None => None,
            Some(_) => Some(ClientTls::read(certificates, &[]).map_err(RedisOptionsError::Tls)?),
        };
        config.tls = tls.as_ref().map(|tls| ClientConfig::clone(&tls.config()).into());
        Ok(RedisOptions { config, tls })
    }

    /// The certificates that TLS is spoken with, if it is.
    pub fn tls(&self) -> Option<&ClientTls> {
        self.tls.as_ref()
    }

    /// With a password where there is none yet; None where there is another one.
    pub fn with_password(mut self, password: &str) -> Option<RedisOptions> {
        match &self.config.password {
            Some(known) if known != password => None,
            _ => {
                self.config.password = Some(password.to_owned());
                Some(self)
            }
        }
    }

    /// One server, as the first version was configured.
    pub fn from_parts(host: &str, port: u16, password: Option<String>) -> RedisOptions {
        let config = Config {
            fail_fast: false,
            password,
            server: ServerConfig::new_centralized(host, port),
            ..Config::default()
        };
        RedisOptions { config, tls: None }
    }
}
