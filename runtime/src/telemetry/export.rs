//! From finished spans to the collector: a bounded queue, and a thread with a runtime of its own.
//!
//! OpenTelemetry's own batch processor drops spans without saying how many, and its clients need a runtime or bring
//! another HTTP stack; this one counts what it drops and uses the client that the program already has.

use std::{
    collections::VecDeque,
    error::Error as StdError,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use opentelemetry::Context;
use opentelemetry_http::HttpError;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Span, SpanData, SpanExporter as _, SpanProcessor},
};

use crate::{
    metrics::Counter,
    tls::{Trust, http_client_config},
};

/// Spans that may wait for the exporter; about a kilobyte each.
const QUEUE_MAX: usize = 2_048;
/// Spans in one request to the collector.
const BATCH_MAX: usize = 512;
/// The longest that a finished span waits for others to join its batch.
const GATHER_TIME_MAX: Duration = Duration::from_secs(1);
/// How much of the collector's answer is read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// What became of finished spans.
#[derive(Debug)]
pub struct Spans {
    /// The collector accepted them.
    pub exported: Counter,
    /// Lost, because more were finished than the collector could take.
    pub queue_full: Counter,
    /// Lost, because the collector did not accept them.
    pub export_failed: Counter,
}

pub(super) static SPANS: Spans =
    Spans { exported: Counter::new(), queue_full: Counter::new(), export_failed: Counter::new() };

#[derive(Debug, Default)]
struct State {
    spans: VecDeque<SpanData>,
    closing: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    /// A batch is due, or the end.
    due: Condvar,
    /// The thread has ended.
    ended: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Only whole spans are moved while it is held; nothing can be left half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next batch; empty at the end.
    fn next(&self) -> Vec<SpanData> {
        let waiting = self.due.wait_while(self.lock(), |state| state.spans.is_empty() && !state.closing);
        let state = waiting.unwrap_or_else(PoisonError::into_inner);
        let gathering = |state: &mut State| state.spans.len() < BATCH_MAX && !state.closing;
        let gathered = self.due.wait_timeout_while(state, GATHER_TIME_MAX, gathering);
        let (mut state, _) = gathered.unwrap_or_else(PoisonError::into_inner);
        let count = state.spans.len().min(BATCH_MAX);
        state.spans.drain(..count).collect()
    }
}

/// Takes finished spans on whatever thread they finish, and only puts them into the queue.
#[derive(Debug)]
pub(super) struct Processor(Arc<Queue>);

impl SpanProcessor for Processor {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        let mut state = self.0.lock();
        if state.closing || state.spans.len() >= QUEUE_MAX {
            SPANS.queue_full.add();
            return;
        }
        state.spans.push_back(span);
        let due = matches!(state.spans.len(), 1 | BATCH_MAX);
        drop(state);
        if due {
            self.0.due.notify_one();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        // `Exporting::finish` does it, since it knows the time limit.
        Ok(())
    }
}

/// The thread that exports.
pub(super) struct Exporting(Arc<Queue>);

impl Exporting {
    pub(super) fn start(mut exporter: SpanExporter, resource: &Resource) -> io::Result<Self> {
        exporter.set_resource(resource);
        let queue = Arc::new(Queue::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let work = queue.clone();
        thread::Builder::new().name("oncegate-traces".into()).spawn(move || export(&runtime, &work, &exporter))?;
        Ok(Self(queue))
    }

    pub(super) fn processor(&self) -> Processor {
        Processor(self.0.clone())
    }

    pub(super) fn finish(self, limit: Duration) {
        let mut state = self.0.lock();
        state.closing = true;
        self.0.due.notify_one();
        // The thread is not joined: it may hang in a connection that nobody answers, and ends with the process.
        let (state, waited) = self
            .0
            .ended
            .wait_timeout_while(state, limit, |state| !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            let spans = state.spans.len();
            drop(state);
            tracing::warn!(spans, "the collector does not take the last spans; they are lost");
        }
    }
}

fn export(runtime: &tokio::runtime::Runtime, queue: &Queue, exporter: &SpanExporter) {
    // What the client does must not be traced itself.
    let _quiet = Context::enter_telemetry_suppressed_scope();
    let mut well = true;
    loop {
        let batch = queue.next();
        if batch.is_empty() {
            break;
        }
        let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        match runtime.block_on(exporter.export(batch)) {
            Ok(()) => {
                SPANS.exported.add_many(count);
                if !well {
                    tracing::info!("the collector takes spans again");
                }
                well = true;
            }
            Err(error) => {
                SPANS.export_failed.add_many(count);
                if well {
                    tracing::warn!(
                        error = &error as &dyn StdError,
                        "the collector does not take spans; they are dropped and counted"
                    );
                }
                well = false;
            }
        }
    }
    queue.lock().closed = true;
    queue.ended.notify_one();
}

/// The client in the thread's runtime, with a bound on everything.
#[derive(Debug)]
pub(super) struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
}

impl HttpClient {
    /// `secure`: the system's trust roots are only read where they are needed.
    pub(super) fn new(secure: bool, timeout: Duration) -> io::Result<Self> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(timeout));
        let tls = http_client_config(if secure { Trust::System } else { Trust::Nobody }).map_err(io::Error::other)?;
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new()).timer(TokioTimer::new()).build(connector);
        Ok(Self { client, timeout })
    }

    async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = self.client.request(request.map(Full::new)).await?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await?.to_bytes();
        Ok(Response::from_parts(parts, body))
    }
}

#[async_trait::async_trait]
impl opentelemetry_http::HttpClient for HttpClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        tokio::time::timeout(self.timeout, self.send(request)).await?
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Instant};

    use super::*;

    #[test]
    fn the_end_is_bounded_by_its_limit_when_the_collector_never_answers() {
        // The system accepts connections, but nobody answers them.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let options = super::super::Options {
            otel_exporter_otlp_endpoint: Some(format!("http://{}", silent.local_addr().unwrap()).parse().unwrap()),
            otel_exporter_otlp_traces_endpoint: None,
            otel_exporter_otlp_timeout: 60_000,
            otel_service_name: None,
            otel_traces_sampler: "always_on".parse().unwrap(),
            otel_traces_sampler_arg: 1.0,
        };
        let tracing = super::super::Tracing::start(&options, "test").unwrap().unwrap();
        let before = SPANS.queue_full.get();
        for _ in 0..QUEUE_MAX + 2 * BATCH_MAX {
            use opentelemetry::trace::Tracer as _;
            drop(tracing.tracer.start("span"));
        }
        assert!(SPANS.queue_full.get() > before, "what does not fit is dropped and counted");
        let started = Instant::now();
        tracing.finish(Duration::from_millis(200));
        assert!(started.elapsed() < Duration::from_secs(30), "not the time-out of the export");
    }
}
