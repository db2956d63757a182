//! Whether Redis is worth asking before the ledger. A new event is in no cache, and should not wait for one to say so; the
//! duplicates of a crowd should not reach the ledger. Which of the two a call is cannot be known beforehand, but calls come in
//! runs: what the last few were decides.

use std::sync::atomic::{AtomicU32, Ordering};

/// All of the last calls were duplicates that Redis can answer.
const ALL: u32 = 1_024;
/// A look-up takes about a third of what the ledger takes: below this share it costs more than it saves.
const ENOUGH: u32 = ALL / 4;
/// A call's weight among the last ones: one in so many.
const MEMORY: u32 = 16;

/// The share of duplicates among the last calls that the process's own layer could not answer, moving.
pub(super) struct Worth(AtomicU32);

impl Default for Worth {
    fn default() -> Self {
        // A process that has just started has an empty memory, and Redis a full one.
        Worth(AtomicU32::new(ALL))
    }
}

impl Worth {
    /// Whether to ask Redis first.
    pub(super) fn is_enough(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= ENOUGH
    }

    /// A call turned out to be one that Redis could answer, or not.
    pub(super) fn saw(&self, answerable: bool) {
        // Two at once may lose one of them: it is a share, not a count.
        let share = self.0.load(Ordering::Relaxed);
        let added = if answerable { ALL / MEMORY } else { 0 };
        self.0.store(share - share.div_ceil(MEMORY) + added, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_is_left_out_after_a_run_of_new_events_and_asked_again_after_a_few_duplicates() {
        let worth = Worth::default();
        assert!(worth.is_enough());
        let run = |answerable: bool| {
            (1..).find(|_| {
                worth.saw(answerable);
                worth.is_enough() == answerable
            })
        };
        let new_events = run(false).expect("it ends");
        assert!((10..40).contains(&new_events), "{new_events}");
        for _ in 0..1_000 {
            worth.saw(false);
        }
        let duplicates = run(true).expect("it ends");
        assert!((2..10).contains(&duplicates), "{duplicates}");
        for _ in 0..1_000 {
            worth.saw(true);
        }
        assert!(worth.0.load(Ordering::Relaxed) <= ALL);
    }
}
