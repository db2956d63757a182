//! Logs: to standard error, as text for people or JSON for machines.

use std::{io::IsTerminal as _, str::FromStr};

use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// What is quieter than the rest unless named: their debug and info lines are about protocols, not about events.
const QUIET: &str = "h2=warn,hyper=warn,hyper_util=warn,rustls=warn,sqlx=warn,tonic=warn,tower=warn";

/// How to log.
#[derive(clap::Args, Debug, Clone)]
pub struct Options {
    /// The form of the log on standard error: text for people, json for a log collector
    #[arg(long, env = "ONCEGATE_LOG_FORMAT", value_enum, default_value_t = Format::Text, global = true)]
    pub log_format: Format,

    /// What to log: a level (error, warn, info, debug, trace), or levels by module, for example
    /// `info,oncegate_gateway=debug`
    #[arg(long, env = "ONCEGATE_LOG", value_name = "FILTER", default_value = "info", global = true)]
    pub log_level: Filter,
}

/// The form of log lines.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A line for people.
    Text,
    /// A JSON object a line.
    Json,
}

/// A filter in the syntax of `tracing`'s `EnvFilter`, checked when it is parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(String);

/// The filter cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error("not a log filter; write for example info or info,oncegate_gateway=debug")]
pub struct FilterError(#[source] tracing_subscriber::filter::ParseError);

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        EnvFilter::builder().parse(text).map_err(FilterError)?;
        Ok(Self(text.to_owned()))
    }
}

/// Why logging could not be started.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The filter cannot be parsed.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// Something else in the process logs already.
    #[error("logging was started before")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Starts logging for the whole process. Call it once, first thing in `main`.
///
/// # Errors
///
/// Logging was started before.
pub fn init(options: &Options) -> Result<(), InitError> {
    // What the operator wrote comes last: it replaces ours for the same module.
    let filter = EnvFilter::builder().parse(format!("{QUIET},{}", options.log_level.0)).map_err(FilterError)?;
    let registry = tracing_subscriber::registry().with(filter);
    // Control characters in values are escaped by the formatter since 0.3.20 (pitfalls 3.5.5).
    let started = match options.log_format {
        Format::Text => {
            let colours = std::io::stderr().is_terminal();
            let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
            registry.with(lines).try_init()
        }
        Format::Json => {
            let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).json().flatten_event(true);
            registry.with(lines).try_init()
        }
    };
    started.map_err(InitError::Twice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked_when_parsed() {
        for text in ["info", "warn,oncegate_gateway=debug", "off"] {
            assert!(text.parse::<Filter>().is_ok(), "{text}");
        }
        assert!("oncegate=loud".parse::<Filter>().is_err());
    }

    #[test]
    fn the_quiet_list_parses() {
        assert!(EnvFilter::builder().parse(QUIET).is_ok());
    }
}
