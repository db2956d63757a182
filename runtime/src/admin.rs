//! The admin listener: `/livez`, `/readyz` and `/metrics`, apart from the public one.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fmt::Write as _,
    future::ready,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    server::{self, Http1, Options, Peer, Protocol},
    throttle::Throttle,
};

/// Whether the process should get new work: ready when every condition is met and no drain has begun.
///
/// Readiness asks only whether the process can answer. Being refused by a store that is down is an answer, so after the
/// start the store is not a condition: all pods leaving at once would turn its failure into an outage (W23).
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    draining: bool,
    /// The conditions not met yet, by name.
    starting: BTreeSet<&'static str>,
}

impl Readiness {
    /// Ready, as long as nobody adds a condition.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition, initially not met. The name appears in `/readyz`.
    pub fn condition(&self, name: &'static str) -> Condition {
        self.lock().starting.insert(name);
        Condition { name, readiness: self.clone() }
    }

    /// Accepts no new work from here on: `/readyz` answers 503 for good.
    pub fn drain(&self) {
        self.lock().draining = true;
    }

    /// None when ready; otherwise what is missing, one `name: reason` per line.
    #[must_use]
    pub fn missing(&self) -> Option<String> {
        let state = self.lock();
        let mut text = String::new();
        if state.draining {
            text.push_str("draining: shutting down\n");
        }
        for name in &state.starting {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name}: starting");
        }
        if text.is_empty() { None } else { Some(text) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every update is one assignment, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One condition of a [`Readiness`].
#[derive(Debug, Clone)]
pub struct Condition {
    name: &'static str,
    readiness: Readiness,
}

impl Condition {
    /// The condition is met.
    pub fn met(&self) {
        self.readiness.lock().starting.remove(self.name);
    }
}

/// What `/readyz` says in addition to being ready: `name: value` lines for people. Never a condition.
pub type Facts = Arc<dyn Fn() -> String + Send + Sync>;

/// Renders the metrics in the Prometheus text format.
pub type Metrics = Arc<dyn Fn() -> String + Send + Sync>;

/// The process's own endpoints beside these three: called with method and address for every other path. `None` is "not
/// found". Called on the listener's own task, so it must not block. Requests other than GET and HEAD only come from peers
/// that [`Trusted`] permits.
pub type Control = Arc<dyn Fn(&Method, &Uri) -> Option<Response<Full<Bytes>>> + Send + Sync>;

/// The longest that shutdown waits for answers under way.
pub const DRAIN: Duration = Duration::from_secs(1);

/// Who may change something on this listener, which asks nobody who they are.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trusted {
    /// Whoever is on this machine, or in this pod (`kubectl exec`).
    Loopback,
    /// Whoever can connect.
    Anyone,
}

impl Trusted {
    fn permits(self, peer: &Peer) -> bool {
        match (self, peer.address) {
            (Self::Anyone, _) => true,
            // A listener on IPv6 sees the loopback of IPv4 as ::ffff:127.0.0.1.
            (Self::Loopback, Some(address)) => address.ip().to_canonical().is_loopback(),
            (Self::Loopback, None) => true,
        }
    }
}

/// Serves the admin endpoints on `listener` until `shutdown` is cancelled. Cancel it last: `/readyz` has to answer 503
/// while everything else drains.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    facts: Facts,
    metrics: Metrics,
    control: (Control, Trusted),
    shutdown: CancellationToken,
) {
    let mut options = Options::http1(DRAIN);
    // Probes and one or two scrapers; more is a mistake or an attack, and must not use up descriptors.
    options.connections_max = 64;
    // A silent peer soon gives up its place to a probe.
    options.protocol = Protocol::Http1(Http1 { header_read_timeout: Duration::from_secs(5), ..Http1::default() });
    let (control, trusted) = control;
    let endpoints = Endpoints { readiness, facts, metrics, control, trusted, denials: Arc::default() };
    let service = move |peer: &Peer| {
        let (endpoints, peer) = (endpoints.clone(), peer.clone());
        service_fn(move |request: Request<Incoming>| {
            ready(Ok::<_, Infallible>(endpoints.answer(request.method(), request.uri(), &peer)))
        })
    };
    server::serve_each(listener, service, options, shutdown).await;
}

#[derive(Clone)]
struct Endpoints {
    readiness: Readiness,
    facts: Facts,
    metrics: Metrics,
    control: Control,
    trusted: Trusted,
    denials: Arc<Throttle>,
}

/// Logs that a change was denied, if `passed`: at most one line a second, since the denied peer controls how often this
/// happens.
fn denied(peer: &Peer, passed: Option<u64>) {
    let Some(unreported) = passed else { return };
    // Nothing from the request is logged: it is a stranger's.
    tracing::warn!(
        target: "oncegate_runtime::audit",
        %peer,
        unreported,
        outcome = "FORBIDDEN",
        "a change on the admin listener was denied"
    );
}

impl Endpoints {
    fn answer(&self, method: &Method, uri: &Uri, peer: &Peer) -> Response<Full<Bytes>> {
        let path = uri.path();
        if !matches!(path, "/livez" | "/readyz" | "/metrics") {
            if !matches!(*method, Method::GET | Method::HEAD) && !self.trusted.permits(peer) {
                denied(peer, self.denials.pass());
                return text(StatusCode::FORBIDDEN, FORBIDDEN);
            }
            return (self.control)(method, uri).unwrap_or_else(|| text(StatusCode::NOT_FOUND, "not found\n"));
        }
        if !matches!(*method, Method::GET | Method::HEAD) {
            let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
            refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refused;
        }
        match path {
            // It only asks whether there is an answer at all, which shows that the event loop is running (W23).
            "/livez" => text(StatusCode::OK, "alive\n"),
            "/readyz" => match self.readiness.missing() {
                None => text(StatusCode::OK, format!("ready\n{}", (self.facts)())),
                Some(missing) => text(StatusCode::SERVICE_UNAVAILABLE, missing + &(self.facts)()),
            },
            // Nothing else gets this far.
            _ => {
                let mut page = text(StatusCode::OK, (self.metrics)());
                page.headers_mut()
                    .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
                page
            }
        }
    }
}

/// For people, who may well be entitled to the change.
const FORBIDDEN: &str =
    "permitted from this machine or pod only; ADMIN_CONTROL=anyone permits it to whoever can connect\n";

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::written::Written;

    fn peer(address: Option<&str>) -> Peer {
        Peer { address: address.map(|text| text.parse().unwrap()), certificate: None }
    }

    fn status(endpoints: &Endpoints, method: Method, path: &str) -> u16 {
        endpoints.answer(&method, &path.parse().unwrap(), &peer(None)).status().as_u16()
    }

    #[test]
    fn not_ready_until_every_condition_is_met_and_never_again_once_draining() {
        let readiness = Readiness::new();
        let endpoints = Endpoints {
            readiness: readiness.clone(),
            facts: Arc::new(|| "fsync: on\n".to_owned()),
            metrics: Arc::new(String::new),
            control: Arc::new(|_, _| None),
            trusted: Trusted::Loopback,
            denials: Arc::default(),
        };
        assert_eq!(status(&endpoints, Method::GET, "/readyz"), 200);
        let ledger = readiness.condition("ledger");
        let listener = readiness.condition("listener");
        assert_eq!(readiness.missing().unwrap(), "ledger: starting\nlistener: starting\n");
        ledger.met();
        assert_eq!(readiness.missing().unwrap(), "listener: starting\n");
        assert_eq!(status(&endpoints, Method::GET, "/readyz"), 503);
        listener.met();
        assert_eq!(status(&endpoints, Method::GET, "/readyz"), 200);
        readiness.drain();
        assert_eq!(status(&endpoints, Method::GET, "/readyz"), 503);
        assert_eq!(status(&endpoints, Method::GET, "/livez"), 200);
    }

    #[test]
    fn unknown_paths_and_methods_are_refused() {
        let endpoints = Endpoints {
            readiness: Readiness::new(),
            facts: Arc::new(String::new),
            metrics: Arc::new(|| "x 1\n".to_owned()),
            control: Arc::new(|_, uri| (uri.path() == "/own").then(|| text(StatusCode::ACCEPTED, "own\n"))),
            trusted: Trusted::Loopback,
            denials: Arc::default(),
        };
        assert_eq!(status(&endpoints, Method::PUT, "/own?x=1"), 202);
        assert_eq!(status(&endpoints, Method::GET, "/metrics"), 200);
        assert_eq!(status(&endpoints, Method::GET, "/"), 404);
        assert_eq!(status(&endpoints, Method::POST, "/livez"), 405);
        assert_eq!(status(&endpoints, Method::HEAD, "/livez"), 200);
    }

    #[test]
    fn only_neighbours_change_anything_unless_it_was_said_out_loud() {
        for (address, neighbour) in [
            (Some("127.0.0.1:5"), true),
            (Some("[::1]:5"), true),
            (Some("[::ffff:127.0.0.1]:5"), true),
            (None, true),
            (Some("10.0.0.7:5"), false),
            (Some("192.0.2.1:5"), false),
            (Some("[::ffff:10.0.0.7]:5"), false),
            (Some("[fe80::1]:5"), false),
            (Some("0.0.0.0:5"), false),
        ] {
            let peer = peer(address);
            assert_eq!(Trusted::Loopback.permits(&peer), neighbour, "{address:?}");
            assert!(Trusted::Anyone.permits(&peer));
        }
        let endpoints = Endpoints {
            readiness: Readiness::new(),
            facts: Arc::new(String::new),
            metrics: Arc::new(String::new),
            control: Arc::new(|_, _| Some(text(StatusCode::ACCEPTED, "own\n"))),
            trusted: Trusted::Loopback,
            denials: Arc::default(),
        };
        let stranger = peer(Some("10.0.0.7:5"));
        let status =
            |method: &Method, path: &str| endpoints.answer(method, &path.parse().unwrap(), &stranger).status().as_u16();
        for method in [Method::PUT, Method::POST, Method::DELETE, Method::PATCH] {
            assert_eq!(status(&method, "/own"), 403, "{method}");
        }
        for (path, wanted) in [("/own", 202), ("/livez", 200), ("/readyz", 200), ("/metrics", 200)] {
            assert_eq!(status(&Method::GET, path), wanted, "{path}");
        }
    }

    #[test]
    fn a_denied_change_leaves_one_audit_line_a_second() {
        let (written, denials) = (Written::default(), Throttle::default());
        tracing::subscriber::with_default(written.subscriber(), || {
            for now in [7, 7, 7, 8] {
                denied(&peer(Some("10.0.0.7:5")), denials.pass_at(now));
            }
        });
        let written = written.text();
        let lines: Vec<_> = written.lines().map(|line| line.split_once("WARN ").unwrap().1).collect();
        let line = |unreported: u64| {
            format!(
                "oncegate_runtime::audit: a change on the admin listener was denied peer=10.0.0.7:5 \
                 unreported={unreported} outcome=\"FORBIDDEN\""
            )
        };
        assert_eq!(lines, [line(0), line(2)]);
    }
}
