//! Logs: to standard error, as text for people or JSON for machines.

use std::{fmt, io::IsTerminal as _, str::FromStr};

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    Layer as _,
    filter::{FilterExt as _, LevelFilter, Targets, filter_fn},
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use crate::telemetry::{self, Tracing};

/// What is quieter than the rest unless named: their debug and info lines are about protocols, not about events.
const QUIET: &str = "h2=warn,hyper=warn,hyper_util=warn,rustls=warn,sqlx=warn,tonic=warn,tower=warn";

/// What somebody may have to answer for stays, whatever the level of the rest, unless it is named.
const AUDIT: &str = "oncegate_gateway::audit=info,oncegate_runtime::audit=info,oncegate_sidecar::audit=info";

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

/// A level, or levels by target, separated by commas: checked when it is parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(String);

/// The filter cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error("not a log filter; write for example info or info,oncegate_gateway=debug")]
pub struct FilterError(#[source] tracing_subscriber::filter::ParseError);

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        targets(text)?;
        Ok(Self(text.to_owned()))
    }
}

/// Where a target is named twice, the later one counts.
fn targets(text: &str) -> Result<Targets, FilterError> {
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    parts.join(",").parse().map_err(FilterError)
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

/// Starts logging for the whole process, and traces where there are some. Call it once, first thing in `main`.
///
/// # Errors
///
/// Logging was started before.
pub fn init(options: &Options, tracing: Option<&Tracing>) -> Result<(), InitError> {
    // A line for each request is for a collector; people ask for it.
    let access = match options.log_format {
        Format::Text => "oncegate_gateway::access=warn,oncegate_sidecar::access=warn,",
        Format::Json => "",
    };
    // What the operator wrote comes last: it replaces ours for the same module.
    let filter = targets(&format!("{QUIET},{AUDIT},{access}{}", options.log_level.0))?;
    // Spans are for traces: without them their call sites are off for good. The hint leaves the filter's own in force: without
    // one every line of every library would be asked about.
    let filter = filter.and(filter_fn(|metadata| !metadata.is_span()).with_max_level_hint(LevelFilter::TRACE));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    // Control characters in values are escaped by the formatter since 0.3.20 (pitfalls 3.5.5).
    let lines = match options.log_format {
        Format::Text => {
            let colours = std::io::stderr().is_terminal();
            lines
                .with_ansi(colours)
                .map_event_format(|format| Traced { format, json: false })
                .with_filter(filter)
                .boxed()
        }
        Format::Json => lines
            .json()
            .flatten_event(true)
            .map_event_format(|format| Traced { format, json: true })
            .with_filter(filter)
            .boxed(),
    };
    let mut layers = vec![lines];
    layers.extend(tracing.map(|tracing| tracing.layer().boxed()));
    tracing_subscriber::registry().with(layers).try_init().map_err(InitError::Twice)
}

/// Log lines that name the trace and the span that they were written in, where there is one.
struct Traced<F> {
    format: F,
    json: bool,
}

impl<S, N, F> FormatEvent<S, N> for Traced<F>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let Some((trace, span)) = telemetry::ids() else { return self.format.format_event(context, writer, event) };
        // Without colours: a line that goes to a trace as well is for a machine.
        let mut line = String::with_capacity(512);
        let plain = Writer::new(&mut line);
        self.format.format_event(context, plain, event)?;
        let line = line.trim_end();
        // A JSON line is one object, and text goes on.
        match line.strip_suffix('}').filter(|_| self.json) {
            Some(open) => writeln!(writer, "{open},\"trace_id\":\"{trace}\",\"span_id\":\"{span}\"}}"),
            None => writeln!(writer, "{line} trace_id={trace} span_id={span}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn filters_are_checked_when_parsed() {
        for text in ["info", "WARN", "warn,oncegate_gateway=debug", " info , sqlx=off,", "off", ""] {
            assert!(text.parse::<Filter>().is_ok(), "{text}");
        }
        for text in ["oncegate=loud", "a=b=c"] {
            assert!(text.parse::<Filter>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_later_of_two_levels_counts_and_the_longer_name_of_a_target_does() {
        let targets = targets("h2=warn,info,h2=debug,oncegate_gateway::access=warn").unwrap();
        for (target, level, enabled) in [
            ("oncegate_sidecar", Level::INFO, true),
            ("oncegate_sidecar", Level::DEBUG, false),
            ("h2::codec", Level::DEBUG, true),
            ("h2::codec", Level::TRACE, false),
            ("oncegate_gateway::access", Level::INFO, false),
            ("oncegate_gateway", Level::INFO, true),
        ] {
            assert_eq!(targets.would_enable(target, &level), enabled, "{target} {level}");
        }
    }

    #[test]
    fn the_lists_of_our_own_parse() {
        assert!(targets(&format!("{QUIET},{AUDIT}")).is_ok());
    }
}
