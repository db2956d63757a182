//! The limits of the contract, as the comments of the `.proto` file state them. The service refuses a field beyond its
//! limit, and so whoever calls it keeps its names and settings within them.
//!
//! That of metadata stands with the sidecar's events: what is kept of two of them together has it as well.

use std::time::Duration;

/// Bytes of a tenant's name.
pub const TENANT_BYTES_MAX: usize = 64;
/// Bytes of a provider's name.
pub const PROVIDER_BYTES_MAX: usize = 64;
/// Bytes of an event's identifier.
pub const EVENT_ID_BYTES_MAX: usize = 255;
/// Bytes of an event's type.
pub const EVENT_TYPE_BYTES_MAX: usize = 128;
/// Bytes of what a caller names its claim.
pub const CLAIM_ID_BYTES_MAX: usize = 64;
/// Bytes of what a holder calls itself.
pub const HOLDER_BYTES_MAX: usize = 128;
/// Bytes of the identifier of one delivery of an event.
pub const DELIVERY_ID_BYTES_MAX: usize = 128;
/// Bytes of a result's type.
pub const CONTENT_TYPE_BYTES_MAX: usize = 128;
/// Bytes of a result's body.
pub const RESULT_BODY_BYTES_MAX: usize = 64 * 1_024;
/// Bytes of what went wrong with an attempt.
pub const ERROR_BYTES_MAX: usize = 2 * 1_024;
/// Bytes of why somebody decided by hand.
pub const REASON_BYTES_MAX: usize = 512;
/// Bytes of who that was.
pub const ACTOR_BYTES_MAX: usize = 128;

/// The shortest lock.
pub const LOCK_DURATION_MIN: Duration = Duration::from_secs(1);
/// The longest lock.
pub const LOCK_DURATION_MAX: Duration = Duration::from_secs(24 * 3_600);
/// The longest that a call waits for the outcome of another's attempt.
pub const WAIT_DURATION_MAX: Duration = Duration::from_secs(30);
/// The longest pause after a failure.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(7 * 24 * 3_600);

/// Events on a page of History; a larger page is lowered to it.
pub const PAGE_SIZE_MAX: usize = 500;
/// Buckets in an answer of Stats.
pub const BUCKETS_MAX: i64 = 1_000;
/// Counts in an answer of Stats, one for each provider in each bucket.
pub const COUNTS_MAX: usize = 40_000;
/// Bytes of an answer of Stats: what clients take unless told otherwise.
pub const STATS_BYTES_MAX: usize = 4 * 1_024 * 1_024;
/// Rows that Cleanup deletes in one transaction.
pub const BATCH_SIZE_MAX: i32 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    /// What stands above the fields of a name, without line breaks and the commas in numbers.
    fn comments(field: &str) -> String {
        let (mut found, mut comment) = (String::new(), String::new());
        for line in include_str!("oncegate/v1/idempotency.proto").lines() {
            if let Some(text) = line.trim().strip_prefix("//") {
                comment.push_str(text);
            } else {
                if line.contains(&format!(" {field} = ")) {
                    found.push_str(&comment);
                }
                comment.clear();
            }
        }
        found.replace(',', "")
    }

    #[test]
    fn the_contract_states_each_of_them() {
        let kib = |bytes: usize| bytes / 1_024;
        let hours = |duration: Duration| duration.as_secs() / 3_600;
        for (field, wanted) in [
            ("tenant", format!("At most {TENANT_BYTES_MAX} bytes of [A-Za-z0-9._-].")),
            ("provider", format!("At most {PROVIDER_BYTES_MAX} bytes of [a-z0-9._-].")),
            ("event_id", format!("1 to {EVENT_ID_BYTES_MAX} bytes of 0x21 to 0x7E.")),
            ("event_type", format!("1 to {EVENT_TYPE_BYTES_MAX} bytes of 0x21 to 0x7E.")),
            ("claim_id", format!("At most {CLAIM_ID_BYTES_MAX} bytes of 0x21 to 0x7E.")),
            ("holder", format!("At most {HOLDER_BYTES_MAX} bytes.")),
            ("delivery_id", format!("At most {DELIVERY_ID_BYTES_MAX} bytes of 0x21 to 0x7E.")),
            ("content_type", format!("At most {CONTENT_TYPE_BYTES_MAX} bytes.")),
            ("body", format!("At most {} KiB.", kib(RESULT_BODY_BYTES_MAX))),
            ("error", format!("at most {} KiB.", kib(ERROR_BYTES_MAX))),
            ("reason", format!("Why. 1 to {REASON_BYTES_MAX} bytes.")),
            ("actor", format!("Who decided. 1 to {ACTOR_BYTES_MAX} bytes.")),
            ("lock_duration", format!("Between {} s and {} h.", LOCK_DURATION_MIN.as_secs(), hours(LOCK_DURATION_MAX))),
            ("wait_duration", format!("At most {} s.", WAIT_DURATION_MAX.as_secs())),
            ("retry_after", format!("At most {} days.", hours(RETRY_AFTER_MAX) / 24)),
            ("page_size", format!("at most {PAGE_SIZE_MAX} (")),
            ("bucket_duration", format!("at most {BUCKETS_MAX} buckets.")),
            ("counts", format!("at most {COUNTS_MAX} of them and {} MiB", kib(STATS_BYTES_MAX) / 1_024)),
            ("batch_size", format!("at most {BATCH_SIZE_MAX}.")),
        ] {
            let stated = comments(field);
            assert!(stated.contains(&wanted), "{field}: {wanted} in{stated}");
        }
    }
}
