//! HTTP requests that commands send: each over a connection of its own, as providers send theirs.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use oncegate_runtime::{
    reload::FilesError,
    tls::{ClientTls, ClientTlsFiles, Trust, http_client_config},
};

/// More than any answer meant for a provider.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The status.
    pub(crate) status: StatusCode,
    /// The body.
    pub(crate) body: Bytes,
}

/// Why there was no answer.
#[derive(Debug)]
pub(crate) enum SendError {
    /// There was no connection: nothing was sent.
    NotConnected(anyhow::Error),
    /// It may have been received.
    NoAnswer(anyhow::Error),
}

impl std::fmt::Display for SendError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotConnected(error) => write!(f, "no connection: {error:#}"),
            Self::NoAnswer(error) => write!(f, "no answer: {error:#}"),
        }
    }
}

/// Sends requests, by http and https.
#[derive(Clone, Debug)]
pub(crate) struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
}

impl HttpClient {
    /// A client that waits this long for each answer.
    pub(crate) fn new(timeout: Duration) -> Self {
        let connector = connector();
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Self { client, timeout }
    }

    /// Sends one request and reads the answer.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Result<Answer, SendError> {
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| {
                if error.is_connect() {
                    SendError::NotConnected(error.into())
                } else {
                    SendError::NoAnswer(error.into())
                }
            })?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, BODY_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| SendError::NoAnswer(anyhow::anyhow!(error)))?;
            Ok(Answer { status: head.status, body: body.to_bytes() })
        };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(SendError::NoAnswer(anyhow::anyhow!("no answer within {:?}", self.timeout))),
        }
    }
}

/// Connects by http and https.
pub(crate) fn connector() -> HttpsConnector<HttpConnector> {
    // A machine without root certificates can still speak plain HTTP to itself.
    let tls = http_client_config(Trust::System).or_else(|_| http_client_config(Trust::Nobody));
    let tls = tls.expect("nothing is read for nobody, and the provider of cryptography does TLS");
    HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(by_tcp())
}

/// The same, trusting only these authorities.
pub(crate) fn connector_trusting(authorities: &Path) -> Result<HttpsConnector<HttpConnector>, FilesError> {
    let files = ClientTlsFiles { ca: Some(authorities.to_owned()), identity: None };
    let tls = ClientTls::read(&files, &[])?;
    let config = (*tls.config()).clone();
    Ok(HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1().wrap_connector(by_tcp()))
}

/// Without delaying small packets: a request right after a TLS handshake would wait for the server's delayed
/// acknowledgement of it, which takes 40 ms.
fn by_tcp() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector
}

/// A URL, with a default path if it has none, so that `http://host:port` is enough.
pub(crate) fn with_default_path(url: &str, path: &str) -> Result<http::Uri> {
    let uri: http::Uri = url.parse().with_context(|| format!("{url} is not a URL"))?;
    anyhow::ensure!(
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some(),
        "{url} is not a URL that starts with http:// or https://"
    );
    if !matches!(uri.path(), "" | "/") {
        return Ok(uri);
    }
    let mut parts = uri.into_parts();
    parts.path_and_query = Some(path.parse().with_context(|| format!("{path} is not a path"))?);
    Ok(http::Uri::from_parts(parts)?)
}

#[cfg(test)]
mod tests {
    use hyper_rustls::MaybeHttpsStream;
    use tower::ServiceExt as _;

    use super::{connector, with_default_path};

    #[tokio::test]
    async fn small_packets_are_sent_at_once() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let MaybeHttpsStream::Http(connected) = connector().oneshot(url).await.unwrap() else { panic!("not by http") };
        assert!(connected.inner().nodelay().unwrap());
    }

    #[test]
    fn a_path_is_added_only_where_there_is_none() {
        for (given, expected) in [
            ("http://127.0.0.1:8080", Some("http://127.0.0.1:8080/a/b")),
            ("https://example.com/", Some("https://example.com/a/b")),
            ("https://example.com/own?x=1", Some("https://example.com/own?x=1")),
            ("127.0.0.1:8080", None),
            ("/path", None),
            ("ftp://example.com", None),
        ] {
            let uri = with_default_path(given, "/a/b").ok().map(|uri| uri.to_string());
            assert_eq!(uri.as_deref(), expected, "{given}");
        }
    }
}
