//! What is asked for on the command line.

use std::path::PathBuf;

/// Measure Oncegate against what bounds it, and write docs/performance.md
#[derive(clap::Parser, Clone, Debug)]
#[command(name = "scripts/bench", max_term_width = 120)]
pub(crate) struct Options {
    /// Only these, as P1,P4; the others keep what the last run found, which has to be there
    #[arg(long, value_delimiter = ',', value_name = "P...")]
    pub(crate) only: Vec<String>,

    /// How often each side of a comparison runs, in turn
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) runs: u32,

    /// How long each run measures
    #[arg(long, default_value_t = 4.0, value_name = "SECONDS")]
    pub(crate) seconds: f64,

    /// Three short runs: for a first look, nothing to write down
    #[arg(long)]
    pub(crate) quick: bool,

    /// Measure the first version's design too, rebuilt in Node: needs node, npm and the npm registry
    #[arg(long)]
    pub(crate) with_node: bool,

    /// Rows of the large table in P11
    #[arg(long, default_value_t = 5_000_000, value_name = "N")]
    pub(crate) rows: u64,

    /// Rows that P12 deletes in each run
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    pub(crate) cleanup_rows: u64,

    /// Only runs what the program is for, for scripts/profile to count, and measures nothing
    #[arg(long, conflicts_with_all = ["only", "quick", "with_node"])]
    pub(crate) exercise: bool,

    /// Only starts each service, for scripts/profile to note what that runs, and measures nothing
    #[arg(long, conflicts_with_all = ["only", "quick", "with_node", "exercise"])]
    pub(crate) start: bool,

    /// The binary to measure
    #[arg(long, default_value = "target/dist/oncegate", value_name = "FILE")]
    pub(crate) oncegate: PathBuf,

    /// Where the table is written, between its marks; the chart goes beside it
    #[arg(long, default_value = "docs/performance.md", value_name = "FILE")]
    pub(crate) document: PathBuf,

    /// What the runs found, so that parts can be run one after the other
    #[arg(long, default_value = "target/bench/figures.json", value_name = "FILE")]
    pub(crate) figures: PathBuf,
}

impl Options {
    /// Applies what `--quick` stands for.
    pub(crate) fn settled(mut self) -> anyhow::Result<Self> {
        if self.quick {
            self.runs = self.runs.min(3);
            self.seconds = self.seconds.min(2.0);
            self.rows = self.rows.min(1_000_000);
            self.cleanup_rows = self.cleanup_rows.min(200_000);
        }
        anyhow::ensure!(self.seconds >= 0.5 && self.seconds <= 600.0, "--seconds: from 0.5 to 600");
        for name in &mut self.only {
            *name = name.trim().to_uppercase();
            anyhow::ensure!(crate::asked::is_known(name), "--only {name}: there are P1 to P14, and E1");
        }
        // Servers run in another directory.
        self.oncegate = std::path::absolute(&self.oncegate)?;
        anyhow::ensure!(self.oncegate.is_file(), "{} has not been built", self.oncegate.display());
        Ok(self)
    }

    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == name)
    }

    pub(crate) fn seconds_ms(&self) -> u64 {
        (self.seconds * 1_000.0) as u64
    }

    pub(crate) fn warm_up_ms(&self) -> u64 {
        (self.seconds_ms() / 4).clamp(250, 1_000)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_script_names_every_option_with_its_default() {
        let script = include_str!("../../scripts/bench");
        for option in Options::command().get_arguments() {
            let name = format!("#   --{} ", option.get_long().expect("all of them are long"));
            let line =
                script.lines().find(|line| line.starts_with(&name)).unwrap_or_else(|| panic!("{name}is missing"));
            for default in option.get_default_values().iter().filter(|_| option.get_action().takes_values()) {
                let default = format!("[default: {}]", default.to_str().unwrap());
                assert!(line.ends_with(&default), "{line}: {default}");
            }
        }
    }
}
