//! A Redis server for the tests.
//!
//! [`Redis::shared`] is one of the test process's own, or the one that `TEST_REDIS_URL` names: tests are kept apart by
//! their keys. A test that stops, freezes or fills its server starts one with [`Redis::start`].

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::OnceCell,
    time::{Instant, timeout},
};

use crate::{
    certificates::{Authority, Files, Issued},
    eventually::{DEADLINE, within},
    postgres::free_port,
    supervised::{Directory, Supervised},
};

/// The variable that names a server to use instead of starting one.
const GIVEN_SERVER: &str = "TEST_REDIS_URL";

const HOW_TO_INSTALL: &str = "redis-server was not found in PATH. Install it (Debian: apt-get install redis-server; Fedora: \
     dnf install redis; macOS: brew install redis), or name a server in TEST_REDIS_URL, or run scripts/test, which \
     installs it";

/// A second port that uses TLS and asks for a client's certificate.
#[derive(Debug)]
struct Tls {
    port: u16,
    files: Files,
    ca: PathBuf,
}

/// A Redis server of its own, which keeps nothing on disk.
#[derive(Debug)]
pub struct Redis {
    program: PathBuf,
    port: u16,
    tls: Option<Box<Tls>>,
    cluster: bool,
    server: Option<Supervised>,
    // Last, so that it is removed after the server has ended.
    directory: Directory,
}

impl Redis {
    /// How to reach the server that all tests of this process share.
    pub async fn shared() -> Result<String> {
        static SHARED: OnceCell<Redis> = OnceCell::const_new();
        match env::var(GIVEN_SERVER) {
            Ok(url) if !url.is_empty() => Ok(url),
            _ => Ok(SHARED.get_or_try_init(Self::start).await?.url()),
        }
    }

    /// Starts a server on a free port.
    pub async fn start() -> Result<Self> {
        let program = find_program()?;
        let directory = Directory::new("oncegate-redis-")?;
        let mut redis = Self { program, port: 0, tls: None, cluster: false, server: None, directory };
        redis.restart().await?;
        Ok(redis)
    }

    /// The same, with TLS on another port; for clients with a certificate of `authority`.
    pub async fn start_with_tls(server: &Issued, authority: &Authority) -> Result<Self> {
        let mut redis = Self::start().await?;
        redis.kill()?;
        let directory = redis.directory.path();
        let (files, ca) = (server.write(directory, "server")?, directory.join("ca.pem"));
        fs::write(&ca, authority.pem())?;
        redis.tls = Some(Box::new(Tls { port: free_port()?, files, ca }));
        redis.restart().await?;
        Ok(redis)
    }

    /// Starts the server again after [`stop`](Self::stop) or [`kill`](Self::kill), on the same port, empty.
    pub async fn restart(&mut self) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        let fixed_port = self.port != 0;
        loop {
            if !fixed_port {
                self.port = free_port()?;
            }
            match self.try_start().await {
                Ok(()) => return Ok(()),
                // Another process may have taken the port.
                Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// The same, as a Cluster of one node that has all slots.
    pub async fn restart_as_cluster(&mut self) -> Result<()> {
        self.cluster = true;
        self.restart().await?;
        ensure!(self.command("CLUSTER ADDSLOTSRANGE 0 16383").await? == "+OK", "no CLUSTER ADDSLOTSRANGE");
        let served = within(DEADLINE, async || (self.command("GET nothing").await.ok()? == "$-1").then_some(())).await;
        served.context("the cluster does not serve its slots")
    }

    async fn try_start(&mut self) -> Result<()> {
        ensure!(self.server.is_none(), "the server is running");
        let directory = self.directory.path();
        let log = directory.join("log");
        let mut command: Vec<String> = [
            self.program.to_string_lossy().as_ref(),
            "--bind",
            &Ipv4Addr::LOCALHOST.to_string(),
            "--port",
            &self.port.to_string(),
            "--dir",
            &directory.to_string_lossy(),
            "--save",
            "",
            "--appendonly",
            "no",
            "--daemonize",
            "no",
        ]
        .map(str::to_owned)
        .into();
        if let Some(tls) = &self.tls {
            for (name, value) in [
                ("--tls-port", tls.port.to_string()),
                ("--tls-cert-file", tls.files.certificate.to_string_lossy().into_owned()),
                ("--tls-key-file", tls.files.key.to_string_lossy().into_owned()),
                ("--tls-ca-cert-file", tls.ca.to_string_lossy().into_owned()),
                ("--tls-auth-clients", "yes".to_owned()),
            ] {
                command.extend([name.to_owned(), value]);
            }
        }
        if self.cluster {
            // An explicit port for the bus: the default, ten thousand above, may not be a valid port.
            let (bus, host) = (free_port()?.to_string(), Ipv4Addr::LOCALHOST.to_string());
            for (name, value) in
                [("--cluster-enabled", "yes"), ("--cluster-port", &bus), ("--cluster-announce-ip", &host)]
            {
                command.extend([name.to_owned(), value.to_owned()]);
            }
        }
        let mut server = Supervised::start(&command, &self.directory, &log, "KILL", None)?;
        let end = Instant::now() + DEADLINE;
        while !matches!(self.command("PING").await.as_deref(), Ok("+PONG")) {
            if server.has_exited() || Instant::now() >= end {
                bail!("Redis did not start:\n{}", fs::read_to_string(log).unwrap_or_default());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.server = Some(server);
        Ok(())
    }

    /// Sends one command in Redis's inline form and returns the first line of the answer.
    pub async fn command(&self, command: &str) -> Result<String> {
        line_from(self.port, command).await
    }

    /// Stops the server in an orderly way.
    pub fn stop(&mut self) -> Result<()> {
        self.server.take().context("the server is not running")?.stop("TERM")
    }

    /// Kills the server.
    pub fn kill(&mut self) -> Result<()> {
        self.server.take().context("the server is not running")?.stop("KILL")
    }

    /// Makes the server accept connections but stay silent, until [`thaw`](Self::thaw).
    pub fn freeze(&mut self) -> Result<()> {
        self.server.as_mut().context("the server is not running")?.signal("STOP")
    }

    /// Ends what [`freeze`](Self::freeze) began.
    pub fn thaw(&mut self) -> Result<()> {
        self.server.as_mut().context("the server is not running")?.signal("CONT")
    }

    /// A replica with the current content and no later changes: it no longer follows anybody.
    pub async fn detached_replica(&self) -> Result<Self> {
        let replica = Self::start().await?;
        // By default it waits for further replicas first.
        ensure!(self.command("CONFIG SET repl-diskless-sync-delay 0").await? == "+OK", "no CONFIG SET");
        let follow = format!("REPLICAOF {} {}", Ipv4Addr::LOCALHOST, self.port);
        ensure!(replica.command(&follow).await? == "+OK", "no REPLICAOF");
        let followed = within(DEADLINE, async || (self.command("WAIT 1 100").await.ok()? == ":1").then_some(())).await;
        followed.context("the replica does not follow")?;
        ensure!(replica.command("REPLICAOF NO ONE").await? == "+OK", "no REPLICAOF NO ONE");
        Ok(replica)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The same for TLS, if enabled.
    pub fn tls_url(&self) -> Option<String> {
        self.tls.as_ref().map(|tls| format!("rediss://{}:{}", Ipv4Addr::LOCALHOST, tls.port))
    }

    /// What to set `REDIS_URL` to.
    pub fn url(&self) -> String {
        format!("redis://{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }
}

/// Sends one command to a server on loopback and returns the first line of the answer.
pub(crate) async fn line_from(port: u16, command: &str) -> Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(format!("{command}\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            answer.push(stream.read_u8().await?);
        }
        anyhow::Ok(String::from_utf8_lossy(&answer).trim_end().to_owned())
    };
    timeout(DEADLINE, exchange).await.context("Redis did not answer")?
}

pub(crate) fn find_program() -> Result<PathBuf> {
    let mut directories: Vec<PathBuf> = env::var_os("PATH").iter().flat_map(env::split_paths).collect();
    directories.extend(["/usr/sbin", "/opt/homebrew/bin", "/usr/local/bin"].map(PathBuf::from));
    for name in ["redis-server", "valkey-server"] {
        let found = directories.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
        if let Some(program) = found
            // Being on the search path does not make it runnable: a broken one should be reported as such, not as a
            // server that hangs.
            && Command::new(&program).arg("--version").output().is_ok_and(|output| output.status.success())
        {
            return Ok(program);
        }
    }
    bail!(HOW_TO_INSTALL)
}
