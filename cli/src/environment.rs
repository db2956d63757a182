//! Reports environment variables that the command line cannot parse. Clap stops at the first value, and names the option
//! even if a variable was set.

use std::{
    error::Error as _,
    ffi::{OsStr, OsString},
    iter,
};

use clap::{
    Arg, Command, FromArgMatches as _,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
};
use oncegate_runtime::{
    chain::Chain,
    config::{Problem, Problems},
};

use crate::Oncegate;

/// Everything that is wrong with the configuration, if clap's error is about a variable: each one that cannot be parsed,
/// and all other problems. None if it is about something else.
pub(crate) fn problems(error: &clap::Error, commands: Command, arguments: &[OsString]) -> Option<Problems> {
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return None;
    }
    let name = arguments.iter().skip(1).find_map(|word| Some(commands.find_subcommand(word)?.get_name().to_owned()))?;
    let mut built = commands.clone();
    // Puts the options that every command has into each of them.
    built.build();
    let (wrong, found): (Vec<Arg>, Vec<Problem>) =
        built.find_subcommand(&name)?.get_arguments().filter_map(|argument| refused(argument, arguments)).unzip();
    let unparsed = found.iter().cloned().map(Problems::from).reduce(Problems::and)?;
    let others = others(commands, &name, &wrong, arguments);
    // A default stands in for what cannot be parsed: a problem with it is not about what was given.
    let is_known = |other: &Problem| {
        found.iter().any(|known| other.setting == known.setting || other.message.contains(&*known.setting))
    };
    let others = others.iter().flat_map(Problems::iter).filter(|other| !is_known(other));
    Some(others.cloned().map(Problems::from).fold(unparsed, Problems::and))
}

/// An option whose variable cannot be parsed, and why; None if it can, or if the option itself was given.
fn refused(argument: &Arg, arguments: &[OsString]) -> Option<(Arg, Problem)> {
    let variable = argument.get_env()?.to_str()?.to_owned();
    let option = format!("--{}", argument.get_long()?);
    let is_option = |word: &OsStr| {
        word.to_str()
            .and_then(|word| word.strip_prefix(&option))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    };
    if arguments.iter().any(|word| is_option(word)) {
        return None;
    }
    // Parsed alone, so that it is the only one that can be wrong.
    let alone = Command::new("oncegate").no_binary_name(true).arg(argument.clone());
    let error = alone.try_get_matches_from(iter::empty::<OsString>()).err()?;
    Some((argument.clone(), Problem::new(variable, message(argument, &error))))
}

fn message(argument: &Arg, error: &clap::Error) -> String {
    let mut text = match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) if value.is_empty() => "given and empty".to_owned(),
        // Whatever precedes an @, or follows the path of a URL, may be a password.
        Some(ContextValue::String(value)) if !argument.is_hide_env_values_set() && !value.contains(['@', '?', '#']) => {
            format!("{value:?} given")
        }
        _ => "cannot be used".to_owned(),
    };
    if let Some(source) = error.source() {
        text.push_str(&format!(": {}", Chain(source)));
    }
    if let Some(ContextValue::Strings(values)) = error.get(ContextKind::ValidValue)
        && !values.is_empty()
    {
        text.push_str(&format!(", permitted are {}", values.join(", ")));
    }
    let is_address = argument.get_value_names().is_some_and(|names| names.iter().any(|name| name == "ADDRESS"));
    // Some kinds of addresses already say it themselves.
    if is_address && !text.contains("write for example") {
        let default = argument.get_default_values().first().and_then(|value| value.to_str());
        text.push_str(&format!("; write for example {}", default.unwrap_or("127.0.0.1:9090")));
    }
    text
}

/// What else is wrong with the command's settings.
fn others(commands: Command, name: &str, wrong: &[Arg], arguments: &[OsString]) -> Option<Problems> {
    let without = |command: Command, argument: &Arg| {
        command.mut_arg(argument.get_id(), |argument| argument.env(Resettable::Reset))
    };
    let (all, own): (Vec<&Arg>, Vec<&Arg>) = wrong.iter().partition(|argument| argument.is_global_set());
    let commands = all.into_iter().fold(commands, without);
    let commands = commands.mut_subcommand(name, |command| own.into_iter().fold(command, without));
    let matches = commands.try_get_matches_from(arguments).ok()?;
    Oncegate::from_arg_matches(&matches).ok()?.command.problems()
}
