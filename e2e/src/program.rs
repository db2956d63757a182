//! The built `oncegate`, run as a user runs it: arguments, environment, signals, exit codes, output.

use std::{
    env, fmt,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    process::{Child, Command},
    sync::watch,
    time::timeout,
};

use crate::{eventually::DEADLINE, secrets::Secrets, supervised::send_signal};

/// How long a command that should end by itself may take.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

const HOW_TO_BUILD: &str = "run `cargo build --workspace` first, or scripts/test, which does";

/// If set to anything, every program of the tests logs everything, for every library.
const TRACE: &str = "ONCEGATE_TEST_TRACE";

/// Everything; libraries are quiet unless they are named.
pub const LOG_EVERYTHING: &str = "trace,h2=trace,hyper=trace,hyper_util=trace,rustls=trace,sqlx=trace,tonic=trace,\
                                  tower=trace,fred=trace";

/// Runs a command with a terminal for its standard error, and writes there what that was sent.
const WITH_TERMINAL: &str = "
import os, pty, subprocess, sys
shown, terminal = pty.openpty()
program = subprocess.Popen(sys.argv[1:], stderr=terminal)
os.close(terminal)
try:
    while data := os.read(shown, 4096):
        sys.stderr.buffer.write(data)
except OSError:
    pass  # Nobody has the terminal open any more.
sys.exit(program.wait())
";

/// A command that has not been started yet. All that it writes until its end is searched for the secrets that it was given,
/// when its [`Running`] is dropped; except in a test that has failed already.
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
        let mut command = Command::new("strace");
        command
            .args(["-D", "-f", "-ttt", "-y", "-xx", "-s", "10000000"])
            .args(["-e", "trace=pwrite64,write,fdatasync,fsync,ftruncate,unlink,unlinkat", "-e", "signal=none", "-o"])
            .arg(log);
        self.run_by(command)
    }

    /// Runs with a terminal of this kind (TERM) for its standard error, which has then what that was sent.
    #[must_use]
    pub fn on_terminal(self, kind: &str) -> Self {
        let mut command = Command::new("python3");
        command.args(["-c", WITH_TERMINAL]);
        self.env("TERM", kind).run_by(command)
    }

    /// Writes its log to a place of the test's own, which nobody searches for secrets.
    #[must_use]
    pub fn log_to(mut self, log: impl Into<Stdio>) -> Self {
        self.command.stderr(log);
        self
    }

    /// Has another program run it, which is told of it by its last arguments.
    fn run_by(self, mut command: Command) -> Self {
        let inner = self.command.as_std();
        command
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
        let stdout = child.stdout.take().context("standard output was not piped")?.into_owned_fd()?;
        let output = Arc::new(Output::default());
        output.read(stdout, Stream::Out)?;
        if let Some(stderr) = child.stderr.take() {
            output.read(stderr.into_owned_fd()?, Stream::Err)?;
        }
        Ok(Running { child, output, secrets: self.secrets, directory })
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
    secrets: Secrets,
    directory: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        // Its last words count as well. It may have ended already.
        let _ = self.child.start_kill();
        assert!(self.output.ends_within(DEADLINE), "{STILL_OPEN}");
        // No output may contain a secret, whatever the test is about; files may have got new ones meanwhile.
        self.secrets.read_files(&self.directory);
        if let Some(told) = self.secrets.told_in(&self.output.to_string()) {
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
                        output.ended().await?;
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

    /// Kills it, as a crash does, and waits until all that it had written is known.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.context("cannot kill oncegate")?;
        self.output.ended().await
    }

    /// Waits for its end.
    pub async fn finish(&mut self, deadline: Duration) -> Result<Finished> {
        let Ok(status) = timeout(deadline, self.child.wait()).await else {
            bail!("oncegate did not end within {deadline:?}\n{}", self.output);
        };
        let status: ExitStatus = status.context("cannot wait for oncegate")?;
        self.output.ended().await?;
        let lines = self.output.lines.borrow();
        Ok(Finished { code: status.code(), stdout: joined(&lines, Stream::Out), stderr: joined(&lines, Stream::Err) })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

const STILL_OPEN: &str = "oncegate has ended, and somebody still holds its output open";

#[derive(Debug, Default)]
struct Output {
    lines: watch::Sender<Vec<(Stream, String)>>,
    /// How many of its streams are still open.
    open: watch::Sender<usize>,
}

impl Output {
    /// Reads a stream to its end: on a thread, so that [`Running`] can wait for that where it is dropped, on whatever runtime.
    fn read(self: &Arc<Self>, stream: OwnedFd, which: Stream) -> Result<()> {
        let output = Arc::clone(self);
        self.open.send_modify(|open| *open += 1);
        let read = move || {
            let mut stream = BufReader::new(File::from(stream));
            let mut line = Vec::new();
            // As bytes: what is no UTF-8 must not end it. It may contain a secret, and so may what follows.
            while stream.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let text = String::from_utf8_lossy(&line);
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text).to_owned();
                output.lines.send_modify(|lines| lines.push((which, text)));
                line.clear();
            }
            output.open.send_modify(|open| *open -= 1);
        };
        thread::Builder::new().name("output".to_owned()).spawn(read).context("cannot start a thread")?;
        Ok(())
    }

    /// Waits until the program has closed its streams, which its end does, and all that it wrote is in `lines`.
    async fn ended(&self) -> Result<()> {
        let mut open = self.open.subscribe();
        let ended = timeout(DEADLINE, open.wait_for(|open| *open == 0)).await;
        ensure!(ended.is_ok(), "{STILL_OPEN}\n{self}");
        Ok(())
    }

    /// The same where nothing can be awaited; `false` if it has not happened within `deadline`.
    fn ends_within(&self, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        while *self.open.borrow() > 0 {
            if Instant::now() >= end {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

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
        bail!("{} has not been built: {HOW_TO_BUILD}", program.display());
    }
    // `cargo test` builds the tests of this package but not the binary of another, so the binary might be out of
    // date. Cargo leaves the list of a program's source files beside it.
    let built = fs::metadata(&program)?.modified()?;
    for source in sources_of(&program)? {
        // One that is gone has changed too.
        let changed = fs::metadata(&source).and_then(|source| source.modified());
        if changed.is_err() || changed.is_ok_and(|changed| changed > built) {
            bail!("{} is older than {}: {HOW_TO_BUILD}", program.display(), source.display());
        }
    }
    Ok(program)
}

/// Cargo's list of a program's source files.
fn sources_of(program: &Path) -> Result<Vec<PathBuf>> {
    let path = program.with_extension("d");
    let list = fs::read_to_string(&path);
    let list = list.with_context(|| format!("cannot tell whether {} is up to date: {HOW_TO_BUILD}", path.display()))?;
    let sources = listed(&list);
    // No program is made of nothing: without this it would be up to date for ever.
    ensure!(!sources.is_empty(), "{} names no source files: {HOW_TO_BUILD}", path.display());
    Ok(sources)
}

/// The files that a list in make's form names after its targets, a line for each target. A space within a name stands after a
/// backslash.
fn listed(list: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in list.lines() {
        let mut words = vec![String::new()];
        let mut letters = line.chars().peekable();
        while let Some(letter) = letters.next() {
            match (letter, words.last_mut()) {
                ('\\', Some(word)) => word.push(letters.next_if_eq(&' ').unwrap_or('\\')),
                (' ', _) => words.push(String::new()),
                (letter, Some(word)) => word.push(letter),
                (_, None) => {}
            }
        }
        files.extend(words.into_iter().skip(1).filter(|word| !word.is_empty()).map(PathBuf::from));
    }
    files
}

/// The source files of the program.
pub fn sources() -> Result<Vec<PathBuf>> {
    sources_of(&find_program()?)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::eventually;

    const SECRET: &str = "whsec_of the last line";

    fn shell(directory: &Path, script: &str) -> Running {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script])
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        Oncegate { command, secrets: Secrets::default() }.secret(SECRET).start().unwrap()
    }

    #[tokio::test]
    async fn a_line_that_is_no_text_is_read_like_any_other_and_so_is_what_follows() {
        let directory = tempfile::tempdir().unwrap();
        let script = r"printf 'one\n\377two\377\nthree\r\nfour'; printf '\376\nsix\n' >&2";
        let finished = shell(directory.path(), script).finish(DEADLINE).await.unwrap();
        assert_eq!(finished.code, Some(0), "{finished}");
        assert_eq!(finished.stdout, "one\n\u{fffd}two\u{fffd}\nthree\nfour\n");
        assert_eq!(finished.stderr, "\u{fffd}\nsix\n");
    }

    #[tokio::test]
    async fn a_secret_after_what_is_no_text_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let mut running = shell(directory.path(), &format!(r"printf '\377\n\377{SECRET}\377\n'"));
        running.finish(DEADLINE).await.unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| drop(running))).is_err());
    }

    /// As much as a pipe takes on every system, so that it is written whether or not anybody reads.
    const MUCH: &str = "i=0; while [ $i -lt 400 ]; do echo \"line $i\"; i=$((i + 1)); done; ";

    #[tokio::test]
    async fn whoever_kills_it_knows_all_that_it_wrote() {
        let directory = tempfile::tempdir().unwrap();
        let mut running = shell(directory.path(), &format!("{MUCH} echo last; : >written; exec sleep 600"));
        let written = directory.path().join("written");
        eventually("it has written everything", async || written.exists().then_some(())).await;
        running.kill().await.unwrap();
        assert!(running.output().contains("line 399\nlast\n"), "{}", running.output());
    }

    #[tokio::test]
    async fn the_last_words_of_one_that_is_dropped_are_searched() {
        let directory = tempfile::tempdir().unwrap();
        let script = format!("{MUCH} echo '{SECRET}' >&2; : >written; exec sleep 600");
        let running = shell(directory.path(), &script);
        // Nothing is awaited, so no task of this runtime could have read it.
        let end = Instant::now() + DEADLINE;
        while !directory.path().join("written").exists() {
            assert!(Instant::now() < end, "it has not written everything");
            thread::sleep(Duration::from_millis(1));
        }
        assert!(catch_unwind(AssertUnwindSafe(|| drop(running))).is_err());
    }

    #[test]
    fn sources_are_listed_as_cargo_writes_them() {
        let list = "/a dir/oncegate: /x/main.rs /with\\ a\\ space/lib.rs /back\\slash.rs\n/other: /y.rs\n";
        let list = list.replacen("a dir", "a\\ dir", 1);
        let files = ["/x/main.rs", "/with a space/lib.rs", "/back\\slash.rs", "/y.rs"].map(PathBuf::from);
        assert_eq!(listed(&list), files);
    }

    #[test]
    fn without_a_list_of_its_sources_no_program_is_up_to_date() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("oncegate");
        let refused = || format!("{:#}", sources_of(&program).unwrap_err());
        assert!(refused().contains(HOW_TO_BUILD), "{}", refused());
        for list in ["", "/target/debug/oncegate:\n"] {
            fs::write(program.with_extension("d"), list).unwrap();
            assert!(refused().contains(HOW_TO_BUILD), "{}", refused());
        }
    }
}
