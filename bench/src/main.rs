//! Measures Oncegate against what bounds it: Postgres through pgbench, Redis, tonic and hyper with nothing behind them. Run by
//! `scripts/bench`, which builds what it needs.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod asked;
mod chart;
mod document;
mod exercise;
mod figures;
mod measure;
mod node;
mod options;
mod process;
mod stores;
mod world;

use std::{fs, io::Write as _, num::NonZero, process::Command, thread};

use anyhow::Result;
use clap::Parser as _;

use self::{figures::Figures, measure::Bench, options::Options, process::run, world::World};

fn main() -> Result<()> {
    let options = Options::parse().settled()?;
    process::end_servers_on_signals()?;
    if options.exercise {
        return exercise::run(&World::start(options)?);
    }
    if options.start {
        return exercise::start(&World::start(options)?);
    }
    let mut figures = Figures::read(&options.figures)?;
    if !options.quick {
        document::check(&options, &figures)?;
    }
    let world = World::start(options)?;
    let measured = Bench { world: &world, figures: &mut figures }.run();
    // Results found before something failed still count.
    let _ = writeln!(std::io::stdout(), "{}", document::table(&figures));
    if !world.options.quick {
        document::write(&world.options.document, &figures, &machine())?;
    }
    measured
}

/// The machine that it was measured on.
fn machine() -> String {
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':')).map(|(_, name)| name);
    let version = |program: &str| run(Command::new(program).arg("--version")).unwrap_or_default().trim().to_owned();
    let redis = version("redis-server");
    let redis = redis.split_whitespace().nth(2).unwrap_or("unknown").trim_start_matches("v=");
    format!(
        "{cpus} CPUs ({}), {}, Redis {redis}; load, service and stores share them.",
        model.unwrap_or("of an unknown model").trim(),
        version("psql").replace("psql (PostgreSQL)", "PostgreSQL"),
    )
}
