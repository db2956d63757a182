//! Around everything else: each call is counted once, with what it came to, logged once, and has a span where traces are
//! recorded. A call whose caller goes away is counted as cancelled.

use std::{
    cell::Cell,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use oncegate_api::v1::idempotency_service_server::SERVICE_NAME;
use oncegate_runtime::telemetry;
use tonic::{
    Code,
    body::Body,
    codegen::http::{Request, Response},
};
use tracing::Span;

use super::layer::Answering;
use crate::{
    method::Called,
    metrics::{CodeLabel, Metrics, Told},
};

tokio::task_local! {
    /// What a handler says that its call came to. Not an extension of the answer: those are a map on the heap, made for this
    /// one entry.
    static TOLD: Cell<Option<Told>>;
}

/// For handlers: what the call that they answer came to, for whoever counts it.
pub(super) fn tell(told: Told) {
    // A handler that is called without the layer is not counted.
    let _nobody = TOLD.try_with(|cell| cell.set(Some(told)));
}

/// What a handler comes to, and what it told.
pub(super) async fn listening<T>(answer: impl Future<Output = T>) -> (T, Option<Told>) {
    TOLD.scope(Cell::new(None), async { (answer.await, TOLD.with(Cell::take)) }).await
}

/// A call that is being answered.
pub struct Observed {
    answer: Answering,
    call: Call,
}

impl Observed {
    /// The call of a request, answered by what `answer` makes of it.
    pub(super) fn new<B>(
        called: Called,
        request: Request<B>,
        metrics: &Arc<Metrics>,
        answer: impl FnOnce(Request<B>) -> Answering,
    ) -> Self {
        let call = Call::begin(called, span(called, &request), metrics);
        Self { answer: answer(request), call }
    }
}

impl Future for Observed {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let (polled, told) = {
            let _entered = this.call.span.enter();
            // It is told in the poll that ends the call, if at all.
            TOLD.sync_scope(Cell::new(None), || (Pin::new(&mut this.answer).poll(cx), TOLD.with(Cell::take)))
        };
        let response = ready!(polled)?;
        // Without a status in the headers the call has a body, and so far all is well.
        let code = match response.headers().get("grpc-status") {
            Some(status) => Code::from_bytes(status.as_bytes()),
            None => Code::Ok,
        };
        this.call.answered(code, told);
        Poll::Ready(Ok(response))
    }
}

/// A call that is counted, logged and in a span.
pub(super) struct Call {
    called: Called,
    started: Instant,
    pub(super) span: Span,
    metrics: Arc<Metrics>,
    answered: bool,
}

impl Call {
    pub(super) fn begin(called: Called, span: Span, metrics: &Arc<Metrics>) -> Self {
        Self::begun(called, span, metrics, Instant::now())
    }

    /// One that has begun some time ago.
    pub(super) fn begun(called: Called, span: Span, metrics: &Arc<Metrics>, started: Instant) -> Self {
        Self { called, started, span, metrics: metrics.clone(), answered: false }
    }

    pub(super) fn answered(&mut self, code: Code, told: Option<Told>) {
        self.answered = true;
        let took = self.started.elapsed();
        let told = told.or_else(|| Told::of_error(self.called, code));
        self.metrics.answered(self.called, code, told, took);
        let _entered = self.span.enter();
        let (code, outcome) = (CodeLabel::from(code), told.map(Told::name));
        tracing::info!(
            target: "oncegate_sidecar::access",
            method = self.called.name(),
            code = code.name(),
            outcome,
            duration_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            "call"
        );
        if !self.span.is_disabled() {
            self.span.record("rpc.grpc.status_code", code as u8);
            if let Some(outcome) = outcome {
                self.span.record("oncegate.outcome", outcome);
            }
            // What the caller got wrong, or lost, is no error of the server's (OpenTelemetry's conventions for gRPC).
            if matches!(
                code,
                CodeLabel::Unknown
                    | CodeLabel::DeadlineExceeded
                    | CodeLabel::Unimplemented
                    | CodeLabel::Internal
                    | CodeLabel::Unavailable
                    | CodeLabel::DataLoss
            ) {
                self.span.record("otel.status_code", "ERROR");
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.answered {
            self.answered(Code::Cancelled, None);
        }
    }
}

/// Continues the caller's trace: callers are within.
fn span<B>(called: Called, request: &Request<B>) -> Span {
    let span = call_span(None, called);
    telemetry::continues(&span, request.headers());
    span
}

/// The span of a call, within `parent`.
pub(super) fn call_span(parent: Option<tracing::Id>, called: Called) -> Span {
    let Called::Api(method) = called else {
        // Health is asked for every few seconds.
        return Span::none();
    };
    tracing::info_span!(
        parent: parent,
        "rpc",
        otel.name = format_args!("{SERVICE_NAME}/{}", method.name()),
        otel.kind = "server",
        otel.status_code = tracing::field::Empty,
        rpc.system = "grpc",
        rpc.service = SERVICE_NAME,
        rpc.method = method.name(),
        rpc.grpc.status_code = tracing::field::Empty,
        oncegate.outcome = tracing::field::Empty,
    )
}
