//! The stable reasons of `google.rpc.ErrorInfo`: what a client may branch on. `docs/errors.md` has a row for each.

/// The `domain` of every `ErrorInfo` of this service.
pub const DOMAIN: &str = "oncegate.dev";

/// INVALID_ARGUMENT: one or more fields break the contract. `BadRequest` lists every violation.
pub const INVALID_FIELD: &str = "INVALID_FIELD";
/// FAILED_PRECONDITION: the event was first claimed with another fingerprint.
pub const FINGERPRINT_MISMATCH: &str = "FINGERPRINT_MISMATCH";
/// FAILED_PRECONDITION: the delivery id was seen before with another payload digest.
pub const DELIVERY_MISMATCH: &str = "DELIVERY_MISMATCH";
/// FAILED_PRECONDITION: the claim id belongs to an attempt that has ended.
pub const CLAIM_ENDED: &str = "CLAIM_ENDED";
/// FAILED_PRECONDITION: this attempt's outcome was recorded before, and it was another one.
pub const OUTCOME_CONFLICT: &str = "OUTCOME_CONFLICT";
/// FAILED_PRECONDITION: the event's state does not permit this resolution.
pub const STATE_CONFLICT: &str = "STATE_CONFLICT";
/// ABORTED: the fencing token or claim id is no longer the event's. Metadata: `state`, `fencing_token`.
pub const LOCK_LOST: &str = "LOCK_LOST";
/// NOT_FOUND: no such event.
pub const EVENT_NOT_FOUND: &str = "EVENT_NOT_FOUND";
/// UNAVAILABLE: the ledger cannot be reached or cannot write. Nothing happened; ask again after `RetryInfo`.
pub const STORE_UNAVAILABLE: &str = "STORE_UNAVAILABLE";
/// UNAVAILABLE: too many calls are under way. Nothing happened; ask again after `RetryInfo`.
pub const OVERLOADED: &str = "OVERLOADED";
/// UNAVAILABLE: the ledger went away while the call was under way; it may or may not have happened. Repeat it
/// as it is, with the same `claim_id`.
pub const OUTCOME_UNKNOWN: &str = "OUTCOME_UNKNOWN";
/// DEADLINE_EXCEEDED: the caller's deadline passed first; the call may or may not have happened.
pub const DEADLINE_EXCEEDED: &str = "DEADLINE_EXCEEDED";
/// UNAUTHENTICATED: no or no valid credentials.
pub const UNAUTHENTICATED: &str = "UNAUTHENTICATED";
/// PERMISSION_DENIED: the caller's role or tenant does not permit the call.
pub const PERMISSION_DENIED: &str = "PERMISSION_DENIED";
/// RESOURCE_EXHAUSTED: a quota of the caller is used up.
pub const QUOTA_EXCEEDED: &str = "QUOTA_EXCEEDED";
/// UNIMPLEMENTED: the service has no such method, or does not take messages that are compressed.
pub const UNIMPLEMENTED: &str = "UNIMPLEMENTED";
/// INTERNAL: a defect of this service. The log has the details.
pub const INTERNAL: &str = "INTERNAL";

/// Every reason, in the order of `docs/errors.md`.
pub const ALL: &[&str] = &[
    INVALID_FIELD,
    FINGERPRINT_MISMATCH,
    DELIVERY_MISMATCH,
    CLAIM_ENDED,
    OUTCOME_CONFLICT,
    STATE_CONFLICT,
    LOCK_LOST,
    EVENT_NOT_FOUND,
    STORE_UNAVAILABLE,
    OVERLOADED,
    OUTCOME_UNKNOWN,
    DEADLINE_EXCEEDED,
    UNAUTHENTICATED,
    PERMISSION_DENIED,
    QUOTA_EXCEEDED,
    UNIMPLEMENTED,
    INTERNAL,
];

#[cfg(test)]
mod tests {
    use super::{ALL, DOMAIN};

    #[test]
    fn every_reason_has_a_row_in_the_documents_and_no_row_lacks_its_reason() {
        let document = include_str!("../docs/errors.md");
        assert!(document.contains(DOMAIN));
        let rows: Vec<&str> = document.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
        assert_eq!(rows, ALL);
    }
}
