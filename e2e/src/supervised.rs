//! A server process, and a directory, that go away with the test process, however that ends.
//!
//! Statics are not dropped when a process exits, and a killed one drops nothing at all. So each is looked after by a
//! small shell that waits for the end of a pipe whose other end only this process holds: when this process is gone, the
//! kernel closes it, and the shell stops the server or removes the directory.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use oncegate_installed::User;

use crate::eventually::DEADLINE;

/// `$1`: the log, `$2`: the signal that stops the server, then the server's command.
const SUPERVISOR: &str = r#"
log=$1 signal=$2
shift 2
exec 3<&0
"$@" </dev/null >>"$log" 2>&1 3<&- &
server=$!
trap '' PIPE
echo "$server"
(
    read -r line <&3
    kill -s "$signal" "$server" 2>/dev/null
) &
watcher=$!
wait "$server"
echo "exited $?"
kill "$watcher"
"#;

/// `$1`: the directory. A server that is shutting down may still create a file in it.
const JANITOR: &str = r#"
read -r line
for try in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf "$1" 2>/dev/null && break
    sleep 1
done
"#;

/// A directory for a server's data.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    janitor: Child,
}

impl Directory {
    /// Makes a directory whose name starts with `prefix`.
    pub fn new(prefix: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix(prefix).tempdir().context("cannot make a directory")?;
        let janitor = shell(JANITOR)
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start /bin/sh")?;
        Ok(Self { path: directory.keep(), janitor })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Closes the pipe, and then waits.
        let _ = self.janitor.wait();
    }
}

fn shell(script: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", script, "oncegate-e2e"])
        .stderr(Stdio::null())
        // A group of its own: Ctrl-C at the terminal is meant for the tests, which still need the server.
        .process_group(0);
    shell
}

/// A running server and the shell that watches over it.
#[derive(Debug)]
pub struct Supervised {
    shell: Child,
    // In a lock only to make a server in a static `Sync`: nobody ever waits for it.
    output: Mutex<Receiver<String>>,
    pid: u32,
    exited: bool,
}

impl Supervised {
    /// Runs `command`, appending its output to `log`. `signal` stops it when the test process is gone.
    pub fn start(
        command: &[String],
        directory: &Directory,
        log: &Path,
        signal: &str,
        user: Option<User>,
    ) -> Result<Self> {
        let mut shell = shell(SUPERVISOR);
        shell
            .args([log.as_os_str(), signal.as_ref()])
            .args(command)
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(user) = user {
            shell.uid(user.uid).gid(user.gid);
        }
        let mut shell = shell.spawn().context("cannot start /bin/sh")?;
        let stdout = shell.stdout.take().context("the shell's output was not piped")?;
        let (sender, output) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let pid = output
            .recv_timeout(DEADLINE)
            .context("the shell did not say which process it started")?
            .parse()
            .context("the shell named no process")?;
        Ok(Self { shell, output: Mutex::new(output), pid, exited: false })
    }

    /// The server's process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the server has ended.
    pub fn has_exited(&mut self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for the server to end; `false` if it has not within `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> bool {
        if !self.exited {
            // A closed channel means that the shell is gone, and the server with it.
            let output = self.output.get_mut().unwrap_or_else(PoisonError::into_inner);
            self.exited = !matches!(output.recv_timeout(deadline), Err(RecvTimeoutError::Timeout));
        }
        self.exited
    }

    /// Sends the server a signal, by its name without SIG.
    pub fn signal(&mut self, signal: &str) -> Result<()> {
        ensure!(!self.has_exited(), "the server has already ended");
        send_signal(self.pid, signal)
    }

    /// Stops the server with a signal and waits for its end.
    pub fn stop(mut self, signal: &str) -> Result<()> {
        if !self.has_exited() {
            send_signal(self.pid, signal)?;
            if !self.wait(DEADLINE) {
                send_signal(self.pid, "KILL")?;
                bail!("the server did not end within {DEADLINE:?} of SIG{signal}");
            }
        }
        Ok(())
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // Closes the pipe, and then waits.
        let _ = self.shell.wait();
    }
}

/// Sends a process a signal, by its name without SIG.
pub fn send_signal(pid: u32, signal: &str) -> Result<()> {
    // The shell's own kill: the program of that name is not on every machine.
    let output = Command::new("/bin/sh")
        .args(["-c", r#"kill -s "$1" "$2""#, "kill", signal, &pid.to_string()])
        .output()
        .context("cannot run /bin/sh")?;
    ensure!(output.status.success(), "kill -s {signal} {pid}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
