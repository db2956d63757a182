//! Spans of calls to the sidecar, made around whatever transport there is, so that the trace continues in the sidecar.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use oncegate_runtime::telemetry;
use tower::Service;
use tracing::Span;

/// A transport whose calls have spans.
#[derive(Clone)]
pub(crate) struct Traced<S>(pub(crate) S);

impl<S, A, B> Service<Request<A>> for Traced<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Unpin,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Call<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<A>) -> Self::Future {
        let path = request.uri().path().trim_start_matches('/');
        let (service, method) = path.rsplit_once('/').unwrap_or(("", path));
        let span = tracing::info_span!(
            "call",
            otel.name = path,
            otel.kind = "client",
            otel.status_code = tracing::field::Empty,
            rpc.system = "grpc",
            rpc.service = service,
            rpc.method = method,
            rpc.grpc.status_code = tracing::field::Empty,
        );
        telemetry::inject(&span, request.headers_mut());
        let call = span.in_scope(|| self.0.call(request));
        Call { call, span }
    }
}

/// A call under way.
pub(crate) struct Call<F> {
    call: F,
    span: Span,
}

impl<F, B, E> Future for Call<F>
where
    F: Future<Output = Result<Response<B>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let done = {
            let _entered = this.span.enter();
            ready!(Pin::new(&mut this.call).poll(cx))
        };
        if !this.span.is_disabled() {
            // An error carries its status in the headers. A success carries it after the message, where it is 0.
            let code = match &done {
                Ok(response) => response.headers().get("grpc-status").and_then(|code| code.to_str().ok()?.parse().ok()),
                Err(_) => Some(i64::from(i32::from(tonic::Code::Unavailable))),
            };
            let code = code.unwrap_or(0);
            this.span.record("rpc.grpc.status_code", code);
            if code != 0 {
                this.span.record("otel.status_code", "ERROR");
            }
        }
        Poll::Ready(done)
    }
}
