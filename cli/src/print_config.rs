//! `--print-config` of the commands that serve: every setting, its value, and where that came from. Secrets are not shown,
//! whether they are settings of their own or parts of a URL. Derived from the command line itself, so that no setting can be
//! forgotten.

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};
use oncegate_runtime::secret::shown_url;

use crate::output::{self, Column};

const FLAG: &str = "print_config";

/// Adds the option to a command that serves.
pub(crate) fn add(command: Command) -> Command {
    command.arg(
        Arg::new(FLAG)
            .long("print-config")
            .action(ArgAction::SetTrue)
            .help("Shows every setting, its value and where it came from, and ends. Secrets are not shown"),
    )
}

/// Shows the settings if requested; returns whether it was.
pub(crate) fn print(mut commands: Command, matches: &ArgMatches) -> bool {
    let Some((name, matches)) = matches.subcommand() else { return false };
    // Other commands do not have the option.
    if !matches.try_get_one::<bool>(FLAG).ok().flatten().is_some_and(|asked| *asked) {
        return false;
    }
    // Only this adds the options common to all commands to each of them.
    commands.build();
    let Some(command) = commands.find_subcommand(name) else { return false };
    let is_setting = |argument: &&Arg| argument.get_id() != FLAG && argument.get_id() != "help";
    let rows = command.get_arguments().filter(is_setting).filter_map(|argument| {
        let id = argument.get_id().as_str();
        let setting = match argument.get_env() {
            Some(variable) => variable.to_string_lossy().into_owned(),
            None => format!("--{}", argument.get_long()?),
        };
        let value = match matches.get_raw(id) {
            None => "-".to_owned(),
            Some(_) if argument.is_hide_env_values_set() => "***".to_owned(),
            Some(values) => values.map(|value| shown_url(&value.to_string_lossy())).collect::<Vec<_>>().join(","),
        };
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => "option",
            Some(ValueSource::EnvVariable) => "environment",
            Some(ValueSource::DefaultValue) => "default",
            Some(_) | None => "",
        };
        Some(vec![setting, value, source.to_owned()])
    });
    output::table(&[Column::Text("setting"), Column::Text("value"), Column::Text("from")], rows);
    true
}
