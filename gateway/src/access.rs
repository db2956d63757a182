//! One log line per request: what was asked on which route, and what was answered. Of the requests that strangers can make
//! as often as they like, only a few a second are logged, with the number of those left out. Nothing of the body is logged
//! but a digest of the event's name, and its type if that is on a known list (W17).

use http::StatusCode;
use oncegate_runtime::throttle::Throttle;
use tokio::time::Instant;
use tracing::Span;

use crate::delivery::{self, Event};

/// Types of events that may stand in the log as they are. Others may hold anything: with a weak provider, whatever a
/// stranger writes.
const TYPES: &[&str] = &[
    "CHECKOUT.ORDER.APPROVED",
    "CHECKOUT.ORDER.COMPLETED",
    "CUSTOMER.DISPUTE.CREATED",
    "PAYMENT.AUTHORIZATION.CREATED",
    "PAYMENT.AUTHORIZATION.VOIDED",
    "PAYMENT.CAPTURE.COMPLETED",
    "PAYMENT.CAPTURE.DENIED",
    "PAYMENT.CAPTURE.PENDING",
    "PAYMENT.CAPTURE.REFUNDED",
    "PAYMENT.CAPTURE.REVERSED",
    "PAYMENT.SALE.COMPLETED",
    "charge.completed",
    "charge.dispute.closed",
    "charge.dispute.create",
    "charge.dispute.created",
    "charge.dispute.resolve",
    "charge.failed",
    "charge.refunded",
    "charge.succeeded",
    "charge.success",
    "checkout.session.completed",
    "checkout.session.expired",
    "customer.subscription.created",
    "customer.subscription.deleted",
    "customer.subscription.updated",
    "invoice.create",
    "invoice.paid",
    "invoice.payment_failed",
    "invoice.payment_succeeded",
    "invoice.update",
    "payment_intent.canceled",
    "payment_intent.created",
    "payment_intent.payment_failed",
    "payment_intent.succeeded",
    "payout.failed",
    "payout.paid",
    "refund.completed",
    "refund.created",
    "refund.failed",
    "refund.pending",
    "refund.processed",
    "subscription.create",
    "subscription.disable",
    "transfer.completed",
    "transfer.failed",
    "transfer.reversed",
    "transfer.success",
];

/// What the log says of an event.
pub(crate) struct Seen {
    pub(crate) event: String,
    pub(crate) event_type: &'static str,
}

impl Seen {
    /// None if these lines are not logged: hashing costs something.
    pub(crate) fn of(event: &Event) -> Option<Self> {
        if !tracing::enabled!(target: "oncegate_gateway::access", tracing::Level::INFO) {
            return None;
        }
        Some(Self {
            event: delivery::digest(&event.route, &event.identity),
            event_type: known(&event.identity.event_type),
        })
    }
}

/// The answer in the line of a sender that hung up before it got one.
const HUNG_UP: &str = "hung_up";

/// The line of one request. Written exactly once, even if the request is dropped because its sender is gone.
pub(crate) struct Line<'a> {
    pub(crate) started: Instant,
    /// None for a request on no route: its path is a stranger's text.
    pub(crate) route: Option<&'a str>,
    pub(crate) provider: Option<&'static str>,
    /// The request's span, where it has one.
    pub(crate) span: Span,
    /// Once it is known: of a request that was verified.
    pub(crate) seen: Option<Seen>,
    /// For the lines of requests that anybody can make.
    strangers: &'a Throttle,
    /// Requests whose lines were held back before this one.
    unreported: Option<u64>,
    written: bool,
}

impl<'a> Line<'a> {
    pub(crate) fn begin(strangers: &'a Throttle) -> Self {
        Self {
            started: Instant::now(),
            route: None,
            provider: None,
            span: Span::none(),
            seen: None,
            strangers,
            unreported: None,
            written: false,
        }
    }

    /// The request was answered.
    pub(crate) fn answered(mut self, status: StatusCode, answer: &'static str) {
        self.write(Some(status), answer);
    }

    /// The request was answered as anybody's would be: a line where the throttle lets it pass.
    pub(crate) fn answered_anybody(mut self, status: StatusCode, answer: &'static str) {
        self.write_where_it_passes(Some(status), answer);
    }

    /// The request was answered, and gets no line: a stranger must not be able to fill the log (W14).
    pub(crate) fn withheld(mut self, status: StatusCode, answer: &'static str) {
        self.written = true;
        self.record(Some(status), answer);
    }

    fn write_where_it_passes(&mut self, status: Option<StatusCode>, answer: &'static str) {
        match self.strangers.pass() {
            Some(unreported) => {
                self.unreported = (unreported > 0).then_some(unreported);
                self.write(status, answer);
            }
            None => {
                self.written = true;
                self.record(status, answer);
            }
        }
    }

    fn write(&mut self, status: Option<StatusCode>, answer: &'static str) {
        self.written = true;
        let _entered = self.span.enter();
        tracing::info!(
            target: "oncegate_gateway::access",
            route = self.route,
            provider = self.provider,
            event = self.seen.as_ref().map(|seen| seen.event.as_str()),
            event_type = self.seen.as_ref().map(|seen| seen.event_type),
            status = status.map(|status| status.as_u16()),
            answer,
            unreported = self.unreported,
            duration_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            "request"
        );
        self.record(status, answer);
    }

    fn record(&self, status: Option<StatusCode>, answer: &'static str) {
        if !self.span.is_disabled() {
            self.span.record("oncegate.answer", answer);
            if let Some(status) = status {
                self.span.record("http.response.status_code", status.as_u16());
                if status.is_server_error() {
                    self.span.record("otel.status_code", "ERROR");
                }
            }
        }
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if self.written {
            return;
        }
        // Before it is verified anybody can hang up, as often as they like.
        if self.seen.is_some() {
            self.write(None, HUNG_UP);
        } else {
            self.write_where_it_passes(None, HUNG_UP);
        }
    }
}

fn known(event_type: &str) -> &'static str {
    TYPES.binary_search(&event_type).map_or("other", |place| TYPES[place])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_types_of_the_list_are_named() {
        assert!(TYPES.is_sorted());
        assert_eq!(known("charge.succeeded"), "charge.succeeded");
        assert_eq!(known("a@example.com"), "other");
    }
}
