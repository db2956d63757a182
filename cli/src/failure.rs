//! How a command fails, and the exit code that says so to scripts.

use std::{error::Error as StdError, fmt::Display, io, process::ExitCode};

use oncegate_runtime::{
    config::{Problem, Problems},
    telemetry,
};

use crate::output;

/// Printed at the end of `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  it worked
  1  it failed or was refused, or something was not found or not as it should be
  2  the command line or the configuration cannot be used; every problem is listed
  3  the sidecar, or the gateway that was named, cannot be reached
  130, 143  SIGINT, or SIGTERM, ended it before it had finished what was under way: a service the second one";

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It ran and showed that something is wrong: there is nothing to add.
    NotAsItShouldBe,
    /// A signal cut it short, with this code; what it had to say, it has said.
    Interrupted(u8),
    /// It could not be done.
    Failed(anyhow::Error),
    /// It was not tried: the configuration cannot be used.
    Configuration(Problems),
    /// Nobody answers there.
    Unreachable(anyhow::Error),
}

impl Failure {
    /// Tells the user and gives the code to exit with.
    pub(crate) fn report(&self) -> ExitCode {
        match self {
            Self::NotAsItShouldBe | Self::Interrupted(_) => {}
            Self::Failed(error) | Self::Unreachable(error) => output::complain(format_args!("{error:#}")),
            Self::Configuration(problems) => output::complain(problems),
        }
        self.code().into()
    }

    /// The same as a log line, for those who collect a service's log and would miss lines in another
    /// format.
    pub(crate) fn log(&self) -> ExitCode {
        if !tracing::enabled!(tracing::Level::ERROR) {
            // A failure to run is always reported, whatever the log settings are.
            return self.report();
        }
        let exit_code = self.code();
        match self {
            Self::NotAsItShouldBe | Self::Interrupted(_) => {}
            Self::Failed(error) | Self::Unreachable(error) => {
                tracing::error!(error = &**error as &dyn StdError, exit_code, "the service has failed");
            }
            Self::Configuration(problems) => {
                let problems: Vec<String> = problems.iter().map(Problem::to_string).collect();
                tracing::error!(problems = problems.join("; "), exit_code, "the configuration cannot be used");
            }
        }
        exit_code.into()
    }

    fn code(&self) -> u8 {
        match self {
            Self::Interrupted(code) => *code,
            Self::NotAsItShouldBe | Self::Failed(_) => 1,
            Self::Configuration(_) => 2,
            Self::Unreachable(_) => 3,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self::Configuration(problems)
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Configuration(problem.into())
    }
}

impl From<telemetry::StartError> for Failure {
    fn from(error: telemetry::StartError) -> Self {
        match error {
            telemetry::StartError::Settings(problems) => problems.into(),
            error => Self::Failed(anyhow::Error::from(error).context("cannot start traces")),
        }
    }
}

impl From<oncegate_sidecar::StartError> for Failure {
    fn from(error: oncegate_sidecar::StartError) -> Self {
        match error {
            oncegate_sidecar::StartError::Listen { address, source } => listen("SIDECAR_LISTEN", address, &source),
            error => Self::Failed(error.into()),
        }
    }
}

impl From<oncegate_gateway::StartError> for Failure {
    fn from(error: oncegate_gateway::StartError) -> Self {
        match error {
            oncegate_gateway::StartError::Listen { address, source } => listen("GATEWAY_LISTEN", address, &source),
            error => Self::Failed(error.into()),
        }
    }
}

/// An address that cannot be listened on: either the setting has to change, or the process that
/// already uses the address.
pub(crate) fn listen(setting: &'static str, address: impl Display, error: &io::Error) -> Failure {
    Problem::new(setting, format!("cannot listen on {address}: {error}")).into()
}
