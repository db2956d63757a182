//! Calls to a sidecar, and its errors in words.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use clap::builder::BoolishValueParser;
use oncegate_gateway::sidecar::{Pool, Reach, ReachOptions};
use oncegate_runtime::{
    config::Problems,
    secret::{SecretText, file},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::failure::Failure;

/// A running sidecar accepts a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A command is over before any file changes.
const NEVER: Duration = Duration::from_secs(3_600);

/// Where the sidecar is, and who asks it. The environment's names are the gateway's: what works for it works here.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Sidecar {
    /// The sidecar to ask: http://host:port, https://host:port or unix:/path/of/a.sock
    #[arg(long = "sidecar", env = "SIDECAR_URL", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub(crate) url: String,

    #[command(flatten)]
    credentials: Credentials,
}

/// Who asks, and whom it believes.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Credentials {
    /// The authorities that the sidecar's certificate has to lead to, in PEM; by default the system's
    #[arg(long, env = "SIDECAR_CA_FILE", value_name = "FILE", value_parser = file)]
    pub(crate) ca_file: Option<PathBuf>,

    /// Your certificate in PEM, where the sidecar asks for one
    #[arg(long, env = "SIDECAR_CLIENT_CERT_FILE", value_name = "FILE", value_parser = file)]
    cert_file: Option<PathBuf>,

    /// The private key of your certificate, in PEM
    #[arg(long, env = "SIDECAR_CLIENT_KEY_FILE", value_name = "FILE", value_parser = file)]
    key_file: Option<PathBuf>,

    /// The token that the sidecar knows you by; other users of this machine see an option, so prefer the file
    #[arg(long, env = "SIDECAR_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    sidecar_token: Option<SecretText>,

    /// A file with the token
    #[arg(long, env = "SIDECAR_TOKEN_FILE", value_name = "FILE", value_parser = file)]
    token_file: Option<PathBuf>,

    /// Send the token without TLS to another machine
    #[arg(long, env = "SIDECAR_INSECURE", value_parser = BoolishValueParser::new())]
    insecure: bool,
}

impl Credentials {
    /// How to reach a sidecar with these credentials.
    pub(crate) fn reach(&self, url: &str) -> Result<Reach, Problems> {
        let options = ReachOptions {
            url: url.to_owned(),
            ca_file: self.ca_file.clone(),
            cert_file: self.cert_file.clone(),
            key_file: self.key_file.clone(),
            token: self.sidecar_token.clone(),
            token_file: self.token_file.clone(),
            insecure: self.insecure,
            connect_timeout: CONNECT_TIMEOUT,
            resolve_interval: NEVER,
            reload: NEVER,
        };
        options.validate()
    }
}

impl Sidecar {
    /// Connects.
    pub(crate) async fn connect(&self) -> Result<Pool, Failure> {
        let sidecars = Pool::new(self.credentials.reach(&self.url)?);
        sidecars.connect().await.map_err(|error| self.unreachable(anyhow::Error::from_boxed(error)))?;
        Ok(sidecars)
    }

    /// What an error of a call means for the command.
    pub(crate) fn failure(&self, status: &Status) -> Failure {
        self.failure_of(status, &[])
    }

    /// The same, where fields of the request were given as options: each field with the option's name.
    pub(crate) fn failure_of(&self, status: &Status, options: &[(&str, &str)]) -> Failure {
        if is_broken_off(status) {
            return self.unreachable(anyhow::anyhow!("{}", status.message()));
        }
        Failure::Failed(anyhow::anyhow!("{}", explain(status, options)))
    }

    fn unreachable(&self, error: anyhow::Error) -> Failure {
        Failure::Unreachable(error.context(format!("cannot reach the sidecar at {}", self.url)))
    }
}

/// Whether the connection failed, so that nothing is known of a sidecar there. A sidecar's own refusals carry a reason; a
/// server that speaks another protocol, or refuses our certificate, breaks off.
pub(crate) fn is_broken_off(status: &Status) -> bool {
    let broken = matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal);
    broken && status.get_details_error_info().is_none()
}

/// An error for people: what it is, why, which fields, and when to try again.
fn explain(status: &Status, options: &[(&str, &str)]) -> String {
    let details = status.get_error_details();
    let mut text = match details.bad_request() {
        // The message only sums up what is listed below.
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
            let option = options.iter().find(|(field, _)| *field == violation.field).map(|(_, option)| *option);
            let _ = write!(text, "\n  {}: {}", option.unwrap_or(&violation.field), violation.description);
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
            explain(&status, &[("older_than", "--days")]),
            "the sidecar refuses the request\n  code: InvalidArgument\n  reason: INVALID_FIELD\n  limit: 6d\n  \
             --days: at least 6 days\n  batch_size: at most 10000\n  try again in 1.5s"
        );
    }

    #[test]
    fn an_outage_of_the_store_is_not_one_of_the_sidecar() {
        let sidecar = Sidecar { url: "http://127.0.0.1:1".into(), credentials: Credentials::default() };
        assert!(matches!(sidecar.failure(&Status::unavailable("connection closed")), Failure::Unreachable(_)));
        let mut details = ErrorDetails::new();
        details.set_error_info("STORE_UNAVAILABLE", "oncegate.dev", []);
        let status = Status::with_error_details(Code::Unavailable, "no store", details);
        assert!(matches!(sidecar.failure(&status), Failure::Failed(_)));
    }
}
