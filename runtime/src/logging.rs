//! Logs: to standard error, as text for people or JSON for machines.

mod lines;

use std::{
    error::Error as StdError,
    fmt,
    io::{self, IsTerminal as _},
    str::FromStr,
    sync::OnceLock,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    filter::{FilterExt as _, LevelFilter, Targets, filter_fn},
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format::Writer},
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use self::lines::Lines;
use crate::{
    metrics::Counter,
    telemetry::{self, Tracing},
};

/// How long the end of a process waits for its last lines to be read.
pub const FLUSH_MAX: Duration = Duration::from_secs(1);

/// The queue of a process that serves.
static QUEUED: OnceLock<Lines> = OnceLock::new();

/// Modules that are quieter than the rest unless named: their debug and info lines are about protocols, not about events.
const QUIET: &str = "h2=warn,hyper=warn,hyper_util=warn,rustls=warn,sqlx=warn,tonic=warn,tower=warn";

/// Audit lines stay whatever the level of the rest, unless their target is named.
const AUDIT: &str = "oncegate_gateway::audit=info,oncegate_runtime::audit=info,oncegate_sidecar::audit=info";

/// How to log.
#[derive(clap::Args, Debug, Clone)]
pub struct Options {
    /// The form of the log on standard error: text for people, json for a log collector
    #[arg(long, env = "ONCEGATE_LOG_FORMAT", value_enum, default_value_t = Format::Text, global = true)]
    pub log_format: Format,

    /// What to log: a level (error, warn, info, debug, trace), or levels by module, for example
    /// `info,oncegate_gateway=debug`
    #[arg(long, env = "ONCEGATE_LOG", value_name = "FILTER", default_value = DEFAULT, global = true)]
    pub log_level: Filter,
}

impl Default for Options {
    fn default() -> Self {
        Self { log_format: Format::Text, log_level: Filter(DEFAULT.to_owned()) }
    }
}

/// The form of log lines.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A line for people.
    Text,
    /// A JSON object a line.
    Json,
}

const DEFAULT: &str = "info";

/// A level, or levels by target, separated by commas: checked when it is parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(String);

/// What a bare word may name besides a level: our own crates, and all targets that they set a level for, begin with this.
const OURS: &str = "oncegate";

/// The filter cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// It is not a valid filter.
    #[error("not a log filter; write for example info or info,oncegate_gateway=debug")]
    Syntax(#[source] tracing_subscriber::filter::ParseError),
    /// A word that would be taken for the name of a module that does not exist: nothing else would be logged.
    #[error(
        "{0:?} is neither a level (off, error, warn, info, debug, trace) nor a module of ours; for another \
         module write {0}=debug"
    )]
    Word(String),
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        // As elsewhere, a blank setting counts as unset; for silence there is `off`.
        if parts(text).next().is_none() {
            return Ok(Self(DEFAULT.to_owned()));
        }
        targets(text)?;
        for word in parts(text).filter(|part| !part.contains('=')) {
            let of_a_library = || QUIET.split(',').any(|known| known.split('=').next() == Some(word));
            if word.parse::<LevelFilter>().is_err() && !word.starts_with(OURS) && !of_a_library() {
                return Err(FilterError::Word(word.to_owned()));
            }
        }
        Ok(Self(text.to_owned()))
    }
}

fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// Where a target is named twice, the later one counts.
fn targets(text: &str) -> Result<Targets, FilterError> {
    let parts: Vec<&str> = parts(text).collect();
    parts.join(",").parse().map_err(FilterError::Syntax)
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
    /// The thread that writes cannot be started.
    #[error("cannot start the thread that writes the log")]
    Thread(#[source] io::Error),
}

/// Who writes lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Whoever logs: for a command that ends by itself.
    AtOnce,
    /// A thread of its own, so that a reader that has stopped holds up nobody. What it does not take in time is lost, and counted
    /// ([`lost`]). [`flush`] before the end.
    Queued,
}

/// How many lines were lost because nobody read them.
pub(crate) fn lost() -> &'static Counter {
    &lines::LOST
}

/// Waits until what was logged has been written, at most for so long. Blocks the thread.
pub fn flush(limit: Duration) {
    if let Some(lines) = QUEUED.get() {
        lines.flush(limit);
    }
}

/// Starts logging for the whole process, and tracing if configured. Call it once, first thing in `main`.
///
/// # Errors
///
/// Logging was started before, or its thread cannot be started.
pub fn init(options: &Options, written: Written, tracing: Option<&Tracing>) -> Result<(), InitError> {
    // A line per request is meant for a collector; people have to ask for it.
    let access = match options.log_format {
        Format::Text => "oncegate_gateway::access=warn,oncegate_sidecar::access=warn,",
        Format::Json => "",
    };
    // The operator's own filter comes last, so that it replaces ours for the same module.
    let filter = targets(&format!("{QUIET},{AUDIT},{access}{}", options.log_level.0))?;
    // Spans are for traces: without traces their call sites are off for good. The hint keeps the filter's own maximum level
    // effective: without it every line of every library would have to be checked.
    let filter = filter.and(filter_fn(|metadata| !metadata.is_span()).with_max_level_hint(LevelFilter::TRACE));
    let (format, colours) = (options.log_format, io::stderr().is_terminal());
    let lines = match written {
        Written::AtOnce => lines_in(format, colours, io::stderr),
        Written::Queued => {
            let queue = Lines::start(io::stderr()).map_err(InitError::Thread)?;
            lines_in(format, colours, QUEUED.get_or_init(|| queue).clone())
        }
    };
    let mut layers = vec![lines.with_filter(filter).boxed()];
    layers.extend(tracing.map(|tracing| tracing.layer().boxed()));
    tracing_subscriber::registry().with(layers).try_init().map_err(InitError::Twice)
}

/// Identifies an event in logs and spans: twelve hexadecimal digits, enough to find the lines of both services that belong
/// together, revealing nothing of the event's name (W17). Its value must stay the same across versions, or a search would
/// miss half of the lines.
#[must_use]
pub fn event_digest(tenant: &str, provider: &str, event_id: &str) -> String {
    let mut hash = Sha256::new();
    for part in [tenant, "/", provider, "/", event_id] {
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..6])
}

/// The layer that writes lines.
fn lines_in<S, W>(format: Format, colours: bool, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    // Control characters in values are escaped by the formatter since 0.3.20.
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        Format::Text => lines.with_ansi(colours).map_event_format(|format| Traced { format, json: false }).boxed(),
        Format::Json => {
            lines.json().flatten_event(true).map_event_format(|format| Traced { format, json: true }).boxed()
        }
    }
}

/// Log lines that name the trace and the span they were written in, if any, and in JSON also the sources of their errors,
/// which the library only writes in text.
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
        let ids = telemetry::ids();
        let mut causes = Causes::default();
        if self.json {
            event.record(&mut causes);
        }
        if ids.is_none() && causes.members.is_empty() {
            return self.format.format_event(context, writer, event);
        }
        // Without colours: lines written while tracing are for a machine.
        let mut line = String::with_capacity(512);
        let plain = Writer::new(&mut line);
        self.format.format_event(context, plain, event)?;
        let line = line.trim_end();
        // A JSON line is one object to be completed; text is simply continued.
        match (line.strip_suffix('}').filter(|_| self.json), ids) {
            (Some(open), Some((trace, span))) => {
                writeln!(writer, "{open}{},\"trace_id\":\"{trace}\",\"span_id\":\"{span}\"}}", causes.members)
            }
            (Some(open), None) => writeln!(writer, "{open}{}}}", causes.members),
            (None, Some((trace, span))) => writeln!(writer, "{line} trace_id={trace} span_id={span}"),
            (None, None) => writeln!(writer, "{line}"),
        }
    }
}

/// The sources of an event's errors, as members of its JSON object, each preceded by a comma, under the names that they
/// have in text.
#[derive(Default)]
struct Causes {
    members: String,
}

impl Visit for Causes {
    fn record_error(&mut self, field: &Field, error: &(dyn StdError + 'static)) {
        let mut sources: Vec<serde_json::Value> = Vec::new();
        let mut source = error.source();
        while let Some(error) = source {
            sources.push(error.to_string().into());
            source = error.source();
        }
        if !sources.is_empty() {
            let name = serde_json::Value::from(format!("{field}.sources"));
            self.members.push_str(&format!(",{name}:{}", serde_json::Value::from(sources)));
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use tracing::Level;

    use super::*;

    /// Where lines go for a test to read.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("no \"session\"")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("no connection\n")]
    struct Inner(#[source] fmt::Error);

    #[test]
    fn json_lines_carry_what_an_error_comes_from() {
        let lines = Lines::default();
        let written = lines.clone();
        let layer = lines_in(Format::Json, false, move || written.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let error = Outer(Inner(fmt::Error));
            tracing::warn!(error = &error as &dyn StdError, session = 1, "the ledger cannot be reached");
            tracing::warn!(error = &fmt::Error as &dyn StdError, "without a cause");
        });
        let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!((&lines[0]["error"], &lines[0]["session"]), (&"no \"session\"".into(), &1.into()));
        assert_eq!(lines[0]["error.sources"], serde_json::json!(["no connection\n", fmt::Error.to_string()]));
        assert_eq!(lines[1].get("error.sources"), None);
    }

    #[test]
    fn filters_are_checked_when_parsed() {
        for text in [
            "info",
            "WARN",
            "warn,oncegate_gateway=debug",
            " info , sqlx=off,",
            "off",
            "oncegate_sidecar",
            "warn,oncegate_gateway::access",
            "h2",
            "verbose=debug",
        ] {
            assert!(text.parse::<Filter>().is_ok(), "{text}");
        }
        for blank in ["", " ", ","] {
            assert_eq!(blank.parse::<Filter>().unwrap(), Filter(DEFAULT.to_owned()), "{blank:?}");
        }
        for text in ["oncegate=loud", "a=b=c"] {
            assert!(text.parse::<Filter>().is_err(), "{text}");
        }
        for (text, word) in [("warning", "warning"), ("info, verbose", "verbose")] {
            let refused = text.parse::<Filter>().unwrap_err().to_string();
            let parts = [word, "off, error, warn, info, debug, trace"];
            assert!(parts.iter().all(|part| refused.contains(part)), "{refused}");
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
    fn w17_an_event_has_the_same_digest_in_every_version() {
        assert_eq!(event_digest("default", "stripe", "evt_1"), "117d07750669");
    }

    #[test]
    fn the_lists_of_our_own_parse() {
        assert!(targets(&format!("{QUIET},{AUDIT}")).is_ok());
    }
}
