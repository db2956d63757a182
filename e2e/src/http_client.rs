//! A client for the tests: one request, one connection, one answer.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header::HOST};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};

use crate::secrets::told_by_anybody;

/// Longer than a gateway ever takes to answer.
const DEADLINE: Duration = Duration::from_secs(60);

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null if it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A header's value as text, empty when there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// Posts a body.
pub async fn post(address: SocketAddr, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Result<Answer> {
    send(address, Method::POST, path, headers, body).await
}

/// Gets a path.
pub async fn get(address: SocketAddr, path: &str) -> Result<Answer> {
    send(address, Method::GET, path, &[], Bytes::new()).await
}

/// Sends any request.
pub async fn send(
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Result<Answer> {
    let connect = timeout(DEADLINE, TcpStream::connect(address)).await;
    let stream = connect.ok().and_then(Result::ok).with_context(|| format!("cannot connect to {address}"))?;
    send_over(stream, address, method, path, headers, body).await
}

/// Sends any request over an existing connection, and closes it.
///
/// # Panics
/// If the answer contains a secret that any program of this process was given.
pub async fn send_over(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Result<Answer> {
    let mut request = Request::builder().method(method).uri(path).header(HOST, address.to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body.into()))?;
    let exchange = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends by itself when the sender is dropped.
        tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        anyhow::Ok(Answer { status: head.status, headers: head.headers, body })
    };
    let answer: Answer = timeout(DEADLINE, exchange)
        .await
        .with_context(|| format!("no answer from {address} within {DEADLINE:?}"))??;
    // No answer to anybody may contain a secret. An error would not do: to most callers under faults an error is one more
    // request that was not answered, and they go on.
    let text = format!("{:?}\n{}", answer.headers, String::from_utf8_lossy(&answer.body));
    if let Some(told) = told_by_anybody(&text) {
        panic!("{address} has told a secret: {told}");
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        secrets::Secrets,
        upstream::{Answer, Upstream},
    };

    const SECRET: &str = "whsec_in_an_answer";

    /// What a caller that takes every error for an unanswered request makes of such an answer.
    async fn takes_errors_lightly(answer: Answer) -> bool {
        let upstream = Upstream::start().await.unwrap();
        upstream.answer_next([answer]);
        let worker = tokio::spawn(async move { get(upstream.address(), "/").await.is_ok() });
        worker.await.is_err_and(|error| error.is_panic())
    }

    #[tokio::test]
    async fn nobody_can_overlook_a_secret_in_an_answer() {
        Secrets::default().add(SECRET);
        assert!(takes_errors_lightly(Answer::ok().body(format!("before {SECRET} after"))).await);
        assert!(takes_errors_lightly(Answer::status(503).header("x-told", SECRET)).await);
        assert!(!takes_errors_lightly(Answer::ok().body("nothing to see")).await);
        assert!(!takes_errors_lightly(Answer::reset()).await);
    }
}
