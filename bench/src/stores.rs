//! Postgres and Redis, started for the measurement: durable, on loopback, in a directory that is deleted.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use oncegate_installed::User;

use crate::process::{Server, free_address, run};

/// A temporary Postgres cluster.
#[derive(Debug)]
pub(crate) struct Postgres {
    server: Server,
    programs: PathBuf,
}

/// Deviations from PostgreSQL's defaults, for both sides of every comparison. Durability stays at its default: fsync
/// and synchronous_commit on. Checkpoints are kept out of runs of a few seconds.
const SETTINGS: &[&str] = &[
    "fsync=on",
    "synchronous_commit=on",
    "max_connections=200",
    "shared_buffers=512MB",
    "max_wal_size=8GB",
    "checkpoint_timeout=30min",
];

impl Postgres {
    pub(crate) fn start(directory: &Path) -> Result<Self> {
        let programs = oncegate_installed::postgres_programs()
            .context("PostgreSQL's programs initdb and postgres were not found: `scripts/test` installs them")?;
        let data = directory.join("postgres");
        fs::create_dir(&data)?;
        let user = user(&data)?;
        let command = |program: &str| {
            let mut command = Command::new(programs.join(program));
            command.current_dir(&data);
            if let Some(User { uid, gid }) = user {
                command.uid(uid).gid(gid);
            }
            command
        };
        let data = data.to_str().context("the temporary directory's name is no text")?;
        run(command("initdb").args([
            "-D",
            data,
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
        ]))?;
        let address = free_address()?;
        let port = address.port().to_string();
        let mut postgres = command("postgres");
        postgres.args(["-D", data, "-p", &port, "-h", "127.0.0.1", "-k", data]);
        for setting in SETTINGS {
            postgres.args(["-c", setting]);
        }
        // INT: it disconnects everybody and shuts down cleanly.
        let server = Server::start("postgres", postgres, address, directory, "INT")?;
        let postgres = Self { server, programs };
        postgres.wait()?;
        Ok(postgres)
    }

    fn wait(&self) -> Result<()> {
        // It listens before it can answer anything.
        for _ in 0..100 {
            if self.sql("postgres", "select 1").is_ok() {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        self.sql("postgres", "select 1").map(drop)
    }

    /// The URL of a database.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}/{database}", self.server.address)
    }

    /// Runs SQL and returns the rows, columns separated by |.
    pub(crate) fn sql(&self, database: &str, sql: &str) -> Result<String> {
        let mut psql = Command::new(self.program("psql"));
        psql.args(["-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-d", &self.url(database), "-c", sql]);
        run(&mut psql).map(|output| output.trim().to_owned())
    }

    /// Creates an empty database, replacing any existing one.
    pub(crate) fn create(&self, database: &str) -> Result<()> {
        self.sql("postgres", &format!("drop database if exists {database} with (force)"))?;
        self.sql("postgres", &format!("create database {database}")).map(drop)
    }

    /// A program of the same installation.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        let beside = self.programs.join(name);
        if beside.is_file() { beside } else { PathBuf::from(name) }
    }

    /// Its port.
    pub(crate) fn port(&self) -> u16 {
        self.server.address.port()
    }
}

/// The user to run Postgres as, since it refuses to run as root. Hands the directory over to that user.
fn user(data: &Path) -> Result<Option<User>> {
    let me = run(Command::new("id").arg("-u"))?;
    if me.trim() != "0" {
        return Ok(None);
    }
    let user = oncegate_installed::postgres_user()
        .context("Postgres does not run as root, and there is neither a user postgres nor nobody")?;
    std::os::unix::fs::chown(data, Some(user.uid), Some(user.gid))?;
    if let Some(parent) = data.parent() {
        fs::set_permissions(parent, fs::Permissions::from_mode(0o755))?;
    }
    Ok(Some(user))
}

/// Starts Redis without persistence.
pub(crate) fn start_redis(directory: &Path) -> Result<Server> {
    let address = free_address()?;
    let program = ["redis-server", "valkey-server"]
        .into_iter()
        .find(|program| run(Command::new(program).arg("--version")).is_ok())
        .context("redis-server was not found: `scripts/test` installs it")?;
    let mut command = Command::new(program);
    let port = address.port().to_string();
    command.args(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no"]);
    Server::start("redis", command, address, directory, "TERM")
}
