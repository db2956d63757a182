//! From a signal to the end of the process: a token that says stop, and a bounded wait for the work under way.

use std::{future::Future, io, thread, time::Duration};

use tokio::{runtime::Builder, task::JoinHandle};
pub use tokio_util::sync::CancellationToken;
use tokio_util::task::{TaskTracker, task_tracker::TrackedFuture};

use crate::logging;

/// The longest that the runtime may take to end, once everything that matters has been waited for.
pub const RUNTIME_END_MAX: Duration = Duration::from_secs(1);
/// How long a process that is to end at once waits for its last line to be read.
const LAST_LINE_MAX: Duration = Duration::from_millis(100);

/// Turns signals into a token. SIGTERM or SIGINT cancels it: stop taking work, finish what is under way. A second
/// signal ends the process at once, with status 143 or 130, for those who do not want to wait.
///
/// Has to be called inside a tokio runtime.
///
/// # Errors
///
/// The signal handlers cannot be installed.
pub fn on_signals() -> io::Result<CancellationToken> {
    on_signals_telling(|_| {})
}

/// The same, and tells with which status a process ends that the first signal has cut short; before the token is cancelled.
///
/// # Errors
///
/// The signal handlers cannot be installed.
pub fn on_signals_telling(tell: impl FnOnce(u8) + Send + 'static) -> io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut signals = Signals::install()?;
    let cancelled = token.clone();
    tokio::spawn(async move {
        let first = signals.next().await;
        tracing::info!(signal = first.name, "shutting down, a second signal ends the process at once");
        tell(first.exit_code);
        cancelled.cancel();
        let second = signals.next().await;
        tracing::warn!(signal = second.name, "second signal, ending at once");
        logging::flush(LAST_LINE_MAX);
        std::process::exit(second.exit_code.into());
    });
    Ok(token)
}

/// Makes SIGTERM and SIGINT end the process at once, with status 143 or 130, where it is the first process of its
/// container: the kernel delivers to that one no signal for which it has no handler. Any other process is ended by the
/// signal itself, which tells a shell what ended it.
///
/// Runs on a thread of its own, since a command may block the one it runs on.
///
/// # Errors
///
/// The signal handlers cannot be installed.
pub fn end_at_once_as_first_process() -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _within = runtime.enter();
        Signals::install()?
    };
    let wait = move || std::process::exit(runtime.block_on(signals.next()).exit_code.into());
    thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}

struct Signal {
    name: &'static str,
    exit_code: u8,
}

const INTERRUPT: Signal = Signal { name: "SIGINT", exit_code: 130 };

struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn install() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPT,
            _ = self.terminate.recv() => Signal { name: "SIGTERM", exit_code: 143 },
        }
    }
}

/// Tasks to wait for at the end, for a bounded time.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    tasks: TaskTracker,
}

impl Drain {
    /// No tasks yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns a task that [`Drain::within`] waits for.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// A future that counts as a task, wherever it runs.
    pub(crate) fn track<F: Future>(&self, future: F) -> TrackedFuture<F> {
        self.tasks.track_future(future)
    }

    /// How many tasks are under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until no task is under way, at most for `limit`, and says how many were left. They are not aborted.
    /// Tasks spawned meanwhile are waited for as well. Dropping the future loses nothing.
    pub async fn within(&self, limit: Duration) -> usize {
        self.tasks.close();
        // A time-out is an answer here: the count says whether anything was left.
        let _ = tokio::time::timeout(limit, self.tasks.wait()).await;
        self.tasks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn drain_waits_for_tasks_and_counts_what_is_left() {
        let drain = Drain::new();
        drain.spawn(tokio::time::sleep(Duration::from_secs(1)));
        drain.spawn(std::future::pending::<()>());
        assert_eq!(drain.under_way(), 2);
        let begun = tokio::time::Instant::now();
        assert_eq!(drain.within(Duration::from_secs(5)).await, 1);
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn drain_ends_early_when_nothing_is_left() {
        let drain = Drain::new();
        drain.spawn(tokio::time::sleep(Duration::from_secs(1)));
        let begun = tokio::time::Instant::now();
        assert_eq!(drain.within(Duration::from_secs(60)).await, 0);
        assert_eq!(begun.elapsed(), Duration::from_secs(1));
    }
}
