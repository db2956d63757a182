//! The built `oncegate`, run as a user runs it: arguments, environment, signals, exit codes, output.

use std::{
    env, fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

use crate::{eventually::DEADLINE, secrets::Secrets, supervised::send_signal};

/// How long a command that should end by itself may take.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// If set to anything, every program of the tests logs everything, for every library.
const TRACE: &str = "ONCEGATE_TEST_TRACE";

/// Everything; libraries are quiet unless they are named.
pub const LOG_EVERYTHING: &str = "trace,h2=trace,hyper=trace,hyper_util=trace,rustls=trace,sqlx=trace,tonic=trace,\
                                  tower=trace,fred=trace";

/// A command that has not been started yet. Its output is always searched for the secrets that it was given.
#[derive(Debug)]
pub struct Oncegate {
    command: Command,
    secrets: Secrets,
}

impl Oncegate {
    /// `oncegate` with arguments, in a directory, with none of the settings that the tests themselves run under.
    pub fn new<'a>(directory: &Path, arguments: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut command = Command::new(find_program()?);
        command
            .args(arguments)
            .current_dir(directory)
            .env_clear()
            .env("ONCEGATE_LOG_FORMAT", "json")
            // Dozens of them share the machine with their databases, and polling would take time from those.
            .env("ONCEGATE_IDLE_POLL", "0s")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        for name in ["PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "LLVM_PROFILE_FILE", "RUST_BACKTRACE"] {
            if let Some(value) = env::var_os(name) {
                command.env(name, value);
            }
        }
        if env::var_os(TRACE).is_some() {
            command.env("ONCEGATE_LOG", LOG_EVERYTHING);
        }
        Ok(Self { command, secrets: Secrets::default() })
    }

    /// With a setting.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<str>) -> Self {
        // If everything is to be logged, it is, whatever a test sets.
        if name == "ONCEGATE_LOG" && env::var_os(TRACE).is_some() {
            return self;
        }
        self.command.env(name, value.as_ref());
        self.secrets.add_setting(name, value.as_ref());
        self
    }

    /// With a secret that it gets in another way, from a file or the database.
    #[must_use]
    pub fn secret(mut self, secret: &str) -> Self {
        self.secrets.add(secret);
        self
    }

    /// Runs under strace, which logs what the process does with files into `log`: every write with all its bytes. The
    /// process stays a direct child, so that signals reach it and not the tracer.
    #[must_use]
    pub fn traced(self, log: &Path) -> Self {
        let inner = self.command.as_std();
        let mut command = Command::new("strace");
        command
            .args(["-D", "-f", "-ttt", "-y", "-xx", "-s", "10000000"])
            .args(["-e", "trace=pwrite64,write,fdatasync,fsync,ftruncate,unlink,unlinkat", "-e", "signal=none", "-o"])
            .arg(log)
            .arg(inner.get_program())
            .args(inner.get_args())
            .env_clear()
            .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some(directory) = inner.get_current_dir() {
            command.current_dir(directory);
        }
        Self { command, secrets: self.secrets }
    }

    /// Starts it.
    pub fn start(mut self) -> Result<Running> {
        let directory = self.command.as_std().get_current_dir().unwrap_or(Path::new(".")).to_owned();
        self.secrets.read_files(&directory);
        let mut child = self.command.spawn().context("cannot start oncegate")?;
        let stdout = child.stdout.take().context("standard output was not piped")?;
        let stderr = child.stderr.take().context("standard error was not piped")?;
        let output = Arc::new(Output::default());
        let readers = [
            tokio::spawn(read(stdout, Arc::clone(&output), Stream::Out)),
            tokio::spawn(read(stderr, Arc::clone(&output), Stream::Err)),
        ];
        Ok(Running { child, output, readers, secrets: self.secrets, directory })
    }

    /// Runs it to its end, which may take this many seconds.
    pub async fn run_for(self, seconds: u64) -> Result<Finished> {
        self.start()?.finish(Duration::from_secs(seconds)).await
    }

    /// Runs it to its end.
    pub async fn run(self) -> Result<Finished> {
        let mut running = self.start()?;
        running.finish(RUN_DEADLINE).await
    }
}

/// What a command wrote, and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote for its user.
    pub stdout: String,
    /// What it logged.
    pub stderr: String,
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "exit code {:?}\n--- standard output\n{}\n--- standard error\n{}",
            self.code, self.stdout, self.stderr
        )
    }
}

/// A running `oncegate`, killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    output: Arc<Output>,
    readers: [JoinHandle<()>; 2],
    secrets: Secrets,
    directory: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        // No output may contain a secret, whatever the test is about; files may have got new ones meanwhile.
        self.secrets.read_files(&self.directory);
        let told = self.secrets.told_in(&self.output.to_string());
        if let Some(told) = told.filter(|_| !std::thread::panicking()) {
            panic!("oncegate has told a secret: {told}");
        }
    }
}

impl Running {
    /// The address that a part of it logged when it listened: `sidecar`, `gateway`, `admin` or `application`.
    pub async fn address(&mut self, part: &str) -> Result<SocketAddr> {
        let message = format!("{part} listening");
        let line = self.line_where(&format!("{part} logs its address"), |line| line.contains(&message)).await?;
        let line: serde_json::Value = serde_json::from_str(&line).context("the log is not JSON")?;
        let address = line["address"].as_str().context("the log line names no address")?;
        address.parse().with_context(|| format!("{address} is no address"))
    }

    /// Waits for a line of output, on either stream, and returns it.
    pub async fn line_where(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let mut changes = self.output.lines.subscribe();
        let output = Arc::clone(&self.output);
        let wait = async {
            loop {
                if let Some(line) = output.find(&wanted) {
                    return Ok(line);
                }
                tokio::select! {
                    changed = changes.changed() => changed.context("the output has ended")?,
                    status = self.child.wait() => {
                        // Its last lines may still be on their way.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        if let Some(line) = output.find(&wanted) {
                            return Ok(line);
                        }
                        bail!("oncegate ended first: {}", status?);
                    }
                }
            }
        };
        match timeout(DEADLINE, wait).await {
            Ok(line) => line.with_context(|| format!("before {what}\n{}", self.output)),
            Err(_) => bail!("not within {DEADLINE:?}: {what}\n{}", self.output),
        }
    }

    /// What it has written so far, for a failure's message.
    pub fn output(&self) -> String {
        self.output.to_string()
    }

    /// Its process.
    pub fn pid(&self) -> Result<u32> {
        self.child.id().context("oncegate has already ended")
    }

    /// Sends it a signal, by its name without SIG.
    pub fn signal(&self, signal: &str) -> Result<()> {
        send_signal(self.pid()?, signal)
    }

    /// Suspends it, as a paused machine or a very long garbage collection does, until [`thaw`](Self::thaw).
    pub fn freeze(&self) -> Result<()> {
        self.signal("STOP")
    }

    /// Ends what [`freeze`](Self::freeze) began.
    pub fn thaw(&self) -> Result<()> {
        self.signal("CONT")
    }

    /// Asks it to end, as Kubernetes does, and waits until it has.
    pub async fn stop(&mut self) -> Result<Finished> {
        self.signal("TERM")?;
        self.finish(DEADLINE).await
    }

    /// Kills it, as a crash does.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.context("cannot kill oncegate")
    }

    /// Waits for its end.
    pub async fn finish(&mut self, deadline: Duration) -> Result<Finished> {
        let Ok(status) = timeout(deadline, self.child.wait()).await else {
            bail!("oncegate did not end within {deadline:?}\n{}", self.output);
        };
        let status: ExitStatus = status.context("cannot wait for oncegate")?;
        for reader in &mut self.readers {
            // Ends with the pipes, which are closed now.
            let _ = reader.await;
        }
        let lines = self.output.lines.borrow();
        Ok(Finished { code: status.code(), stdout: joined(&lines, Stream::Out), stderr: joined(&lines, Stream::Err) })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

#[derive(Debug)]
struct Output {
    lines: watch::Sender<Vec<(Stream, String)>>,
}

impl Default for Output {
    fn default() -> Self {
        Self { lines: watch::Sender::new(Vec::new()) }
    }
}

impl Output {
    fn find(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        self.lines.borrow().iter().map(|(_, line)| line).find(|line| wanted(line)).cloned()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines.borrow();
        write!(
            f,
            "--- standard output\n{}\n--- standard error\n{}",
            joined(&lines, Stream::Out),
            joined(&lines, Stream::Err)
        )
    }
}

fn joined(lines: &[(Stream, String)], wanted: Stream) -> String {
    let mut text = String::new();
    for (_, line) in lines.iter().filter(|(stream, _)| *stream == wanted) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

async fn read(stream: impl AsyncRead + Unpin, output: Arc<Output>, which: Stream) {
    let mut lines = BufReader::new(stream).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        output.lines.send_modify(|lines| lines.push((which, line)));
    }
}

/// The program next to the tests: `target/<profile>/oncegate`, where the tests are in `target/<profile>/deps`.
///
/// # Errors
///
/// It was not built, or not since its sources changed.
pub fn find_program() -> Result<PathBuf> {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    PROGRAM.get_or_init(|| locate_program().map_err(|error| format!("{error:#}"))).clone().map_err(anyhow::Error::msg)
}

fn locate_program() -> Result<PathBuf> {
    let test = env::current_exe().context("cannot find the test's own program")?;
    let directory = test
        .ancestors()
        .skip(1)
        .find(|directory| !directory.ends_with("deps"))
        .context("the test's program is in no directory")?;
    let program = directory.join(format!("oncegate{}", env::consts::EXE_SUFFIX));
    if !program.is_file() {
        bail!(
            "{} has not been built: run `cargo build --workspace` first, or scripts/test, which does",
            program.display()
        );
    }
    // `cargo test` builds the tests of this package but not the binary of another, so the binary might be out of
    // date. Cargo leaves the list of a program's source files beside it.
    let built = fs::metadata(&program)?.modified()?;
    for source in sources_of(&program) {
        if fs::metadata(&source).and_then(|source| source.modified()).is_ok_and(|changed| changed > built) {
            bail!(
                "{} is older than {}: run `cargo build --workspace` first, or scripts/test, which does",
                program.display(),
                source.display()
            );
        }
    }
    Ok(program)
}

fn sources_of(program: &Path) -> Vec<PathBuf> {
    let list = fs::read_to_string(program.with_extension("d")).unwrap_or_default();
    list.split_whitespace().skip(1).map(PathBuf::from).collect()
}

/// The source files of the program.
pub fn sources() -> Result<Vec<PathBuf>> {
    Ok(sources_of(&find_program()?))
}
