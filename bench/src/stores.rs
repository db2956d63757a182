//! Postgres and Redis, started for the measurement: durable, on loopback, in a directory that is deleted.

use std::{
    cmp::Reverse,
    env, fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

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
        let programs = programs()?;
        let data = directory.join("postgres");
        fs::create_dir(&data)?;
        let user = user(&data)?;
        let command = |program: &str| {
            let mut command = Command::new(programs.join(program));
            command.current_dir(&data);
            if let Some((uid, gid)) = user {
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

/// The directory of initdb and postgres, which distributions keep out of the PATH.
fn programs() -> Result<PathBuf> {
    let mut places = Vec::new();
    if let Ok(output) = run(Command::new("pg_config").arg("--bindir")) {
        places.push(PathBuf::from(output.trim()));
    }
    for (directory, end) in [("/usr/lib/postgresql", "bin"), ("/usr", "bin"), ("/opt/homebrew/opt", "bin")] {
        let mut versions: Vec<PathBuf> = fs::read_dir(directory)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().join(end))
            .filter(|path| path.to_string_lossy().contains("pgsql") || path.to_string_lossy().contains("postgresql"))
            .collect();
        versions.sort_by_cached_key(|path| Reverse(version(path)));
        places.extend(versions);
    }
    places.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    places
        .into_iter()
        .find(|directory| ["initdb", "postgres"].iter().all(|program| directory.join(program).is_file()))
        .context("PostgreSQL's programs initdb and postgres were not found: `scripts/test` installs them")
}

/// The numbers in the name of a version's directory, whose programs are in `path`: as text, 9.6 would be above 15. Empty, and so
/// below all others, where it names no version.
fn version(path: &Path) -> Vec<u32> {
    let name = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    name.split(|letter: char| !letter.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The user to run Postgres as, since it refuses to run as root. Hands the directory over to that user.
fn user(data: &Path) -> Result<Option<(u32, u32)>> {
    let me = run(Command::new("id").arg("-u"))?;
    if me.trim() != "0" {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd")?;
    for name in ["postgres", "nobody"] {
        let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name);
        if let Some(fields) = fields {
            let (uid, gid) = (fields[2].parse()?, fields[3].parse()?);
            std::os::unix::fs::chown(data, Some(uid), Some(gid))?;
            if let Some(parent) = data.parent() {
                fs::set_permissions(parent, fs::Permissions::from_mode(0o755))?;
            }
            return Ok(Some((uid, gid)));
        }
    }
    bail!("Postgres does not run as root, and there is neither a user postgres nor nobody")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_comes_first_by_number_and_not_as_text() {
        for (older, newer) in [
            ("/usr/lib/postgresql/9.6/bin", "/usr/lib/postgresql/15/bin"),
            ("/usr/lib/postgresql/9.5/bin", "/usr/lib/postgresql/9.6/bin"),
            ("/usr/pgsql-9.6/bin", "/usr/pgsql-17/bin"),
            ("/opt/homebrew/opt/postgresql@9.6/bin", "/opt/homebrew/opt/postgresql@16/bin"),
            ("/opt/homebrew/opt/postgresql/bin", "/opt/homebrew/opt/postgresql@9.6/bin"),
        ] {
            assert!(version(Path::new(older)) < version(Path::new(newer)), "{older} {newer}");
        }
    }
}
