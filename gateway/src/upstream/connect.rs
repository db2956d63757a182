//! Connecting to the application, bounded as a whole.

use std::{
    error::Error as StdError,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::{HttpConnector, dns::GaiResolver};
use tower::Service;

type BoxError = Box<dyn StdError + Send + Sync>;

/// Makes TCP connections to what `resolver` finds, one address after the other, each of which has its part of `limit`: one that
/// swallows what is sent to it must not use up the time of those behind it.
pub(super) fn tcp<R>(resolver: R, limit: Duration) -> HttpConnector<R> {
    let mut tcp = HttpConnector::new_with_resolver(resolver);
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(Duration::from_secs(60)));
    tcp.set_connect_timeout(Some(limit));
    tcp
}

/// A connector with a time limit over name resolution, TCP and TLS. The inner one bounds only TCP; but a TLS handshake that
/// stalls has sent nothing either, and must not pass for an application that may be at work.
#[derive(Clone)]
pub(super) struct Connector<S = HttpsConnector<HttpConnector<GaiResolver>>> {
    inner: S,
    limit: Duration,
}

/// Connecting took too long.
#[derive(Debug, thiserror::Error)]
#[error("connecting took longer than permitted")]
struct TooLong;

impl<S> Connector<S> {
    pub(super) fn new(inner: S, limit: Duration) -> Self {
        Self { inner, limit }
    }
}

impl<S> Service<Uri> for Connector<S>
where
    S: Service<Uri, Error: Into<BoxError>, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connected = tokio::time::timeout(self.limit, self.inner.call(uri));
        Box::pin(async { connected.await.map_err(|_| TooLong)?.map_err(Into::into) })
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, net::SocketAddr, sync::Arc};

    use hyper_rustls::HttpsConnectorBuilder;
    use hyper_util::client::legacy::connect::dns::Name;
    use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
    use tokio::{
        net::{TcpListener, TcpSocket, TcpStream},
        time::timeout,
    };

    use super::*;

    #[tokio::test]
    async fn a_handshake_that_stalls_is_given_up() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let https = HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1().build();
        let mut connector = Connector::new(https, Duration::from_millis(100));
        let uri = format!("https://{}/", silent.local_addr().unwrap()).parse().unwrap();
        let refused = connector.call(uri).await.err().unwrap();
        assert!(refused.is::<TooLong>(), "{refused}");
    }

    /// A listener whose queue is full: the kernel drops what comes for it, and whoever connects waits.
    async fn black_hole() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(connected) = timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
            queued.push(connected.unwrap());
        }
        (address, listener, queued)
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_time_for_the_others_of_its_name() {
        const LIMIT: Duration = Duration::from_secs(3);
        let (hole, _listener, _queued) = black_hole().await;
        let good = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [hole, good.local_addr().unwrap()];
        let resolver = tower::service_fn(move |_: Name| async move { Ok::<_, Infallible>(addresses.into_iter()) });
        let mut connector = Connector::new(tcp(resolver, LIMIT), LIMIT);
        connector.call(Uri::from_static("http://application/")).await.expect("the second address is tried in time");
        timeout(LIMIT, good.accept()).await.expect("it is the one that answers").unwrap();
    }
}
