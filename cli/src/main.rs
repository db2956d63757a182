//! The `oncegate` command: both services, and what the people who run them need.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod all;
mod bench;
mod bounds;
mod check;
mod cleanup;
mod completions;
#[cfg(test)]
mod configuration_document;
mod dev;
mod enforcement;
mod environment;
mod failure;
mod gateway;
mod health;
mod history;
mod http_client;
mod message;
mod migrate;
mod output;
mod print_config;
mod resolve;
mod service;
mod sidecar;
mod sidecar_client;
mod simulate;
mod stats;
mod threads;
mod verify;

use std::{
    env,
    ffi::{OsStr, OsString},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{CommandFactory as _, FromArgMatches as _, builder::Resettable, parser::ValueSource};
use oncegate_runtime::{
    config::Problems,
    logging::{self, Format, Written},
    metrics, shutdown,
    telemetry::{self, StartError, Tracing},
};

use self::{
    failure::{EXIT_CODES, Failure},
    threads::Threads,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Treats each payment event as happening once
///
/// Payment providers deliver every webhook at least once. Oncegate grants each event to one caller at a time, remembers
/// how it ended, and answers the duplicates. Start with `oncegate dev`.
///
/// Every option with a name in brackets is also read from the environment. The commands that serve log from info up, the
/// others from warn up, unless told otherwise.
#[derive(clap::Parser, Debug)]
#[command(name = "oncegate", version, max_term_width = 120, arg_required_else_help = true)]
struct Oncegate {
    #[command(subcommand)]
    command: Command,

    #[command(flatten, next_help_heading = "Log")]
    logging: logging::Options,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    Dev(dev::Dev),
    // Boxed: they have many options.
    All(Box<all::All>),
    Sidecar(Box<sidecar::Sidecar>),
    Gateway(Box<gateway::Gateway>),
    Migrate(migrate::Migrate),
    Check(check::Check),
    Stats(stats::Stats),
    History(history::History),
    Resolve(resolve::Resolve),
    Cleanup(cleanup::Cleanup),
    Health(health::Health),
    Enforcement(enforcement::EnforcementCommand),
    Verify(Box<verify::Verify>),
    Simulate(Box<simulate::Simulate>),
    Bench(Box<bench::Bench>),
    Completions(completions::Completions),
}

impl Command {
    /// The command as a service, which reports through its log; None: a command that does its work and ends.
    fn service(&self) -> Option<Service<'_>> {
        let (telemetry, name, threads) = match self {
            Self::All(all) => (&all.telemetry, "oncegate", &all.threads),
            Self::Sidecar(sidecar) => (&sidecar.telemetry, "oncegate-sidecar", &sidecar.threads),
            Self::Gateway(gateway) => (&gateway.telemetry, "oncegate-gateway", &gateway.threads),
            Self::Dev(_)
            | Self::Migrate(_)
            | Self::Check(_)
            | Self::Stats(_)
            | Self::History(_)
            | Self::Resolve(_)
            | Self::Cleanup(_)
            | Self::Health(_)
            | Self::Enforcement(_)
            | Self::Verify(_)
            | Self::Simulate(_)
            | Self::Bench(_)
            | Self::Completions(_) => return None,
        };
        Some(Service { telemetry, name, threads: threads.threads() })
    }

    /// Whether it has something to finish when told to end, and handles signals itself.
    fn heeds_signals(&self) -> bool {
        match self {
            Self::Dev(_) | Self::Bench(_) => true,
            Self::Stats(stats) => stats.goes_on(),
            _ => self.service().is_some(),
        }
    }

    /// Everything that is wrong with its settings, if it has some that are checked before it begins.
    fn problems(&self) -> Option<Problems> {
        let own = match self {
            Self::All(all) => all.problems(),
            Self::Sidecar(sidecar) => sidecar.problems(),
            Self::Gateway(gateway) => gateway.problems(),
            _ => None,
        };
        let traces = self.service().and_then(|service| service.telemetry.check().err());
        own.into_iter().chain(traces).reduce(Problems::and)
    }
}

/// A command that serves until it is told to stop.
struct Service<'a> {
    telemetry: &'a telemetry::Options,
    /// Its name in traces.
    name: &'static str,
    threads: Threads,
}

fn main() -> ExitCode {
    // Done before anything that might use TLS: with two providers in a process, rustls refuses to choose. An error means
    // that one is already installed.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let arguments: Vec<OsString> = env::args_os().collect();
    let matches = match without_values(command_line()).try_get_matches_from(&arguments) {
        Ok(matches) => matches,
        Err(error) => match environment::problems(&error, command_line(), &arguments) {
            Some(problems) => return unparsed(&Failure::from(problems), &arguments),
            None => error.exit(),
        },
    };
    if print_config::print(command_line(), &matches) {
        return written(Ok(()));
    }
    let mut oncegate = match Oncegate::from_arg_matches(&matches) {
        Ok(oncegate) => oncegate,
        Err(error) => error.exit(),
    };
    if matches.value_source("log_level") == Some(ValueSource::DefaultValue) && oncegate.command.service().is_none() {
        // Their results go to standard output; log lines in between, when all is well, would only hide them.
        oncegate.logging.log_level = "warn".parse().expect("a level is a filter");
    }
    let is_collected = oncegate.command.service().is_some() && oncegate.logging.log_format == Format::Json;
    let code = match start(oncegate) {
        Err(failure) if is_collected => failure.log(),
        ended => {
            // Before what is written past the log.
            logging::flush(logging::FLUSH_MAX);
            written(ended)
        }
    };
    logging::flush(logging::FLUSH_MAX);
    code
}

/// How the command ended; a failure if its output could not be written.
fn written(ended: Result<(), Failure>) -> ExitCode {
    let shown = output::finish().map_err(|error| anyhow::Error::from(error).context("cannot write the output").into());
    match ended.and(shown) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Commands that serve.
const SERVICES: [&str; 3] = ["all", "sidecar", "gateway"];

/// Reports a command line or an environment that cannot be parsed, which also contains the log settings.
fn unparsed(failure: &Failure, arguments: &[OsString]) -> ExitCode {
    let is_service = arguments.get(1).is_some_and(|command| SERVICES.iter().any(|service| command == service));
    let is_json = env::var("ONCEGATE_LOG_FORMAT").is_ok_and(|format| format.trim() == "json");
    let options = logging::Options { log_format: Format::Json, ..logging::Options::default() };
    if is_service && is_json && logging::init(&options, Written::AtOnce, None).is_ok() {
        failure.log()
    } else {
        failure.report()
    }
}

/// The command line whose help shows which variables exist, but not their values: part of a URL may be a secret.
/// `--print-config` shows what may be shown of them.
fn without_values(command: clap::Command) -> clap::Command {
    command.mut_args(|argument| argument.hide_env_values(true)).mut_subcommands(without_values)
}

/// The command line, with the exit codes at the end of every command's manual.
fn command_line() -> clap::Command {
    fn with_exit_codes(command: clap::Command) -> clap::Command {
        let text = match command.get_after_long_help() {
            Some(text) => format!("{text}\n\n{EXIT_CODES}"),
            None => EXIT_CODES.to_owned(),
        };
        command.after_long_help(text).mut_subcommands(with_exit_codes)
    }
    // OpenTelemetry treats an empty variable as unset.
    fn without_blank(command: clap::Command) -> clap::Command {
        let is_blank = |name: &OsStr| {
            name.to_str().is_some_and(|name| name.starts_with("OTEL_"))
                && env::var_os(name).is_some_and(|text| text.is_empty())
        };
        command
            .mut_args(|argument| match argument.get_env().is_some_and(is_blank) {
                true => argument.env(Resettable::Reset),
                false => argument,
            })
            .mut_subcommands(without_blank)
    }
    let mut command = without_blank(with_exit_codes(Oncegate::command()));
    for serves in SERVICES {
        command = command.mut_subcommand(serves, print_config::add);
    }
    command
}

fn start(oncegate: Oncegate) -> Result<(), Failure> {
    let service = oncegate.command.service();
    let threads = service.as_ref().map_or(Threads::ONE, |service| service.threads);
    let lines = if service.is_some() { Written::Queued } else { Written::AtOnce };
    let tracing = match service {
        Some(Service { telemetry, name, .. }) => match Tracing::start(telemetry, name) {
            Err(error) => {
                logging::init(&oncegate.logging, Written::AtOnce, None).context("cannot start logging")?;
                return Err(match error {
                    // Together with the service's own problems, which would be found next.
                    StartError::Settings(problems) => oncegate.command.problems().unwrap_or(problems).into(),
                    error => error.into(),
                });
            }
            Ok(tracing) => tracing,
        },
        None => None,
    };
    logging::init(&oncegate.logging, lines, tracing.as_ref()).context("cannot start logging")?;
    if !oncegate.command.heeds_signals() {
        shutdown::end_at_once_as_first_process().context("cannot listen for signals")?;
    }
    metrics::process::start();
    service::permit_files();
    let runtime = threads::runtime(threads).context("cannot start the runtime")?;
    let ended = runtime.block_on(run(oncegate.command));
    // Everything that matters has been waited for; the rest must not delay the end.
    runtime.shutdown_timeout(shutdown::RUNTIME_END_MAX);
    if let Some(tracing) = tracing {
        tracing.finish(telemetry::FLUSH_MAX);
    }
    ended
}

async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Dev(dev) => dev.run().await,
        Command::All(all) => all.run().await,
        Command::Sidecar(sidecar) => sidecar.run().await,
        Command::Gateway(gateway) => gateway.run().await,
        Command::Migrate(migrate) => migrate.run().await,
        Command::Check(check) => check.run().await,
        Command::Stats(stats) => stats.run().await,
        Command::History(history) => history.run().await,
        Command::Resolve(resolve) => resolve.run().await,
        Command::Cleanup(cleanup) => cleanup.run().await,
        Command::Health(health) => health.run().await,
        Command::Enforcement(enforcement) => enforcement.run().await,
        Command::Verify(verify) => verify.run().await,
        Command::Simulate(simulate) => simulate.run().await,
        Command::Bench(bench) => bench.run().await,
        Command::Completions(completions) => completions.run(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command_line().debug_assert();
    }

    #[test]
    fn a_log_level_is_seen_as_given_wherever_it_stands() {
        for (arguments, source) in [
            (&["oncegate", "health"][..], ValueSource::DefaultValue),
            (&["oncegate", "health", "--log-level", "debug"], ValueSource::CommandLine),
            (&["oncegate", "--log-level", "debug", "health"], ValueSource::CommandLine),
        ] {
            let matches = command_line().get_matches_from(arguments);
            assert_eq!(matches.value_source("log_level"), Some(source), "{arguments:?}");
        }
    }
}
