//! Where sidecars are: what SIDECAR_URL says, and what its names resolve to at the moment.

use std::{
    borrow::Cow,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
};

use http::uri::Authority;
use oncegate_runtime::{config::Problem, server::Address};

use super::dial::Dial;
use crate::url;

/// The port of a URL that names none.
const PORT: u16 = 50_051;

/// One part of SIDECAR_URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// A name or address, and a port.
    Tcp { host: String, port: u16, authority: Authority, tls: bool },
    /// A Unix socket.
    Unix(PathBuf),
}

impl Target {
    /// Whether only this machine can listen in on it.
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Tcp { host, .. } => {
                host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
            }
            Self::Unix(_) => true,
        }
    }

    /// Whether it is `listener`, on this machine, by an address or as localhost.
    pub(super) fn is_at(&self, listener: &Address) -> bool {
        match (self, listener) {
            (Self::Unix(path), Address::Unix(own)) => path == own,
            (Self::Tcp { host, port, .. }, Address::Tcp(own)) => {
                let ip = own.ip();
                let by_address = host.parse() == Ok(ip);
                *port == own.port() && (by_address || self.is_local() && (ip.is_loopback() || ip.is_unspecified()))
            }
            (Self::Unix(_), Address::Tcp(_)) | (Self::Tcp { .. }, Address::Unix(_)) => false,
        }
    }

    /// Its current addresses, ready to be dialled.
    pub(super) async fn dials(&self, resolver: &dyn Resolve) -> io::Result<Vec<Dial>> {
        match self {
            Self::Unix(path) => Ok(vec![Dial::Unix(path.clone())]),
            Self::Tcp { host, port, authority, tls } => {
                let tls = tls.then(|| host.clone());
                let dial = |address| Dial::Tcp { address, authority: authority.clone(), tls: tls.clone() };
                Ok(resolver.resolve(host, *port).await?.into_iter().map(dial).collect())
            }
        }
    }

    /// Its name, or the socket's path.
    pub(super) fn host(&self) -> Cow<'_, str> {
        match self {
            Self::Tcp { host, .. } => host.into(),
            Self::Unix(path) => path.to_string_lossy(),
        }
    }

    pub(super) fn is_tls(&self) -> bool {
        matches!(self, Self::Tcp { tls: true, .. })
    }
}

/// The targets of a list of URLs, separated by commas; never empty.
pub(super) fn targets(text: &str) -> Result<Vec<Target>, Problem> {
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.is_empty() {
        return Err(problem(text, "names no sidecar"));
    }
    parts.into_iter().map(target).collect()
}

fn target(text: &str) -> Result<Target, Problem> {
    if let Some(path) = text.strip_prefix("unix:") {
        // As in unix:///run/oncegate/grpc.sock.
        let path = Path::new(path.strip_prefix("//").unwrap_or(path));
        return if path.as_os_str().is_empty() {
            Err(problem(text, "names no socket"))
        } else {
            Ok(Target::Unix(path.to_owned()))
        };
    }
    let (uri, port) = url::parse(text).map_err(|bad| problem(text, &bad.to_string()))?;
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(problem(text, "begins with none of http://, https:// and unix:")),
    };
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(problem(text, "may hold no path"));
    }
    let authority = uri.authority().ok_or_else(|| problem(text, "names no host"))?.clone();
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Target::Tcp { host, port: port.unwrap_or(PORT), authority, tls })
}

fn problem(text: &str, why: &str) -> Problem {
    // Not repeated if it may contain a password, however misspelt it is.
    let text = if text.contains(['@', '?', '#']) { "a URL" } else { text };
    Problem::new(
        "SIDECAR_URL",
        format!(
            "{text} {why}; write for example http://127.0.0.1:50051, https://sidecar:50051 or unix:/run/oncegate/grpc.sock"
        ),
    )
}

/// Resolves names.
pub trait Resolve: Send + Sync + 'static {
    /// All addresses of `host`, each with `port`.
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'a>>;
}

/// The system's resolver: `/etc/hosts`, DNS.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'a>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_sidecars_may_be_named_in_three_ways() {
        let found =
            targets("http://127.0.0.1:1, https://sidecar.payments.svc ,unix:///run/s.sock,http://[::1]:2/").unwrap();
        let shown: Vec<(String, bool, bool)> = found
            .iter()
            .map(|target| match target {
                Target::Tcp { host, port, .. } => (format!("{host} {port}"), target.is_tls(), target.is_local()),
                Target::Unix(path) => (path.display().to_string(), target.is_tls(), target.is_local()),
            })
            .collect();
        let wanted = [
            ("127.0.0.1 1", false, true),
            ("sidecar.payments.svc 50051", true, false),
            ("/run/s.sock", false, true),
            ("::1 2", false, true),
        ];
        assert_eq!(shown, wanted.map(|(text, tls, local)| (text.to_owned(), tls, local)));
    }

    #[test]
    fn a_listener_of_this_machine_is_recognised_by_its_address() {
        for (text, listener, own) in [
            ("http://127.0.0.1:1", "127.0.0.1:1", true),
            ("https://localhost:1", "127.0.0.1:1", true),
            ("http://localhost:1", "0.0.0.0:1", true),
            ("http://[::1]:1", "[::]:1", true),
            ("https://10.0.0.1:1", "10.0.0.1:1", true),
            ("https://10.0.0.2:1", "10.0.0.1:1", false),
            ("http://127.0.0.1:2", "127.0.0.1:1", false),
            // There something else may listen.
            ("http://127.0.0.1:1", "10.0.0.1:1", false),
            ("https://sidecar:1", "0.0.0.0:1", false),
            ("unix:///run/s.sock", "unix:/run/s.sock", true),
            ("unix:/run/other.sock", "unix:/run/s.sock", false),
            ("unix:/run/s.sock", "127.0.0.1:1", false),
            ("http://127.0.0.1:1", "unix:/run/s.sock", false),
        ] {
            assert_eq!(target(text).unwrap().is_at(&listener.parse().unwrap()), own, "{text} {listener}");
        }
    }

    #[test]
    fn what_is_no_sidecar_is_refused() {
        for text in [
            "",
            " , ",
            "127.0.0.1:50051",
            "ftp://x",
            "http://",
            "unix:",
            "unix://",
            "http://x/path",
            "http://x?y",
            "http://x:y",
        ] {
            assert!(targets(text).is_err(), "{text}");
        }
        for text in [
            "http://user:s3cret@host",
            "user:s3cret@host:50051",
            "http://user:p#s3cret@host",
            "http://host?token=s3cret",
            "http://host/#s3cret",
        ] {
            let said = targets(text).unwrap_err().to_string();
            assert!(said.starts_with("SIDECAR_URL: a URL ") && !said.contains("s3cret"), "{said}");
        }
    }
}
