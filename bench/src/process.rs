//! Programs that run beside the measurement, and end with it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::signal::unix::{SignalKind, signal};

/// How long a server may take until it accepts connections.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long it may take to end when asked to.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// The servers that run, with the signal that ends each; and whether no more may be started.
#[derive(Debug, Default)]
struct Running {
    servers: BTreeMap<u32, &'static str>,
    is_over: bool,
}

static RUNNING: Mutex<Running> = Mutex::new(Running { servers: BTreeMap::new(), is_over: false });

fn running() -> MutexGuard<'static, Running> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kill(pid: u32, signal: &str) {
    let _ = Command::new("kill").args(["-s", signal, &pid.to_string()]).status();
}

/// Has a signal that would end this process end its servers instead: whatever needs them fails then, and on the way out
/// everything is removed. Otherwise they would go on, and take their part of whatever is measured next.
///
/// # Errors
/// When signals cannot be listened for.
pub(crate) fn end_servers_on_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt, mut hangup) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        note("ended by a signal");
        let mut running = running();
        running.is_over = true;
        for (pid, signal) in &running.servers {
            kill(*pid, signal);
        }
    });
    Ok(())
}

/// A server that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    name: String,
    log: PathBuf,
    /// The signal that ends it.
    signal: &'static str,
    /// Where it listens.
    pub(crate) address: SocketAddr,
}

impl Server {
    /// Starts it and waits until it accepts connections. Its output goes to a file in the directory.
    pub(crate) fn start(
        name: &str,
        mut command: Command,
        address: SocketAddr,
        directory: &Path,
        signal: &'static str,
    ) -> Result<Self> {
        let log = directory.join(format!("{name}-{}.log", address.port()));
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = {
            let mut running = running();
            ensure!(!running.is_over, "{name} is not started: ended by a signal");
            let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
            running.servers.insert(child.id(), signal);
            child
        };
        let mut server = Self { child, name: name.to_owned(), log, signal, address };
        let began = Instant::now();
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{name} ended at once: {status}\n{}", server.log());
            }
            if began.elapsed() > START_DEADLINE {
                bail!("{name} does not listen on {address}\n{}", server.log());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Its address as a URL.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The memory that it has in use, in bytes.
    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS is no number")?;
        Ok(kib * 1024)
    }

    /// The end of its output.
    fn log(&self) -> String {
        let mut text = String::new();
        let read = File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text));
        if read.is_err() {
            return String::new();
        }
        let lines: Vec<&str> = text.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Before it has ended, after which its number may be another process's.
        running().servers.remove(&self.child.id());
        kill(self.child.id(), self.signal);
        let began = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if began.elapsed() > STOP_DEADLINE {
                note(&format!("{} does not end when asked to: it is killed", self.name));
                let _ = self.child.kill();
                let _ = self.child.wait();
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A free address below the ports that the system assigns to clients, so that no client connection can occupy
/// it.
pub(crate) fn free_address() -> Result<SocketAddr> {
    for _ in 0..1_000 {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, rand::random_range(20_000..32_000)));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no port from 20000 to 32000 is free")
}

/// Runs a program to its end and returns what it wrote to standard output.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{command:?} failed: {}\n{stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}

/// Prints something in addition to the result.
pub(crate) fn note(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{text}");
}
