//! HTTP and the HMAC of the body with nothing behind it: the best that a gateway could do on one thread. Also serves
//! as the application behind a measured gateway, which accepts everything (`--application`).

use std::{convert::Infallible, net::SocketAddr};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::Parser as _;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use sha2::Sha256;
use tokio::net::TcpListener;

#[derive(clap::Parser, Debug)]
struct Options {
    /// Where to listen
    address: SocketAddr,

    /// What Stripe's signatures are made with
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET", default_value = "")]
    secret: String,

    /// Take everything, signed or not
    #[arg(long)]
    application: bool,
}

/// Whether the header's signature is that of the body.
fn is_genuine(header: &HeaderValue, body: &[u8], key: &Hmac<Sha256>) -> bool {
    let Ok(header) = header.to_str() else { return false };
    let Some((time, signature)) = header.split_once(",v1=") else { return false };
    let Some(time) = time.strip_prefix("t=") else { return false };
    let mut expected = [0; 32];
    if hex::decode_to_slice(signature, &mut expected).is_err() {
        return false;
    }
    let mut mac = key.clone();
    mac.update(time.as_bytes());
    mac.update(b".");
    mac.update(body);
    mac.verify_slice(&expected).is_ok()
}

async fn answer(request: Request<Incoming>, key: Option<&Hmac<Sha256>>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let genuine = match (body.collect().await, key) {
        (Err(_), _) => false,
        (Ok(_), None) => true,
        (Ok(body), Some(key)) => {
            head.headers.get("stripe-signature").is_some_and(|header| is_genuine(header, &body.to_bytes(), key))
        }
    };
    let mut response = Response::new(Full::new(Bytes::from_static(br#"{"status":"already_processed"}"#)));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if !genuine {
        *response.status_mut() = StatusCode::UNAUTHORIZED;
        *response.body_mut() = Full::new(Bytes::from_static(br#"{"status":"unauthorized"}"#));
    }
    Ok(response)
}

fn main() -> Result<()> {
    let options = Options::parse();
    let key = Hmac::<Sha256>::new_from_slice(options.secret.as_bytes()).context("no key")?;
    let key = (!options.application).then_some(key);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(options.address).await.context("cannot listen")?;
        loop {
            let (stream, _) = listener.accept().await.context("cannot accept")?;
            stream.set_nodelay(true)?;
            let key = key.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| answer(request, key.as_ref()));
                // A client that goes away is not our error.
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    })
}
