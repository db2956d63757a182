//! How many threads serve requests, and when these sleep.

use std::{io, num::NonZero, thread, time::Duration};

use oncegate_runtime::{
    config::{self, ShownDuration},
    idle,
};
use tokio::runtime::{Builder, Runtime};

/// A thread never polls for work longer than this: beyond it, late wake-ups are no longer the issue.
const IDLE_POLL_MAX: Duration = Duration::from_millis(10);

/// Threads that serve.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ThreadOptions {
    /// Threads that serve requests
    ///
    /// One does the most where the database shares the machine, or has few cores: it does not wake others, and its
    /// calls reach the ledger in larger batches. Raise it, to the number of free cores at most, when one core is busy with work
    /// (process_cpu_seconds_total less oncegate_idle_poll_seconds_total) and others are not.
    #[arg(
        long,
        env = "ONCEGATE_THREADS",
        value_name = "COUNT",
        default_value = "1",
        value_parser = clap::value_parser!(u16).range(1..=256)
    )]
    threads: u16,

    /// How long the thread looks for work, at most, before it sleeps; 0s: not at all
    ///
    /// To be woken takes a thread longer than most calls do. It looks only as long as that has paid lately, and gives way to
    /// others on its core; the time counts as processor time all the same (oncegate_idle_poll_seconds_total says how much
    /// of it). Of several threads none does so, nor where the process has fewer than two processors, by the machine or by a
    /// limit of its container. At most 10ms.
    #[arg(long, env = "ONCEGATE_IDLE_POLL", value_name = "DURATION", default_value = "1ms", value_parser = idle_poll)]
    idle_poll: Duration,
}

impl ThreadOptions {
    /// As configured.
    pub(crate) fn threads(&self) -> Threads {
        Threads { count: NonZero::new(self.threads).unwrap_or(NonZero::<u16>::MIN), idle_poll: self.idle_poll }
    }
}

fn idle_poll(text: &str) -> Result<Duration, String> {
    let longest = config::duration(text).map_err(|error| error.to_string())?;
    if longest > IDLE_POLL_MAX {
        return Err(format!("at most {}", ShownDuration(IDLE_POLL_MAX)));
    }
    Ok(longest)
}

/// The threads that a process has for its work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Threads {
    count: NonZero<u16>,
    idle_poll: Duration,
}

impl Threads {
    /// What a command that does not serve needs.
    pub(crate) const ONE: Self = Self { count: NonZero::<u16>::MIN, idle_poll: Duration::ZERO };
}

/// A runtime with this many threads. With one, everything but what blocks (files, the embedded store's writer and readers) runs
/// on the calling thread: no work is handed from core to core.
pub(crate) fn runtime(threads: Threads) -> io::Result<Runtime> {
    let mut builder = match threads.count.get() {
        1 => {
            let mut builder = Builder::new_current_thread();
            // With only one, somebody else always wants it, or polling uses up its quota.
            if thread::available_parallelism().is_ok_and(|processors| processors.get() > 1) {
                idle::poll_before_sleep(&mut builder, threads.idle_poll);
            }
            builder
        }
        many => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(usize::from(many));
            builder
        }
    };
    builder.enable_all().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_for_work_has_an_end() {
        assert_eq!(idle_poll("0s"), Ok(Duration::ZERO));
        assert_eq!(idle_poll("10ms"), Ok(IDLE_POLL_MAX));
        assert_eq!(idle_poll("11ms"), Err("at most 10ms".to_owned()));
        assert!(idle_poll("1").is_err_and(|error| error.contains("unit")));
    }
}
