//! Fetches a certificate: https, no redirects, public addresses only, 64 KiB and two seconds at most (W9).

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Uri, header};
use http_body::Body;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{
        Client,
        connect::{
            HttpConnector,
            dns::{GaiResolver, Name},
        },
    },
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use tower::Service;

use super::{CertUrl, Lack, address::is_public};

/// For connecting, TLS and the whole answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);

/// The most bytes of an answer; a chain has about six thousand.
pub(super) const BYTES_MAX: usize = 64 * 1024;

/// Why nothing usable came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("no connection, or it broke")]
    Connection(#[source] hyper_util::client::legacy::Error),
    /// Redirects too: whoever can redirect us would choose the address.
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("the answer is too large or broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("no answer in time")]
    TimedOut,
}

impl FetchError {
    /// What the error says about the certificate. Only PayPal's own answer that there is none means that there is none.
    pub(super) fn lack(&self) -> Lack {
        match self {
            Self::Status(StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND | StatusCode::GONE) => Lack::Name,
            Self::Status(_) | Self::Connection(_) | Self::Body(_) | Self::TimedOut => Lack::Source,
        }
    }
}

/// The client.
pub(crate) struct Fetcher {
    client: Client<HttpsConnector<HttpConnector<PublicOnly>>, Empty<Bytes>>,
}

impl Fetcher {
    /// Trusts the public roots that are compiled in. Connects to nobody yet.
    pub(crate) fn new() -> io::Result<Self> {
        let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new_with_resolver(PublicOnly(GaiResolver::new()));
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(TIMEOUT));
        let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1();
        // A certificate is fetched every few months: no connection is kept.
        let client =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector.wrap_connector(tcp));
        Ok(Self { client })
    }

    /// The answer's body.
    pub(super) async fn fetch(&self, url: &CertUrl) -> Result<Bytes, FetchError> {
        tokio::time::timeout(TIMEOUT, async {
            read(self.client.request(request(url)).await.map_err(FetchError::Connection)?).await
        })
        .await
        .unwrap_or(Err(FetchError::TimedOut))
    }
}

fn request(url: &CertUrl) -> Request<Empty<Bytes>> {
    let mut request = Request::new(Empty::new());
    *request.uri_mut() =
        Uri::try_from(url.to_string()).expect("a scheme, a host and a path of letters and digits are a URI");
    let headers = request.headers_mut();
    headers.insert(header::ACCEPT, http::HeaderValue::from_static("application/x-pem-file, */*"));
    // PayPal has answered 403 to requests of clients that do not say who they are (paypal/ipn-code-samples, pull request 30).
    headers.insert(header::USER_AGENT, crate::USER_AGENT);
    request
}

async fn read<B>(response: Response<B>) -> Result<Bytes, FetchError>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if response.status() != StatusCode::OK {
        return Err(FetchError::Status(response.status()));
    }
    let body = Limited::new(response.into_body(), BYTES_MAX).collect().await.map_err(FetchError::Body)?;
    Ok(body.to_bytes())
}

/// A resolver that leaves out private addresses. Exactly what it returns is connected to, so a name cannot change its
/// meaning in between.
#[derive(Clone)]
struct PublicOnly(GaiResolver);

impl Service<Name> for PublicOnly {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolving = self.0.call(name);
        Box::pin(async move { public(resolving.await?) })
    }
}

fn public(addresses: impl Iterator<Item = SocketAddr>) -> io::Result<std::vec::IntoIter<SocketAddr>> {
    let public: Vec<_> = addresses.filter(|address| is_public(address.ip())).collect();
    if public.is_empty() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the name has no public address"));
    }
    Ok(public.into_iter())
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    #[tokio::test]
    async fn names_that_point_inwards_are_not_connected_to() {
        let mut resolver = PublicOnly(GaiResolver::new());
        let error = resolver.call("localhost".parse().unwrap()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let mixed = ["10.0.0.1:443", "64.4.250.37:443", "[::1]:443"].map(|text| text.parse().unwrap());
        let kept: Vec<_> = public(mixed.into_iter()).unwrap().collect();
        assert_eq!(kept, [mixed[1]]);
    }

    #[test]
    fn a_request_says_whose_it_is() {
        let url = "https://api.paypal.com/v1/notifications/certs/CERT-1";
        let request = request(&CertUrl::parse(url.as_bytes(), super::super::Environment::Live).unwrap());
        assert_eq!(request.uri(), url);
        assert!(request.headers()[header::USER_AGENT].to_str().unwrap().starts_with("oncegate/"), "{request:?}");
    }

    #[tokio::test]
    async fn redirects_errors_and_floods_are_no_certificate() {
        let answer = |status: u16, bytes: usize| {
            Response::builder()
                .status(status)
                .header(header::LOCATION, "https://api.paypal.com/")
                .body(Full::new(Bytes::from(vec![b'x'; bytes])))
                .unwrap()
        };
        for (status, lack) in [
            (201, Lack::Source),
            (204, Lack::Source),
            (301, Lack::Source),
            (302, Lack::Source),
            (307, Lack::Source),
            (400, Lack::Name),
            (403, Lack::Source),
            (404, Lack::Name),
            (410, Lack::Name),
            (429, Lack::Source),
            (500, Lack::Source),
            (503, Lack::Source),
        ] {
            let error = read(answer(status, 1)).await.unwrap_err();
            assert!(matches!(error, FetchError::Status(_)), "{status}");
            assert_eq!(error.lack(), lack, "{status}");
        }
        assert!(matches!(read(answer(200, BYTES_MAX + 1)).await, Err(error) if error.lack() == Lack::Source));
        assert_eq!(read(answer(200, BYTES_MAX)).await.unwrap().len(), BYTES_MAX);
        assert!(matches!(read(answer(200, BYTES_MAX + 1)).await, Err(FetchError::Body(_))));
    }

    #[test]
    fn a_client_can_be_made_without_a_runtime() {
        assert!(Fetcher::new().is_ok());
    }
}
