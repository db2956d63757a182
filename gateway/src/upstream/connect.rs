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
use hyper_util::client::legacy::connect::HttpConnector;
use tower::Service;

type BoxError = Box<dyn StdError + Send + Sync>;
type Https = HttpsConnector<HttpConnector>;

/// A connector with a time limit over name resolution, TCP and TLS. The inner one bounds only TCP; but a TLS handshake that
/// stalls has sent nothing either, and must not pass for an application that may be at work.
#[derive(Clone)]
pub(super) struct Connector {
    https: Https,
    limit: Duration,
}

/// Connecting took too long.
#[derive(Debug, thiserror::Error)]
#[error("connecting took longer than permitted")]
struct TooLong;

impl Connector {
    pub(super) fn new(https: Https, limit: Duration) -> Self {
        Self { https, limit }
    }
}

impl Service<Uri> for Connector {
    type Response = <Https as Service<Uri>>::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.https.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connected = tokio::time::timeout(self.limit, self.https.call(uri));
        Box::pin(async { connected.await.map_err(|_| TooLong)? })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hyper_rustls::HttpsConnectorBuilder;
    use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
    use tokio::net::TcpListener;

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
}
