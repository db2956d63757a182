//! Requests for the tests of this crate; what a test is about it says by `Claim { field: ..., ..claim(...) }`.

use super::{Claim, Key, Micros};

pub(crate) fn key(event_id: &str) -> Key {
    Key { tenant: "default".into(), provider: "stripe".into(), event_id: event_id.into() }
}

/// A plain claim: a lock of a minute, no cap, nothing to compare, and nobody who waits.
pub(crate) fn claim(event_id: &str, claim_id: &str) -> Claim {
    Claim {
        key: key(event_id),
        event_type: "payment.succeeded".into(),
        claim_id: claim_id.into(),
        holder: "pod".into(),
        lock_duration: Micros(60_000_000),
        fingerprint: None,
        metadata: None,
        payload_digest: None,
        delivery_id: None,
        attempts_max: None,
        waiting: false,
    }
}
