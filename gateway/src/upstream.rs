//! The application behind the gateway: what it is sent, and what its answers mean (G5, G7).

mod connect;

use std::{
    borrow::Cow,
    error::Error as StdError,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use connect::{Connector, tcp};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header, uri::Authority};
use http_body::Body as _;
use http_body_util::Full;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::dns::GaiResolver},
    rt::{TokioExecutor, TokioTimer},
};
use oncegate_api::{limits::EVENT_ID_BYTES_MAX, v1::FailureKind};
use oncegate_runtime::{
    telemetry,
    throttle::Throttle,
    tls::{TlsError, Trust, http_client_config},
};
use sha2::{Digest as _, Sha256};
use tracing::{Instrument as _, field};

use crate::{
    answer::RetryAfter,
    body::discard,
    config::{OnRefusal, OnUnclear, Policy, UpstreamLimits},
    key::Identity,
    metrics::OutcomeLabel,
    providers::Provider,
    route::Route,
};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const TENANT: HeaderName = HeaderName::from_static("oncegate-tenant");
const PROVIDER: HeaderName = HeaderName::from_static("oncegate-provider");
const EVENT_ID: HeaderName = HeaderName::from_static("oncegate-event-id");
const EVENT_TYPE: HeaderName = HeaderName::from_static("oncegate-event-type");
const ATTEMPT: HeaderName = HeaderName::from_static("oncegate-attempt");
const FENCING_TOKEN: HeaderName = HeaderName::from_static("oncegate-fencing-token");
const LOCK_REMAINING: HeaderName = HeaderName::from_static("oncegate-lock-remaining-ms");
/// Only on what is delivered without a lock.
const ENFORCEMENT: HeaderName = HeaderName::from_static("oncegate-enforcement");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// The client.
pub(crate) struct Upstream {
    client: Client<Connector, Full<Bytes>>,
    limits: UpstreamLimits,
    unreachable: Throttle,
}

/// What one delivery carries.
pub(crate) struct Parcel<'a> {
    pub(crate) route: &'a Route,
    pub(crate) identity: &'a Identity,
    /// The provider's headers, of which only a few are passed on.
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a Bytes,
    /// How long the application has: its time-out, or less if the lock would not outlast that.
    pub(crate) timeout: Duration,
    /// None while the route only observes, for an event that the sidecar would not have granted.
    pub(crate) hold: Option<Hold>,
}

/// What the application is told of the lock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hold {
    pub(crate) attempt: i32,
    pub(crate) fencing_token: i64,
    /// What is left of the lock as this is sent.
    pub(crate) remaining: Duration,
}

/// The most headers that an answer may have. Each answer reserves room for this many.
const HEADERS_MAX: usize = 256;

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reply {
    /// A status line, with Retry-After if there is a usable one.
    Status(StatusCode, Option<Duration>),
    /// Nothing was sent: refused, unreachable, no TLS.
    NotSent,
    /// The connection was lost after sending.
    Lost,
    /// What came back is not an HTTP/1.1 answer.
    Unreadable,
    /// No answer in time.
    TimedOut,
    /// No answer before the gateway had to stop (G9).
    Stopped,
}

/// How a delivery ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Completed {
        code: i32,
    },
    Failed {
        kind: FailureKind,
        /// For people.
        error: String,
        code: Option<i32>,
        /// No other attempt before the lock would have expired: the application may still be at work.
        pause: bool,
        /// The application's Retry-After. Passed on in the answer only: as a pause in the ledger it would use up the
        /// provider's tries.
        retry_after: Option<RetryAfter>,
    },
}

impl Outcome {
    /// The outcome of a reply, by G5.
    pub(crate) fn of(reply: Reply, policy: Policy, timeout: Duration) -> Self {
        let unclear = match policy.unclear {
            OnUnclear::Retryable => FailureKind::Retryable,
            OnUnclear::Unknown => FailureKind::Unknown,
        };
        match reply {
            Reply::Status(status, _) if status.is_success() => Self::Completed { code: i32::from(status.as_u16()) },
            Reply::Status(status, retry_after) => {
                let kind = match status.as_u16() {
                    408 | 425 | 429 | 500..=599 => FailureKind::Retryable,
                    300..=499 => match policy.refusal {
                        OnRefusal::Retryable => FailureKind::Retryable,
                        OnRefusal::Terminal => FailureKind::Terminal,
                    },
                    // Neither success nor refusal: no policy covers it.
                    _ => FailureKind::Retryable,
                };
                Self::Failed {
                    kind,
                    error: format!("upstream answered {}", status.as_u16()),
                    code: Some(i32::from(status.as_u16())),
                    pause: false,
                    retry_after: retry_after.map(RetryAfter::after),
                }
            }
            Reply::NotSent => Self::nothing_sent("upstream cannot be reached"),
            Reply::Unreadable => failed(unclear, "upstream's answer could not be read".to_owned(), false),
            Reply::Lost => failed(unclear, "connection to the upstream was lost after sending".to_owned(), false),
            Reply::TimedOut => {
                no_answer(unclear, format!("upstream did not answer in {}", humantime::format_duration(timeout)))
            }
            Reply::Stopped => no_answer(unclear, "gateway ended before the upstream answered".to_owned()),
        }
    }

    /// The attempt had no effect, so the next one need not wait.
    pub(crate) fn nothing_sent(error: &str) -> Self {
        failed(FailureKind::Retryable, error.to_owned(), false)
    }

    pub(crate) fn label(&self) -> OutcomeLabel {
        match self {
            Self::Completed { .. } => OutcomeLabel::Completed,
            Self::Failed { kind: FailureKind::Terminal, .. } => OutcomeLabel::Terminal,
            Self::Failed { kind: FailureKind::Unknown, .. } => OutcomeLabel::Unknown,
            Self::Failed { kind: FailureKind::Retryable | FailureKind::Unspecified, .. } => OutcomeLabel::Retryable,
        }
    }
}

impl Upstream {
    /// # Errors
    ///
    /// The system's trust roots are needed and there are none.
    pub(crate) fn new(limits: UpstreamLimits, trust: Trust) -> Result<Self, TlsError> {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(http_client_config(trust)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp(GaiResolver::new(), limits.connect_timeout));
        let connector = Connector::new(connector, limits.connect_timeout);
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(limits.idle_timeout)
            // Sends again only what was never written because its connection had gone stale in the pool. A request that may
            // have arrived is never sent again: that is for the lock to decide.
            .retry_canceled_requests(true)
            // With the library's limit of 100, an application that has done its work would count as lost if it sends more.
            .http1_max_headers(HEADERS_MAX)
            .build(connector);
        Ok(Self { client, limits, unreachable: Throttle::default() })
    }

    /// Sends a parcel and waits for the status line, which decides. Redirects are not followed: a 3xx is an answer like any
    /// other. Dropping the future closes the connection.
    pub(crate) async fn deliver(&self, parcel: &Parcel<'_>) -> Reply {
        let mut request = request(parcel, SystemTime::now());
        let application = &parcel.route.application;
        // Not the whole URL: a secret in its query should not turn up in a trace.
        let span = tracing::info_span!(
            "upstream",
            otel.name = "POST",
            otel.kind = "client",
            otel.status_code = field::Empty,
            http.request.method = "POST",
            http.response.status_code = field::Empty,
            server.address = application.url.host(),
            server.port = application.url.port_u16(),
        );
        // If there is a trace, the application's part belongs to it.
        telemetry::inject(&span, request.headers_mut());
        let reply = self.send(request, parcel.timeout).instrument(span.clone()).await;
        if !span.is_disabled() {
            if let Reply::Status(status, _) = &reply {
                span.record("http.response.status_code", status.as_u16());
            }
            if !matches!(&reply, Reply::Status(status, _) if status.as_u16() < 400) {
                span.record("otel.status_code", "ERROR");
            }
        }
        reply
    }

    async fn send(&self, request: Request<Full<Bytes>>, timeout: Duration) -> Reply {
        // Not the whole URL, as in the span.
        let server = request.uri().authority().cloned();
        match tokio::time::timeout(timeout, self.client.request(request)).await {
            Err(_) => Reply::TimedOut,
            Ok(Ok(response)) => {
                let (parts, body) = response.into_parts();
                if !body.is_end_stream() {
                    // Read only so that the connection can be reused; nobody waits for it.
                    tokio::spawn(discard(body, self.limits.body_bytes_max, self.limits.body_timeout));
                }
                Reply::Status(parts.status, retry_after(&parts.headers, SystemTime::now()))
            }
            Ok(Err(error)) if was_not_sent(&error) => {
                self.report(&error, server.as_ref(), "upstream cannot be reached");
                Reply::NotSent
            }
            Ok(Err(error)) if caused_by(&error, hyper::Error::is_parse) => {
                self.report(&error, server.as_ref(), "answer of the upstream cannot be read");
                Reply::Unreadable
            }
            Ok(Err(error)) => {
                self.report(&error, server.as_ref(), "connection to the upstream was lost");
                Reply::Lost
            }
        }
    }

    /// Logs why a request failed: a name that cannot be resolved, a refused connection, a certificate. The attempt's own
    /// record does not hold the cause.
    fn report(&self, error: &(dyn StdError + 'static), server: Option<&Authority>, message: &'static str) {
        if let Some(unreported) = self.unreachable.pass() {
            tracing::warn!(server = server.map(Authority::as_str), error, unreported, "{message}");
        }
    }
}

fn was_not_sent(error: &hyper_util::client::legacy::Error) -> bool {
    error.is_connect() || caused_by(error, hyper::Error::is_canceled)
}

/// Whether the connection failed for this reason.
fn caused_by(error: &hyper_util::client::legacy::Error, reason: fn(&hyper::Error) -> bool) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if cause.downcast_ref::<hyper::Error>().is_some_and(reason) {
            return true;
        }
        source = cause.source();
    }
    false
}

/// Builds the request (G7). Headers are picked, not filtered: only those named here are passed on, so that no inbound copy
/// of an internal header ever is (W7).
fn request(parcel: &Parcel<'_>, now: SystemTime) -> Request<Full<Bytes>> {
    let Parcel { route, identity, .. } = parcel;
    let mut request = Request::new(Full::new(parcel.body.clone()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = route.application.url.clone();
    let headers = request.headers_mut();
    headers.reserve(16);
    // With two sets of signature headers, one of them somebody else's, a verifier may take either one, or refuse both.
    let is_standard = matches!(route.provider, Provider::StandardWebhooks(_));
    let is_replaced = is_standard && route.application.signer.is_some();
    let signatures = if is_replaced { &[] } else { route.provider.signature_headers() };
    for name in std::iter::once(&header::CONTENT_TYPE).chain(signatures) {
        for value in parcel.headers.get_all(name) {
            headers.append(name, value.clone());
        }
    }
    headers.insert(header::USER_AGENT, crate::USER_AGENT);
    let id = format!("{}/{}/{}", route.tenant, route.provider.name(), identity.event_id);
    let mut text = |name: HeaderName, value: &str| {
        let value = HeaderValue::from_str(value).expect("keys and types are printable ASCII");
        headers.insert(name, value);
    };
    text(IDEMPOTENCY_KEY, &id);
    text(TENANT, &route.tenant);
    text(PROVIDER, route.provider.name());
    text(EVENT_ID, &identity.event_id);
    text(EVENT_TYPE, &identity.event_type);
    text(TRACEPARENT, &traceparent());
    if let Some(signer) = &route.application.signer {
        let timestamp = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()).to_string();
        let id = webhook_id(&id);
        text(WEBHOOK_ID, &id);
        text(WEBHOOK_TIMESTAMP, &timestamp);
        text(WEBHOOK_SIGNATURE, &signer.sign(&id, &timestamp, parcel.body));
    }
    match parcel.hold {
        Some(hold) => {
            headers.insert(ATTEMPT, HeaderValue::from(hold.attempt));
            headers.insert(FENCING_TOKEN, HeaderValue::from(hold.fencing_token));
            let remaining = u64::try_from(hold.remaining.as_millis()).unwrap_or(u64::MAX);
            headers.insert(LOCK_REMAINING, HeaderValue::from(remaining));
        }
        None => {
            headers.insert(ENFORCEMENT, HeaderValue::from_static("observe"));
        }
    }
    request
}

/// The id that is signed. Standard Webhooks joins id, time and body by full stops, so that an id with one in it would have
/// several readings, and verifiers refuse it, ours too; tenants and many event ids have them. Percent signs are written out
/// as well, so that two ids never become one. What is longer then than our verifier takes is named by its digest: tenant and
/// event id alone may have more bytes than that.
fn webhook_id(id: &str) -> Cow<'_, str> {
    let signed: Cow<'_, str> =
        if id.contains(['%', '.']) { id.replace('%', "%25").replace('.', "%2E").into() } else { id.into() };
    if signed.len() > EVENT_ID_BYTES_MAX {
        format!("sha256:{}", hex::encode(Sha256::digest(id))).into()
    } else {
        signed
    }
}

/// A new trace, for when we record none: a trace from the internet is not continued.
fn traceparent() -> String {
    // All zeros would be invalid.
    let trace = rand::random::<u128>().max(1);
    let span = rand::random::<u64>().max(1);
    format!("00-{trace:032x}-{span:016x}-01")
}

/// How long the header asks to wait, if it is valid: seconds, or a date (RFC 9110, section 10.2.3), which may have passed.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number that does not fit asks for longer than anybody will be told to wait.
        return Some(value.parse().map_or(Duration::MAX, Duration::from_secs));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    Some(until.duration_since(now).unwrap_or_default())
}

/// No status line came. `pause`: hold the next attempt until the lock would have expired.
fn failed(kind: FailureKind, error: String, pause: bool) -> Outcome {
    Outcome::Failed { kind, error, code: None, pause, retry_after: None }
}

/// The application may still be at work.
fn no_answer(kind: FailureKind, error: String) -> Outcome {
    failed(kind, error, kind == FailureKind::Retryable)
}

#[cfg(test)]
mod tests;
