//! One line a request in the log: what was asked on which route, and what it was answered. Nothing of the body but a hash of
//! the event's name, and its type where that is one of a known list (W17).

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
    /// None where nobody reads it: hashing costs something.
    pub(crate) fn of(event: &Event) -> Option<Self> {
        if !tracing::enabled!(target: "oncegate_gateway::access", tracing::Level::INFO) {
            return None;
        }
        Some(Self {
            event: delivery::short(&event.route, &event.identity),
            event_type: known(&event.identity.event_type),
        })
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
