//! From errors to gRPC statuses: one table. Each status carries exactly one `ErrorInfo`.

use std::{collections::HashMap, time::Duration};

use oncegate_api::reason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::{event::Refusal, ledger::Error};

/// A status with its reason.
pub(super) fn status(code: Code, reason: &str, message: impl Into<String>) -> Status {
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, reason::DOMAIN, HashMap::new()))
}

/// A status that says when to ask again.
pub(super) fn retryable(code: Code, reason: &str, message: impl Into<String>, retry_after: Duration) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, reason::DOMAIN, HashMap::new());
    details.set_retry_info(Some(retry_after));
    Status::with_error_details(code, message, details)
}

/// INVALID_ARGUMENT with every violation at once.
pub(super) fn invalid(violations: Vec<FieldViolation>) -> Status {
    let message = match violations.as_slice() {
        [one] => format!("{}: {}", one.field, one.description),
        many => format!(
            "{} fields are invalid: {}",
            many.len(),
            many.iter().map(|violation| violation.field.as_str()).collect::<Vec<_>>().join(", ")
        ),
    };
    let mut details = ErrorDetails::with_error_info(reason::INVALID_FIELD, reason::DOMAIN, HashMap::new());
    details.set_bad_request(violations);
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// The table: the code of an error, and its reason.
fn row(error: &Error) -> (Code, &'static str) {
    match error {
        Error::Refused(refusal) => match refusal {
            Refusal::FingerprintMismatch => (Code::FailedPrecondition, reason::FINGERPRINT_MISMATCH),
            Refusal::DeliveryMismatch => (Code::FailedPrecondition, reason::DELIVERY_MISMATCH),
            Refusal::ClaimEnded => (Code::FailedPrecondition, reason::CLAIM_ENDED),
            Refusal::OutcomeConflict { .. } => (Code::FailedPrecondition, reason::OUTCOME_CONFLICT),
            Refusal::StateConflict { .. } => (Code::FailedPrecondition, reason::STATE_CONFLICT),
            Refusal::LockLost { .. } => (Code::Aborted, reason::LOCK_LOST),
            Refusal::NotFound => (Code::NotFound, reason::EVENT_NOT_FOUND),
        },
        Error::Unavailable { .. } => (Code::Unavailable, reason::STORE_UNAVAILABLE),
        Error::Overloaded { .. } => (Code::Unavailable, reason::OVERLOADED),
        Error::OutcomeUnknown => (Code::Unavailable, reason::OUTCOME_UNKNOWN),
        Error::Internal(_) => (Code::Internal, reason::INTERNAL),
    }
}

/// The reason that the caller is told.
pub(super) fn reason_of(error: &Error) -> &'static str {
    row(error).1
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let ((code, reason), message) = (row(&error), error.to_string());
        match error {
            Error::Refused(Refusal::LockLost { state, fencing_token, .. }) => {
                let metadata = HashMap::from([
                    ("state".to_owned(), super::convert::state(state).as_str_name().to_owned()),
                    ("fencing_token".to_owned(), fencing_token.to_string()),
                ]);
                let details = ErrorDetails::with_error_info(reason, reason::DOMAIN, metadata);
                Status::with_error_details(code, message, details)
            }
            Error::Unavailable { retry_after } | Error::Overloaded { retry_after } => {
                retryable(code, reason, message, retry_after)
            }
            Error::OutcomeUnknown => retryable(code, reason, message, Duration::from_secs(1)),
            Error::Refused(_) | Error::Internal(_) => status(code, reason, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn what_may_have_happened_is_told_from_what_has_not() {
        let later = Duration::from_secs(1);
        for (error, reason) in [
            (Error::OutcomeUnknown, reason::OUTCOME_UNKNOWN),
            (Error::Unavailable { retry_after: later }, reason::STORE_UNAVAILABLE),
            (Error::Overloaded { retry_after: later }, reason::OVERLOADED),
        ] {
            let status = Status::from(error);
            assert_eq!(status.code(), Code::Unavailable);
            let details = status.get_error_details();
            assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some(reason));
            assert_eq!(details.retry_info().and_then(|info| info.retry_delay), Some(later));
        }
    }
}
