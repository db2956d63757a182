//! How the context of a span travels: in W3C's headers, and as links between spans of one process.

use http::HeaderMap;
use opentelemetry::{
    Context,
    propagation::TextMapPropagator as _,
    trace::{SpanContext, TraceContextExt as _},
};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// A span that another one may be linked to.
#[derive(Clone, Debug)]
pub struct Link(SpanContext);

/// Writes `traceparent` (and `tracestate`) of a span into headers; returns whether there was one to write.
pub fn inject(span: &Span, headers: &mut HeaderMap) -> bool {
    if span.is_disabled() {
        return false;
    }
    let context = span.context();
    if !context.span().span_context().is_valid() {
        return false;
    }
    TraceContextPropagator::new().inject_context(&context, &mut HeaderInjector(headers));
    true
}

/// Makes a span, before it is entered, a child of the one that its caller names in `traceparent`. For internal
/// callers.
pub fn continues(span: &Span, headers: &HeaderMap) {
    if let Some(caller) = remote(span, headers) {
        // Fails only for a span that was already entered.
        let _ = span.set_parent(Context::new().with_remote_span_context(caller));
    }
}

/// Links a span to the one that a stranger names in `traceparent`, so that the trace stays our own.
pub fn linked(span: &Span, headers: &HeaderMap) {
    if let Some(caller) = remote(span, headers) {
        span.add_link(caller);
    }
}

fn remote(span: &Span, headers: &HeaderMap) -> Option<SpanContext> {
    if span.is_disabled() {
        return None;
    }
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let context = context.span().span_context().clone();
    context.is_valid().then_some(context)
}

/// The span that the caller is in, if it is recorded.
#[must_use]
pub fn here() -> Option<Link> {
    // With traces off there never is one, and no context is created.
    Context::map_current(|context| {
        context
            .has_active_span()
            .then(|| context.span().span_context().clone())
            .filter(SpanContext::is_sampled)
            .map(Link)
    })
}

/// Links a span to another one, without either being within the other.
pub fn link(span: &Span, other: &Link) {
    span.add_link(other.0.clone());
}

/// The identifiers of the trace and the span that the caller is in, for log lines.
pub(crate) fn ids() -> Option<(opentelemetry::TraceId, opentelemetry::SpanId)> {
    Context::map_current(|context| {
        if !context.has_active_span() {
            return None;
        }
        let span = context.span();
        let context = span.span_context();
        context.is_valid().then(|| (context.trace_id(), context.span_id()))
    })
}
