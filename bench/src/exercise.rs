//! Runs everything that the program does under load once, for scripts/profile to count. Code that is not exercised here is
//! compiled as if it hardly ever ran.

use std::{process::Command, thread, time::Duration};

use anyhow::Result;

use crate::{
    process::{self, Server, note},
    world::{EMBEDDED, World},
};

/// Loads over gRPC: workload and callers.
const CALLS: &[(&str, u32)] = &[
    ("cycle", 1),
    ("cycle", 16),
    ("cycle", 64),
    ("cycle", 256),
    ("duplicates", 1),
    ("duplicates", 64),
    ("mixed", 64),
    ("storm", 100),
];
/// Where the answers to duplicates come from: settings of a sidecar with a database.
const STORES: &[&[(&str, &str)]] =
    &[&[("CACHE_SIZE", "0B")], &[("CACHE_SIZE", "0B"), ("REDIS_URL", "redis://127.0.0.1:1")]];

/// How long a service that has just begun is left alone: what it does each second or two has been done by then, even where it runs
/// fifty times as slowly because every function is noted.
const IDLE: Duration = Duration::from_secs(10);

/// Starts each service on each store, leaves it alone, and ends it.
pub(crate) fn start(world: &World) -> Result<()> {
    let idle = |name: &str, server: Server| {
        note(&format!("  {name}"));
        thread::sleep(IDLE);
        drop(server);
    };
    world.postgres.create("start")?;
    // Twice: the second one finds the tables made.
    for name in ["sidecar, new database", "sidecar"] {
        idle(name, world.sidecar("start", &[])?);
    }
    idle("sidecar, embedded", world.sidecar("", &EMBEDDED)?);
    idle("all", world.all("start", &[])?);
    Ok(())
}

pub(crate) fn run(world: &World) -> Result<()> {
    world.postgres.create("calls")?;
    let sidecar = world.sidecar("calls", &[])?;
    load(world, &sidecar, CALLS)?;
    // What people look at in the meantime.
    for command in [&["stats"][..], &["history", "--limit", "50"]] {
        let mut program = Command::new(&world.options.oncegate);
        process::run(program.args(command).args(["--sidecar", &sidecar.url()]))?;
    }
    drop(sidecar);
    for settings in STORES {
        load(world, &world.sidecar("calls", settings)?, &[("duplicates", 1), ("duplicates", 64)])?;
    }
    // The embedded store.
    load(world, &world.sidecar("", &EMBEDDED)?, &[("cycle", 1), ("cycle", 64)])?;

    world.postgres.create("webhooks")?;
    let all = world.all("webhooks", &[])?;
    for workload in ["cycle", "duplicates"] {
        for callers in [1, 64] {
            note(&format!("  webhooks, {workload} c={callers}"));
            world.load_http(&all, workload, callers)?;
        }
    }
    Ok(())
}

fn load(world: &World, sidecar: &Server, loads: &[(&str, u32)]) -> Result<()> {
    for (workload, callers) in loads {
        note(&format!("  {workload} c={callers}"));
        world.load(sidecar, workload, *callers, &[])?;
    }
    Ok(())
}
