//! Signed webhooks to a gateway.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use oncegate_runtime::secret::Secret;
use tower::ServiceExt as _;

use super::{
    message,
    target::{Fault, Verdict},
};
use crate::simulate::stripe;

/// More than any answer meant for a provider.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// How long a signature is reused for an event that is sent again: well within what a gateway accepts (five minutes).
const SIGNATURE_AGE_MAX: Duration = Duration::from_secs(60);
/// Events whose signed body is kept; beyond it they are signed each time.
const KEPT_MAX: usize = 10_000;

/// What the callers of a run have in common.
pub(super) struct Shared {
    pub(super) url: Uri,
    pub(super) secret: Secret,
    pub(super) run: String,
    pub(super) body_bytes: usize,
    pub(super) timeout: Duration,
    pub(super) connector: HttpsConnector<HttpConnector>,
}

/// One caller on a connection of its own, which it keeps open.
pub(super) struct Gateway {
    shared: Arc<Shared>,
    connection: Option<SendRequest<Full<Bytes>>>,
    host: HeaderValue,
    /// Events that are sent more than once: body and signature are made once a minute.
    kept: HashMap<u64, Signed>,
    keep_from: u64,
}

struct Signed {
    body: Bytes,
    signature: HeaderValue,
    at: Instant,
}

impl Gateway {
    /// A caller that is not connected yet. Events from `keep_from` on are the ones sent repeatedly.
    pub(super) fn new(shared: Arc<Shared>, keep_from: u64) -> Self {
        let host = shared.url.authority().map_or("", |authority| authority.as_str());
        let host = HeaderValue::from_str(host).expect("an authority is a header's value");
        Self { shared, connection: None, host, kept: HashMap::new(), keep_from }
    }

    /// Opens the connection.
    pub(super) async fn connect(&mut self) -> Result<(), Fault> {
        let io = self.shared.connector.clone().oneshot(self.shared.url.clone()).await;
        let io = io.map_err(|error| lost("no connection", &*error))?;
        let (sender, connection) = http1::handshake(io).await.map_err(|error| lost("no connection", &error))?;
        // Ends with the sender, or when the gateway closes the connection; the request gets its error too.
        tokio::spawn(connection);
        self.connection = Some(sender);
        Ok(())
    }

    /// Sends an event, once.
    pub(super) async fn send(&mut self, event: u64) -> Result<Verdict, Fault> {
        let timeout = self.shared.timeout;
        match tokio::time::timeout(timeout, self.exchange(event)).await {
            Ok(verdict) => verdict,
            Err(_) => {
                // A late answer would be taken for that of the next request.
                self.connection = None;
                Err(Fault::timed_out())
            }
        }
    }

    async fn exchange(&mut self, event: u64) -> Result<Verdict, Fault> {
        let request = self.request(event);
        let ready = match &mut self.connection {
            Some(connection) => connection.ready().await.is_ok(),
            None => false,
        };
        if !ready {
            self.connect().await?;
        }
        let connection = self.connection.as_mut().expect("connected above");
        let answer = async {
            let response = connection.send_request(request).await.map_err(|error| lost("no answer", &error))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            Ok((head.status, body.map_err(|error| lost("no answer", &*error))?.to_bytes()))
        };
        let (status, body) = match answer.await {
            Ok(answer) => answer,
            Err(fault) => {
                self.connection = None;
                return Err(fault);
            }
        };
        verdict(status, &body)
    }

    fn request(&mut self, event: u64) -> Request<Full<Bytes>> {
        let (body, signature) = self.signed(event);
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        let path = self.shared.url.path_and_query().expect("the URL was given a path").clone();
        *request.uri_mut() = Uri::from(path);
        let mut headers = HeaderMap::with_capacity(4);
        headers.insert(header::HOST, self.host.clone());
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(stripe::SIGNATURE, signature);
        *request.headers_mut() = headers;
        request
    }

    fn signed(&mut self, event: u64) -> (Bytes, HeaderValue) {
        let now = Instant::now();
        if let Some(kept) = self.kept.get(&event)
            && now.duration_since(kept.at) < SIGNATURE_AGE_MAX
        {
            return (kept.body.clone(), kept.signature.clone());
        }
        let body = match self.kept.get(&event) {
            Some(kept) => kept.body.clone(),
            None => body(&message::event_id(&self.shared.run, event), self.shared.body_bytes),
        };
        let signature = stripe::signature(&self.shared.secret, &body, SystemTime::now());
        if event >= self.keep_from && self.kept.len() < KEPT_MAX {
            self.kept.insert(event, Signed { body: body.clone(), signature: signature.clone(), at: now });
        }
        (body, signature)
    }
}

/// An event of Stripe's shape and about this many bytes.
fn body(event_id: &str, bytes: usize) -> Bytes {
    let event_type = message::EVENT_TYPE;
    let text = |padding: &str| {
        format!(
            r#"{{"id":"{event_id}","object":"event","api_version":"2026-08-27","type":"{event_type}","livemode":false,"#
        ) + r#""pending_webhooks":1,"data":{"object":{"id":"pi_bench","object":"payment_intent","amount":4200,"#
            + &format!(r#""currency":"eur","livemode":false,"description":"{padding}"}}}}}}"#)
    };
    let short = text("").len();
    text(&"a".repeat(bytes.saturating_sub(short))).into()
}

/// What the gateway's answer says about the event.
fn verdict(status: StatusCode, body: &[u8]) -> Result<Verdict, Fault> {
    let answer: serde_json::Value;
    let word = match body {
        br#"{"status":"processed"}"# => Some("processed"),
        br#"{"status":"already_processed"}"# => Some("already_processed"),
        body => {
            answer = serde_json::from_slice(body).unwrap_or_default();
            answer["status"].as_str()
        }
    };
    match (status.as_u16(), word) {
        (200, Some("processed")) => Ok(Verdict::Granted),
        (200, Some("already_processed")) => Ok(Verdict::Completed),
        // 200 where GATEWAY_IN_PROGRESS_STATUS says so.
        (200 | 409, Some("in_progress")) => Ok(Verdict::InProgress),
        (200, Some("held")) | (422, Some(_)) => Ok(Verdict::Refused),
        // A gateway always says one. Without any it was a proxy, or another server.
        (status, word) => {
            Err(Fault { code: format!("{status} {}", word.unwrap_or("without a word")), answered: word.is_some() })
        }
    }
}

fn lost(what: &str, error: &(dyn std::error::Error + 'static)) -> Fault {
    tracing::debug!(error, "{what}");
    // The root cause is what helps, and there are only a few: too many open files, connection refused.
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    Fault { code: format!("{what}: {cause}"), answered: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_json_of_the_size_asked_for() {
        for bytes in [0, 2_048] {
            let body = body("evt_1", bytes);
            assert!(body.len() >= bytes && (bytes == 0 || body.len() == bytes), "{}", body.len());
            let event: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!((event["id"].as_str(), event["type"].as_str()), (Some("evt_1"), Some(message::EVENT_TYPE)));
        }
    }

    #[test]
    fn only_what_the_gateway_says_is_done_counts_as_done() {
        let verdict = |status: u16, body: &str| {
            verdict(StatusCode::from_u16(status).unwrap(), body.as_bytes())
                .map_err(|fault| (fault.code, if fault.answered { "a gateway" } else { "another server" }))
        };
        assert_eq!(verdict(200, r#"{"status":"processed"}"#), Ok(Verdict::Granted));
        assert_eq!(verdict(200, r#"{ "status": "already_processed" }"#), Ok(Verdict::Completed));
        for status in [200, 409] {
            assert_eq!(verdict(status, r#"{"status":"in_progress"}"#), Ok(Verdict::InProgress));
        }
        assert_eq!(verdict(422, r#"{"status":"refused"}"#), Ok(Verdict::Refused));
        for (status, body) in [(200, "ok"), (422, "no"), (502, "<html>"), (404, "{}")] {
            assert_eq!(verdict(status, body), Err((format!("{status} without a word"), "another server")), "{body}");
        }
        assert_eq!(verdict(503, r#"{"status":"overloaded"}"#), Err(("503 overloaded".to_owned(), "a gateway")));
    }
}
