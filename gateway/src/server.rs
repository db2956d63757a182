//! The gateway as a server: its routes, and how it starts and stops.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::SystemTime};

use http::{HeaderMap, Method, Request, Response, request::Parts};
use hyper::{body::Incoming, service::service_fn};
use oncegate_runtime::{
    admin,
    metrics::certificates::{CertificateFile, Certificates},
    server::{self, AmbiguousFraming, Http1, Options, Peer, Protocol, Shares},
    shutdown::CancellationToken,
    telemetry,
    throttle::Throttle,
    tls::{ServerTls, TlsError, Trust},
};
use tokio::{net::TcpListener, time::Instant};
use tracing::{Instrument as _, Span, field};

use crate::{
    access::{Line, Seen},
    answer::{self, Answer},
    config::{ConfigFile, HttpLimits, Settings},
    delivery::Courier,
    enforcement,
    health::Health,
    ingest::{Ingest, refuse_unread},
    metrics::{Load, Metrics},
    reload,
    route::Route,
    sidecar::{Connection, Sidecar},
    upstream::Upstream,
};

/// The page with status and statistics (G1).
pub(crate) const HEALTH_PATH: &str = "/webhooks/payments/health";

/// How many log lines a second there are for requests that anybody can make without a signature (W14).
const STRANGERS_LINES: u32 = 20;

/// A gateway whose socket is bound.
pub struct Gateway {
    listener: TcpListener,
    local_addr: SocketAddr,
    http: HttpLimits,
    shares: Option<Arc<Shares>>,
    tls: Option<ServerTls>,
    drain: std::time::Duration,
    secret_reload: std::time::Duration,
    config_file: Option<ConfigFile>,
    front: Arc<Front>,
}

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The public address cannot be bound.
    #[error("cannot listen on {address}")]
    Listen {
        /// As configured (GATEWAY_LISTEN).
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The application is reached by https, and the system has no usable trust roots.
    #[error("no trust roots for an application by https; SSL_CERT_FILE may name a file with some")]
    TrustRoots(#[source] TlsError),
}

/// Why a gateway did not stop cleanly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// Deliveries were under way at the end of the drain and could not be marked. Their locks expire; the provider's next
    /// try is a new attempt.
    #[error("{deliveries} deliveries could not be recorded before the end")]
    Unfinished {
        /// How many.
        deliveries: usize,
    },
}

impl Gateway {
    /// Binds the public listener. `connection` carries the calls: [`crate::sidecar::channel`], or the sidecar's own service
    /// in the same process. Has to be called inside a tokio runtime. Nothing is served before [`Gateway::run`].
    ///
    /// # Errors
    ///
    /// The address cannot be bound, or TLS to the application cannot work.
    pub async fn bind(settings: Settings, connection: impl Into<Connection>) -> Result<Self, StartError> {
        let address = settings.listen;
        let refused = |source| StartError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(refused)?;
        let local_addr = listener.local_addr().map_err(refused)?;
        for route in settings.routes.iter().filter(|route| route.provider.is_weak()) {
            tracing::warn!(
                path = &*route.path,
                provider = route.provider.name(),
                "weak: Flutterwave v3 proves nothing about the body of an event; ask Flutterwave before acting on one"
            );
        }
        let metrics = Arc::new(Metrics::new(&settings.routes));
        let sidecar = Sidecar::new(connection.into(), settings.sidecar_timeout, &settings.lock);
        // The system's trust roots are read only where they are needed.
        let secure = settings.routes.iter().any(|route| route.application.url.scheme_str() == Some("https"));
        let trust = if secure { Trust::System } else { Trust::Nobody };
        let upstream = Upstream::new(settings.upstream, trust).map_err(StartError::TrustRoots)?;
        let mut tenants: Vec<String> = settings.routes.iter().map(|route| route.tenant.clone()).collect();
        tenants.sort();
        tenants.dedup();
        let front = Front {
            health: Health::new(sidecar.clone(), tenants, settings.health_cache),
            ingest: Ingest::new(settings.body, settings.failures, metrics.clone()),
            courier: Arc::new(Courier::new(&settings, sidecar, upstream, metrics.clone())),
            answer_timeout: settings.answer_timeout,
            strangers: Throttle::per_second(STRANGERS_LINES),
            metrics,
            routes: settings.routes.into_iter().map(Arc::new).collect(),
        };
        Ok(Self {
            listener,
            local_addr,
            shares: settings.http.connections_per_address.map(Shares::new),
            http: settings.http,
            tls: settings.tls,
            drain: settings.drain,
            secret_reload: settings.secret_reload,
            config_file: settings.config_file,
            front: Arc::new(front),
        })
    }

    /// Where the public listener is bound. If port 0 was configured, this has the actual port.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The paths that take webhooks, with the names of their providers.
    pub fn routes(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.front.routes.iter().map(|route| (&*route.path, route.provider.name()))
    }

    /// What the admin listener shows under `/metrics`.
    #[must_use]
    pub fn metrics(&self) -> admin::Metrics {
        let (front, shares, tls) = (self.front.clone(), self.shares.clone(), self.tls.clone());
        Arc::new(move || {
            let load = Load {
                deliveries: front.courier.under_way(),
                deliveries_max: front.courier.under_way_max(),
                connections_refused: shares.as_ref().map_or(0, |shares| shares.refused()),
                budget_left_kib: front.ingest.budget_left_kib(),
                budget_kib: front.ingest.budget_kib(),
                listener: tls.as_ref().map(ServerTls::counts).unwrap_or_default(),
            };
            front.metrics.render(load, &front.routes)
        })
    }

    /// When certificates expire: the listener's, PayPal's in a directory, and those that PayPal's have to lead to.
    #[must_use]
    pub fn certificates(&self) -> Certificates {
        let (front, tls) = (self.front.clone(), self.tls.clone());
        Arc::new(move || {
            let mut files = Vec::new();
            if let Some(tls) = &tls {
                files.push(CertificateFile { setting: "GATEWAY_TLS_CERT_FILE", end: tls.ends().own });
            }
            // Routes may have files of their own: the earliest expiry is shown.
            let paypals = || front.routes.iter().filter_map(|route| route.provider.paypal());
            let anchors = paypals().filter_map(|paypal| paypal.trust().anchors_end).min();
            let intermediates = paypals().filter_map(|paypal| paypal.trust().intermediates_end).min();
            let directory = paypals().filter_map(|paypal| paypal.store()?.directory_end()).min();
            files.push(CertificateFile { setting: "PAYPAL_TRUST_ANCHORS_FILE", end: anchors });
            files.push(CertificateFile { setting: "PAYPAL_INTERMEDIATES_FILE", end: intermediates });
            files.push(CertificateFile { setting: "PAYPAL_CERT_DIR", end: directory });
            files
        })
    }

    /// `/enforcement` for the admin listener: shows whether routes enforce or observe, and switches them.
    #[must_use]
    pub fn control(&self) -> admin::Control {
        enforcement::control(self.front.routes.clone())
    }

    /// Serves until `shutdown` is cancelled and everything under way has finished. The latter takes at most the drain time
    /// and two of the sidecar's time-outs. Deliveries that outlast the drain are marked as timed out (G9).
    ///
    /// Dropping the future stops accepting and leaves open requests and deliveries running on their own.
    ///
    /// # Errors
    ///
    /// There were deliveries that could not even be marked.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let Self { listener, http, shares, tls, drain, secret_reload, config_file, front, .. } = self;
        let options = Options {
            connections_max: http.connections_max,
            shares,
            first_byte_timeout: http.first_byte_timeout,
            protocol: Protocol::Http1(Http1 { header_read_timeout: http.header_timeout, ..Http1::default() }),
            tls: tls.clone(),
            ..Options::http1(drain)
        };
        let handler = front.clone();
        let service = move |peer: &Peer| {
            let (handler, peer) = (handler.clone(), peer.address);
            service_fn(move |request| handler.clone().handle(request, peer))
        };
        let serve = server::serve_each(listener, service, options, shutdown.clone());
        let begun = async {
            shutdown.cancelled().await;
            Instant::now()
        };
        let deadline = tokio::select! {
            (_, begun) = async { tokio::join!(serve, begun) } => begun + drain,
            never = reload::watch(&front.routes, secret_reload, &front.metrics) => match never {},
            never = reload::watch_listener(tls, secret_reload) => match never {},
            never = reload::watch_directories(&front.routes, secret_reload) => match never {},
            never = reload::watch_config(&front.routes, config_file, secret_reload, &front.metrics) => match never {},
        };
        match front.courier.finish(deadline.saturating_duration_since(Instant::now())).await {
            0 => Ok(()),
            deliveries => Err(RunError::Unfinished { deliveries }),
        }
    }
}

/// The span of a webhook: the root of a trace, linked to the trace that the sender names, if any.
fn span(route: &Route, headers: &HeaderMap) -> Span {
    let span = tracing::info_span!(
        parent: None,
        "webhook",
        otel.name = format_args!("POST {}", route.path),
        otel.kind = "server",
        otel.status_code = field::Empty,
        http.request.method = "POST",
        http.route = &*route.path,
        http.response.status_code = field::Empty,
        oncegate.provider = route.provider.name(),
        oncegate.answer = field::Empty,
    );
    telemetry::linked(&span, headers);
    span
}

/// What every request passes through.
struct Front {
    routes: Vec<Arc<Route>>,
    ingest: Ingest,
    courier: Arc<Courier>,
    health: Health,
    metrics: Arc<Metrics>,
    answer_timeout: std::time::Duration,
    /// Limits the lines of requests that anybody can make.
    strangers: Throttle,
}

impl Front {
    async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Option<SocketAddr>,
    ) -> Result<Response<answer::Body>, Infallible> {
        let mut line = Line::begin(&self.strangers);
        let mut place = None;
        let answer = if request.extensions().get::<AmbiguousFraming>().is_some() {
            // Whatever the path is: where this request ends can only be guessed.
            Answer::MalformedRequest
        } else if request.uri().path() == HEALTH_PATH {
            line.route = Some(HEALTH_PATH);
            match *request.method() {
                Method::GET | Method::HEAD | Method::POST => {
                    // Boxed, so that the future of a webhook does not carry room for it.
                    let page = Box::pin(self.health.page()).await;
                    let word = if page.status().is_success() { "ok" } else { "unavailable" };
                    line.answered_anybody(page.status(), word);
                    return Ok(page);
                }
                _ => Answer::MethodNotAllowed("GET, HEAD, POST"),
            }
        } else {
            let (parts, body) = request.into_parts();
            // There are only a handful: comparing them all costs less than hashing one.
            place = self.routes.iter().position(|route| *route.path == *parts.uri.path());
            match place.map(|place| &self.routes[place]) {
                None => refuse_unread(Answer::NotFound, &parts.headers, body),
                Some(route) => {
                    (line.route, line.provider) = (Some(&*route.path), Some(route.provider.name()));
                    if parts.method == Method::POST {
                        line.span = span(route, &parts.headers);
                        let span = line.span.clone();
                        self.receive(route, parts, (body, peer), &mut line).instrument(span).await
                    } else {
                        refuse_unread(Answer::MethodNotAllowed("POST"), &parts.headers, body)
                    }
                }
            }
        };
        let (status, word) = answer.status_and_word();
        self.metrics.answered(place, word, line.started.elapsed());
        // What anybody brings about where it comes before the signature: a full budget for bodies, a certificate that is not to
        // be had. After it they are our own trouble, and each has its line.
        let unverified = line.seen.is_none() && matches!(answer, Answer::Overloaded | Answer::Unavailable(_));
        match answer {
            Answer::TooManyFailures(_) => line.withheld(status, word.name()),
            _ if unverified || answer.is_anybodys() => line.answered_anybody(status, word.name()),
            _ => line.answered(status, word.name()),
        }
        Ok(answer.response())
    }

    async fn receive(
        &self,
        route: &Arc<Route>,
        parts: Parts,
        (body, peer): (Incoming, Option<SocketAddr>),
        line: &mut Line<'_>,
    ) -> Answer {
        match self.ingest.admit(route, parts, body, peer, SystemTime::now()).await {
            Ok(event) => {
                line.seen = Seen::of(&event);
                self.courier.handle(event, line.started + self.answer_timeout).await
            }
            Err(answer) => answer,
        }
    }
}
