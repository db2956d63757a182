//! Calls to a sidecar, and its errors in words.

use std::{fmt::Write as _, time::Duration};

use oncegate_runtime::config::Problem;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::failure::Failure;

/// A sidecar that is there accepts a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the sidecar is.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Sidecar {
    /// The sidecar to ask
    #[arg(long = "sidecar", env = "SIDECAR_URL", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub(crate) url: String,
}

impl Sidecar {
    /// Connects.
    pub(crate) async fn connect(&self) -> Result<Channel, Failure> {
        let endpoint = Endpoint::from_shared(self.url.clone())
            .map_err(|error| Problem::new("SIDECAR_URL", format!("{} is not a URL: {error}", self.url)))?
            .connect_timeout(CONNECT_TIMEOUT);
        endpoint.connect().await.map_err(|error| self.unreachable(error.into()))
    }

    /// What an error of a call means for the command.
    pub(crate) fn failure(&self, status: &Status) -> Failure {
        // The sidecar's own refusals carry a reason; without one, it was the connection that failed.
        if status.code() == Code::Unavailable && status.get_details_error_info().is_none() {
            return self.unreachable(anyhow::anyhow!("{}", status.message()));
        }
        Failure::Failed(anyhow::anyhow!("{}", explain(status)))
    }

    fn unreachable(&self, error: anyhow::Error) -> Failure {
        Failure::Unreachable(error.context(format!("cannot reach the sidecar at {}", self.url)))
    }
}

/// An error for people: what it is, why, which fields, and when to try again.
fn explain(status: &Status) -> String {
    let details = status.get_error_details();
    let mut text = match details.bad_request() {
        // The message sums up what is listed below.
        Some(request) if !request.field_violations.is_empty() => "the sidecar refuses the request".to_owned(),
        _ => format!("the sidecar refuses: {}", status.message()),
    };
    // Writing to a String cannot fail.
    let _ = write!(text, "\n  code: {:?}", status.code());
    if let Some(info) = details.error_info() {
        let _ = write!(text, "\n  reason: {}", info.reason);
        let mut metadata: Vec<_> = info.metadata.iter().collect();
        metadata.sort();
        for (name, value) in metadata {
            let _ = write!(text, "\n  {name}: {value}");
        }
    }
    if let Some(request) = details.bad_request() {
        for violation in &request.field_violations {
            let _ = write!(text, "\n  {}: {}", violation.field, violation.description);
        }
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        let _ = write!(text, "\n  try again in {delay:?}");
    }
    text
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn every_detail_is_shown() {
        let mut details = ErrorDetails::new();
        details
            .set_error_info("INVALID_FIELD", "oncegate.dev", [("limit".to_owned(), "6d".to_owned())])
            .add_bad_request_violation("older_than", "at least 6 days")
            .add_bad_request_violation("batch_size", "at most 10000")
            .set_retry_info(Some(Duration::from_millis(1500)));
        let status = Status::with_error_details(Code::InvalidArgument, "bad request", details);
        assert_eq!(
            explain(&status),
            "the sidecar refuses the request\n  code: InvalidArgument\n  reason: INVALID_FIELD\n  limit: 6d\n  \
             older_than: at least 6 days\n  batch_size: at most 10000\n  try again in 1.5s"
        );
    }

    #[test]
    fn an_outage_of_the_store_is_not_one_of_the_sidecar() {
        let sidecar = Sidecar { url: "http://127.0.0.1:1".into() };
        assert!(matches!(sidecar.failure(&Status::unavailable("connection closed")), Failure::Unreachable(_)));
        let mut details = ErrorDetails::new();
        details.set_error_info("STORE_UNAVAILABLE", "oncegate.dev", []);
        let status = Status::with_error_details(Code::Unavailable, "no store", details);
        assert!(matches!(sidecar.failure(&status), Failure::Failed(_)));
    }
}
