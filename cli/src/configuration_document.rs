//! `docs/configuration.md`, made from the command line's own definition so that it cannot be wrong.

use std::{fmt::Write as _, fs, path::Path};

use crate::command_line;

const HEAD: &str = "\
# Configuration

Made from the program: do not edit it by hand (`UPDATE_DOCUMENTS=1 cargo test -p oncegate-cli configuration_document`).

Every setting is an environment variable and an option of the command (`UPSTREAM_URL`, `--upstream-url`); the option goes before
the variable. Secrets can also be given by a file (`NAME_FILE`); files with secrets are read again when they change, but for those of
`REDIS_URL` and `REDIS_PASSWORD`, which need a restart. Durations and sizes have units: `250ms`, `5m`, `64MiB`. All
problems are reported at once. What is in force, and where each value comes from: `oncegate all --print-config`. The keys of the file
that `ONCEGATE_CONFIG` names: [`providers.md`](providers.md#more-routes).
";

/// The commands whose settings are shown; `all` takes those of the first two. Settings already shown are left out.
const COMMANDS: [(&str, &str); 6] = [
    ("sidecar", "The sidecar"),
    ("gateway", "The gateway"),
    ("stats", "Commands that ask a sidecar"),
    ("enforcement", "Commands that ask a gateway's admin listener"),
    ("dev", "Trying it out: `oncegate dev`"),
    ("simulate", "Webhooks of one's own: `oncegate simulate`"),
];

fn cell(text: &str) -> String {
    text.replace('|', "\\|").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A paragraph of help in one line: clap removes the full stop at its end.
fn sentence(paragraph: &str) -> String {
    let text = cell(paragraph);
    if text.ends_with(['.', ':']) { text } else { format!("{text}.") }
}

/// The arguments of a command and of those below it.
fn arguments(command: &clap::Command) -> Vec<&clap::Arg> {
    command.get_arguments().chain(command.get_subcommands().flat_map(arguments)).collect()
}

fn document() -> String {
    let mut text = HEAD.to_owned();
    let mut shown: Vec<String> = Vec::new();
    let mut commands = command_line();
    commands.build();
    for (name, title) in COMMANDS {
        let command = commands.find_subcommand(name).expect("the command exists");
        let mut rows = String::new();
        for argument in arguments(command).into_iter().filter(|argument| !argument.is_hide_set()) {
            let Some(variable) = argument.get_env().and_then(|variable| variable.to_str()) else { continue };
            if shown.iter().any(|known| known == variable) {
                continue;
            }
            shown.push(variable.to_owned());
            let defaults: Vec<_> =
                argument.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy())).collect();
            let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
            let choices: Vec<_> =
                argument.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
            let choices = match choices.is_empty() || !argument.get_action().takes_values() {
                true => String::new(),
                false => format!(" One of {}.", choices.join(", ")),
            };
            let help = help.split("\n\n").map(sentence).collect::<Vec<_>>().join(" ");
            let _ = writeln!(rows, "| `{variable}` | {} | {help}{choices} |", defaults.join(", "));
        }
        if !rows.is_empty() {
            let _ = write!(text, "\n## {title}\n\n| setting | default | meaning |\n| --- | --- | --- |\n{rows}");
        }
    }
    text
}

#[test]
fn every_variable_that_a_command_reads_is_in_the_document() {
    let (text, mut commands) = (document(), command_line());
    commands.build();
    for argument in arguments(&commands).into_iter().filter(|argument| !argument.is_hide_set()) {
        let Some(variable) = argument.get_env().and_then(|variable| variable.to_str()) else { continue };
        assert!(text.contains(&format!("| `{variable}` |")), "{variable}");
    }
}

#[test]
fn the_document_says_what_the_program_takes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let made = document();
    if std::env::var_os("UPDATE_DOCUMENTS").is_some() {
        fs::write(&path, &made).expect("the document of this repository can be written");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    let differs = made.lines().zip(written.lines()).find(|(made, written)| made != written);
    assert!(
        made == written,
        "docs/configuration.md is out of date, first at {differs:?}: run UPDATE_DOCUMENTS=1 cargo test -p oncegate-cli \
         configuration_document"
    );
}
