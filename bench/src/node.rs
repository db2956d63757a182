//! The first version's design, rebuilt in Node: express, ioredis, pg; two statements an event, Redis before them.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    process::{Server, free_address, note, run},
    world::{SECRET, World},
};

/// Installs its packages from npm into the temporary directory, and starts it.
pub(crate) fn start(world: &World, database: &str) -> Result<Server> {
    let directory = world.directory().join("node");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("package.json"), include_str!("node/package.json"))?;
    fs::write(directory.join("server.js"), include_str!("node/server.js"))?;
    note("installing express, ioredis and pg from npm");
    run(Command::new("npm").args(["install", "--no-audit", "--no-fund", "--ignore-scripts"]).current_dir(&directory))
        .context("--with-node needs npm")?;
    world.postgres.sql(database, include_str!("node/table.sql"))?;
    let address = free_address()?;
    let mut command = Command::new("node");
    command
        .arg("server.js")
        .current_dir(&directory)
        .env("NODE_ENV", "production")
        .env("PORT", address.port().to_string())
        .env("DATABASE_URL", world.postgres.url(database))
        .env("REDIS_PORT", world.redis.address.port().to_string())
        .env("STRIPE_WEBHOOK_SECRET", SECRET);
    Server::start("node", command, address, world.directory(), "TERM")
}
