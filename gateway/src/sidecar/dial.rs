//! One connection to one sidecar.

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use http::{Uri, uri::Authority};
use hyper_util::rt::TokioIo;
use oncegate_runtime::tls::ClientTls;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tonic::transport::{Channel, Endpoint};
use tower::Service;

/// How often an idle connection is asked whether it is alive, and how long the answer may take: a sidecar that vanished
/// silently is noticed before an event waits for it.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a sidecar is, and how to speak to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Dial {
    /// Over TCP; `tls` holds the name that the certificate has to be for.
    Tcp { address: SocketAddr, authority: Authority, tls: Option<String> },
    /// Over a Unix socket.
    Unix(PathBuf),
}

impl Dial {
    /// All that two may differ in.
    fn order(&self) -> (Option<SocketAddr>, &str, Option<&str>, Option<&PathBuf>) {
        match self {
            Self::Tcp { address, authority, tls } => (Some(*address), authority.as_str(), tls.as_deref(), None),
            Self::Unix(path) => (None, "", None, Some(path)),
        }
    }
}

impl PartialOrd for Dial {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Dial {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order().cmp(&other.order())
    }
}

/// What a connection is made of: bytes in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Connects, TLS included, within `limit`.
pub(super) async fn connect(dial: &Dial, tls: Option<&ClientTls>, limit: Duration) -> io::Result<Box<dyn Stream>> {
    let connecting = async {
        match dial {
            Dial::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn Stream>),
            Dial::Tcp { address, tls: name, .. } => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                match (name, tls) {
                    (Some(name), Some(tls)) => {
                        let name = ServerName::try_from(name.clone()).map_err(io::Error::other)?;
                        Ok(Box::new(tls.connect(name, stream).await?) as Box<dyn Stream>)
                    }
                    (None, _) => Ok(Box::new(stream) as Box<dyn Stream>),
                    // What is meant for TLS is never sent in the clear.
                    (Some(_), None) => Err(io::Error::other("TLS is wanted and not configured")),
                }
            }
        }
    };
    timeout(limit, connecting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// A channel that connects when it is first needed, and again when the connection is lost.
pub(super) fn channel(dial: &Dial, tls: Option<ClientTls>, limit: Duration) -> Channel {
    endpoint(dial, limit).connect_with_connector_lazy(connector(dial.clone(), tls, limit))
}

/// What calls name as their origin.
pub(super) fn origin(dial: &Dial) -> Uri {
    let (scheme, authority) = match dial {
        Dial::Tcp { authority, tls: Some(_), .. } => ("https", authority.as_str()),
        Dial::Tcp { authority, tls: None, .. } => ("http", authority.as_str()),
        Dial::Unix(_) => ("http", "localhost"),
    };
    let origin = Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build();
    origin.expect("scheme, authority and path make a URI")
}

fn endpoint(dial: &Dial, limit: Duration) -> Endpoint {
    // A placeholder: the connector knows where to go.
    Endpoint::from_static("http://sidecar")
        .origin(origin(dial))
        .connect_timeout(limit)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

fn connector(
    dial: Dial,
    tls: Option<ClientTls>,
    limit: Duration,
) -> impl Service<Uri, Response = TokioIo<Box<dyn Stream>>, Error = io::Error, Future: Send> + Send + 'static {
    tower::service_fn(move |_: Uri| {
        let (dial, tls) = (dial.clone(), tls.clone());
        async move { connect(&dial, tls.as_ref(), limit).await.map(TokioIo::new) }
    })
}
