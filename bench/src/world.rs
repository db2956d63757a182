//! Everything that a measurement runs against, and the programs that generate the load.

use std::{
    cell::OnceCell,
    env,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use tempfile::TempDir;

use crate::{
    options::Options,
    process::{Server, free_address, note, run},
    stores::{Postgres, start_redis},
};

/// What webhooks are signed with here.
pub(crate) const SECRET: &str = "whsec_for_measurements_only";

/// What is set where nothing is installed: a file in the directory of the measurement, and no Redis.
pub(crate) const EMBEDDED: [(&str, &str); 2] = [("DATABASE_URL", ""), ("REDIS_URL", "")];

/// Under a tool that notes each function a start takes tens of seconds.
const HEALTHY_DEADLINE: Duration = Duration::from_secs(60);

/// The servers of a run.
pub(crate) struct World {
    pub(crate) options: Options,
    pub(crate) postgres: Postgres,
    pub(crate) redis: Server,
    directory: TempDir,
    application: OnceCell<Server>,
}

/// One line of the report of `oncegate bench`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Operation {
    operation: String,
    pub(crate) count: u64,
    pub(crate) per_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

#[derive(Debug, Deserialize)]
struct BenchReport {
    operations: Vec<Operation>,
    errors: std::collections::BTreeMap<String, u64>,
    correctness: Correctness,
}

#[derive(Debug, Deserialize)]
struct Correctness {
    storms: u64,
    storms_without_winner: u64,
    double_grants: u64,
}

/// What a load found.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// The operation that the workload is about.
    pub(crate) main: Operation,
    /// Storms, and those that did not have exactly one winner.
    pub(crate) storms: (u64, u64),
}

impl World {
    pub(crate) fn start(options: Options) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("oncegate-bench-").tempdir()?;
        note("starting Postgres and Redis");
        let postgres = Postgres::start(directory.path())?;
        let redis = start_redis(directory.path())?;
        Ok(Self { options, postgres, redis, directory, application: OnceCell::new() })
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A sidecar on a database of this name, with these settings.
    pub(crate) fn sidecar(&self, database: &str, settings: &[(&str, &str)]) -> Result<Server> {
        let address = free_address()?;
        let mut command = self.service("sidecar", database, settings);
        command.env("SIDECAR_LISTEN", address.to_string());
        let sidecar = Server::start("sidecar", command, address, self.directory(), "TERM")?;
        self.wait_until_healthy(&sidecar.url())?;
        Ok(sidecar)
    }

    /// It listens before it has created its tables.
    fn wait_until_healthy(&self, url: &str) -> Result<()> {
        let ask = || {
            let mut health = Command::new(&self.options.oncegate);
            run(health.args(["health", "--sidecar", url]).current_dir(self.directory()))
        };
        let began = Instant::now();
        while began.elapsed() < HEALTHY_DEADLINE {
            if ask().is_ok() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        ask().map(drop).context("the sidecar does not get healthy")
    }

    /// Both services in one process, in front of an application that accepts everything at once.
    pub(crate) fn all(&self, database: &str, settings: &[(&str, &str)]) -> Result<Server> {
        if self.application.get().is_none() {
            let mut command = Command::new(self.program("bare-hyper")?);
            let address = free_address()?;
            command.arg(address.to_string()).arg("--application");
            let started = Server::start("application", command, address, self.directory(), "TERM")?;
            let _ = self.application.set(started);
        }
        let application = self.application.get().context("it was started above")?.url();
        let address = free_address()?;
        let mut command = self.service("all", database, settings);
        let sidecar = free_address()?;
        command
            .env("SIDECAR_LISTEN", sidecar.to_string())
            .env("GATEWAY_LISTEN", address.to_string())
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env("UPSTREAM_URL", application);
        let all = Server::start("all", command, address, self.directory(), "TERM")?;
        self.wait_until_healthy(&format!("http://{sidecar}"))?;
        Ok(all)
    }

    fn service(&self, name: &str, database: &str, settings: &[(&str, &str)]) -> Command {
        let mut command = Command::new(&self.options.oncegate);
        command
            .arg(name)
            .env_clear()
            .env("DATABASE_URL", self.postgres.url(database))
            .env("REDIS_URL", format!("redis://{}", self.redis.address))
            .env("ONCEGATE_MIGRATE", "true")
            .env("ONCEGATE_LOG", "warn")
            .current_dir(self.directory());
        for (name, value) in settings {
            // An empty value unsets what is set above.
            if value.is_empty() {
                command.env_remove(name)
            } else {
                command.env(name, value)
            };
        }
        command
    }

    /// A server of ours with nothing behind it.
    pub(crate) fn bare(&self, name: &'static str) -> Result<Server> {
        let address = free_address()?;
        let mut command = Command::new(self.program(name)?);
        command.arg(address.to_string()).env("STRIPE_WEBHOOK_SECRET", SECRET);
        Server::start(name, command, address, self.directory(), "TERM")
    }

    fn program(&self, name: &str) -> Result<PathBuf> {
        let me = env::current_exe()?;
        let program = me.parent().context("this program is in no directory")?.join(name);
        ensure!(program.is_file(), "{} has not been built: run scripts/bench", program.display());
        Ok(program)
    }

    /// Runs `oncegate bench`. Any wrong answer ends the measurement.
    pub(crate) fn load(&self, server: &Server, workload: &str, concurrency: u32, more: &[&str]) -> Result<Loaded> {
        let mut command = Command::new(&self.options.oncegate);
        command
            .args(["bench", "--json", "--url", &server.url(), "--workload", workload])
            .args(["--concurrency", &concurrency.to_string()])
            .args(["--duration", &format!("{}ms", self.options.seconds_ms())])
            .args(["--warm-up", &format!("{}ms", self.options.warm_up_ms())])
            .args(more)
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .current_dir(self.directory());
        if workload == "claims" {
            // Some measurements are about open events, and ending them takes time that no measurement is about.
            command.arg("--leave-locked");
        }
        if !more.contains(&"--check-max") {
            // Enough to find losses, and quick.
            command.args(["--check-max", "20000"]);
        }
        let output = run(&mut command)?;
        let report: BenchReport = serde_json::from_str(&output).context("oncegate bench did not write its JSON")?;
        for (code, count) in &report.errors {
            note(&format!("    {count} calls failed: {code}"));
        }
        let name = match workload {
            "cycle" => "cycle",
            "claims" => "check_and_lock",
            "storm" => "storm",
            _ => "duplicate",
        };
        let main = report.operations.into_iter().find(|line| line.operation == name);
        let correctness = report.correctness;
        Ok(Loaded {
            main: main.with_context(|| format!("oncegate bench measured no {name}"))?,
            storms: (correctness.storms, correctness.storms_without_winner + correctness.double_grants),
        })
    }

    /// Completes events `0..keys`, and hardly asks for them again, so that a sidecar holds what it keeps of each and
    /// nothing else.
    pub(crate) fn complete(&self, server: &Server, keys: u64) -> Result<()> {
        let mut command = Command::new(&self.options.oncegate);
        command
            .args(["bench", "--json", "--url", &server.url(), "--workload", "duplicates", "--concurrency", "64"])
            .args(["--duration", "100ms", "--warm-up", "0s", "--check-max", "0", "--keys", &keys.to_string()])
            .current_dir(self.directory());
        run(&mut command).map(drop)
    }

    /// The rate of a load, for comparisons that need only that.
    pub(crate) fn rate(&self, server: &Server, workload: &str, concurrency: u32, more: &[&str]) -> Result<f64> {
        self.load(server, workload, concurrency, more).map(|loaded| loaded.main.per_second)
    }

    /// The rate of duplicates on a server with nothing behind it, which calls every event completed: none is completed first.
    pub(crate) fn bare_rate(&self, server: &Server, concurrency: u32, target: &str) -> Result<f64> {
        self.rate(server, "duplicates", concurrency, &["--target", target, "--run", "bare", "--prepared"])
    }

    /// A webhook load on a gateway.
    pub(crate) fn load_http(&self, server: &Server, workload: &str, concurrency: u32) -> Result<Loaded> {
        self.load(server, workload, concurrency, &["--target", "http"])
    }

    /// Creates the table that pgbench's cycle works on: as plain as the first version's, with its status in no
    /// index.
    pub(crate) fn prepare_pgbench(&self) -> Result<()> {
        self.postgres.create("plain")?;
        self.postgres.sql("plain", include_str!("pgbench/table.sql"))?;
        std::fs::write(self.directory().join("cycle.sql"), include_str!("pgbench/cycle.sql"))?;
        Ok(())
    }

    /// pgbench's plain cycle: rate, and mean latency in milliseconds.
    pub(crate) fn pgbench(&self, clients: u32) -> Result<(f64, f64)> {
        let seconds = self.options.seconds_ms().div_ceil(1_000).max(1);
        let mut command = Command::new(self.postgres.program("pgbench"));
        command
            .args(["-n", "-M", "prepared", "-h", "127.0.0.1", "-U", "postgres"])
            .args(["-p", &self.postgres.port().to_string(), "-c", &clients.to_string()])
            .args(["-j", &clients.min(2).to_string(), "-T", &seconds.to_string(), "-f"])
            .arg(self.directory().join("cycle.sql"))
            .arg("plain");
        let output = run(&mut command)?;
        let number = |start: &str| {
            let line = output.lines().find_map(|line| line.strip_prefix(start));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
                .with_context(|| format!("pgbench did not say {start:?}:\n{output}"))
        };
        Ok((number("tps = ")?, number("latency average = ")?))
    }

    /// redis-benchmark's GET, not pipelined: its rate.
    pub(crate) fn redis_get(&self, clients: u32) -> Result<f64> {
        let requests = (self.options.seconds_ms() * 120).to_string();
        let call = |test: &str, requests: &str| {
            let mut command = Command::new("redis-benchmark");
            command.args(["-h", "127.0.0.1", "-p", &self.redis.address.port().to_string()]).args([
                "-c",
                &clients.to_string(),
                "-d",
                "200",
                "-r",
                "1000",
                "--csv",
                "-t",
                test,
                "-n",
                requests,
            ]);
            run(&mut command)
        };
        call("set", "20000")?;
        let output = call("get", &requests)?;
        let rate = output.lines().find_map(|line| {
            let mut fields = line.split(',').map(|field| field.trim_matches('"'));
            (fields.next() == Some("GET")).then(|| fields.next()?.parse::<f64>().ok()).flatten()
        });
        rate.with_context(|| format!("redis-benchmark did not say what GET did:\n{output}"))
    }
}
