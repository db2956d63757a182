//! Around everything else: each call is counted once, with its outcome, logged once, and given a span if traces are
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
    /// The outcome of a call, as told by its handler. Not an extension of the response: extensions are a map on the heap,
    /// which would be allocated for this one entry.
    static TOLD: Cell<Option<Told>>;
}

/// For handlers: tells the counting layer the outcome of the call they are answering.
pub(super) fn tell(told: Told) {
    // A handler that is called without the layer is not counted.
    let _nobody = TOLD.try_with(|cell| cell.set(Some(told)));
}

/// A handler's result, and what it told.
pub(super) async fn listening<T>(answer: impl Future<Output = T>) -> (T, Option<Told>) {
    TOLD.scope(Cell::new(None), async { (answer.await, TOLD.with(Cell::take)) }).await
}

/// A call that is being answered.
pub struct Observed {
    answer: Answering,
    call: Call,
}

impl Observed {
    /// The call that a request makes, answered by `answer`.
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
        // Without a status in the headers there is a body, and nothing has failed so far.
        let code = match response.headers().get("grpc-status") {
            Some(status) => Code::from_bytes(status.as_bytes()),
            None => Code::Ok,
        };
        this.call.answered(code, told);
        Poll::Ready(Ok(response))
    }
}

/// A call that is counted, logged and traced.
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

    /// A call that began a while ago.
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
            // A caller's mistake, or a lock it lost, is not a server error (OpenTelemetry's conventions for gRPC).
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

/// Continues the caller's trace: callers are internal.
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
