//! How many threads serve requests.

use std::{io, num::NonZero};

use tokio::runtime::{Builder, Runtime};

/// Threads that serve.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ThreadOptions {
    /// Threads that serve requests
    ///
    /// One does the most where the database shares the machine, or has few cores: it does not wake others, and its
    /// calls reach the ledger in larger batches. Raise it, to the number of free cores at most, when one core is busy and
    /// others are not.
    #[arg(
        long,
        env = "ONCEGATE_THREADS",
        value_name = "COUNT",
        default_value = "1",
        value_parser = clap::value_parser!(u16).range(1..=256)
    )]
    threads: u16,
}

impl ThreadOptions {
    /// As configured.
    pub(crate) fn count(&self) -> NonZero<u16> {
        NonZero::new(self.threads).unwrap_or(NonZero::<u16>::MIN)
    }
}

/// A runtime of so many threads. With one, everything but what blocks (files, the embedded store's writer and readers)
/// runs on the calling thread: no work is handed from core to core.
pub(crate) fn runtime(threads: NonZero<u16>) -> io::Result<Runtime> {
    let mut builder = match threads.get() {
        1 => Builder::new_current_thread(),
        many => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(usize::from(many));
            builder
        }
    };
    builder.enable_all().build()
}
