//! `oncegate completions`.

use crate::{command_line, failure::Failure, output};

/// Write the completions of a shell
///
/// Prints a script that lets the shell complete the commands and options of oncegate. Where it belongs depends on the
/// shell and how it is set up.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate completions bash > ~/.local/share/bash-completion/completions/oncegate
  oncegate completions zsh > ~/.zfunc/_oncegate
  oncegate completions fish > ~/.config/fish/completions/oncegate.fish
  oncegate completions powershell >> $PROFILE")]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: clap_complete::Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command_line(), "oncegate", &mut script);
        output::raw(&script);
        Ok(())
    }
}
