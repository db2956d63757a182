//! What is counted while the load runs.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hdrhistogram::Histogram;

/// Latencies are kept in nanoseconds, to three digits, from a tenth of a microsecond up to this; longer ones count as this.
const LATENCY_MAX: Duration = Duration::from_secs(120);

/// The operation that a latency belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    /// A new event from start to finish: both calls, or the one webhook.
    Cycle,
    /// CheckAndLock of a new event.
    CheckAndLock,
    /// MarkCompleted.
    MarkCompleted,
    /// A duplicate of a completed event.
    Duplicate,
    /// One of the callers of a storm.
    Storm,
}

impl Operation {
    /// Its name in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cycle => "cycle",
            Self::CheckAndLock => "check_and_lock",
            Self::MarkCompleted => "mark_completed",
            Self::Duplicate => "duplicate",
            Self::Storm => "storm",
        }
    }
}

/// What must hold, counted over the whole run, the warm-up included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Correctness {
    /// Completions that were acknowledged: those that were checked, unchecked, and left out.
    pub(super) acknowledged: u64,
    /// Of those, how many were asked for again at the end.
    pub(super) checked: u64,
    /// Of those that should have been asked for again, how many could not be: nobody answered.
    pub(super) unchecked: u64,
    /// How many were not to be asked for again, since their callers had more than their shares of `--check-max`: what was is a
    /// random sample of each caller's.
    pub(super) left_out: u64,
    /// Of those asked for again, how many were not found completed.
    pub(super) lost: u64,
    /// Grants of an event that was granted to somebody else, or completed.
    pub(super) double_grants: u64,
    /// Events that were said to be completed by an earlier run, and were not: nothing is wrong with the answers, but they
    /// are not those that the run is about.
    pub(super) unprepared: u64,
    /// Answers that the event's past rules out, such as a new event reported as completed.
    pub(super) unexpected: u64,
    /// Storms that were run.
    pub(super) storms: u64,
    /// Storms that nobody won, although every caller got an answer.
    pub(super) storms_without_winner: u64,
}

impl Correctness {
    /// Whether nothing was wrong, and everything that was to be checked could be.
    pub(super) fn holds(&self) -> bool {
        !self.is_wrong() && self.unprepared == 0 && self.unchecked == 0
    }

    /// Whether something was answered wrongly.
    pub(super) fn is_wrong(&self) -> bool {
        let wrong = [self.lost, self.double_grants, self.unexpected, self.storms_without_winner];
        wrong.iter().any(|count| *count > 0)
    }

    fn add(&mut self, other: &Self) {
        self.acknowledged += other.acknowledged;
        self.checked += other.checked;
        self.unchecked += other.unchecked;
        self.left_out += other.left_out;
        self.lost += other.lost;
        self.double_grants += other.double_grants;
        self.unprepared += other.unprepared;
        self.unexpected += other.unexpected;
        self.storms += other.storms;
        self.storms_without_winner += other.storms_without_winner;
    }
}

/// The counts of one thread, or of all.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// By operation, within the measured time.
    pub(super) latencies: BTreeMap<Operation, Histogram<u64>>,
    /// Failed calls by their code, over the whole run.
    pub(super) errors: BTreeMap<String, u64>,
    /// Over the whole run.
    pub(super) correctness: Correctness,
}

impl Tally {
    /// Counts one operation.
    pub(super) fn record(&mut self, operation: Operation, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latencies.entry(operation).or_insert_with(histogram).saturating_record(nanos);
    }

    /// Counts one failed call.
    pub(super) fn error(&mut self, code: &str) {
        match self.errors.get_mut(code) {
            Some(count) => *count += 1,
            None => {
                self.errors.insert(code.to_owned(), 1);
            }
        }
    }

    /// Adds another thread's.
    pub(super) fn add(&mut self, other: Self) {
        for (operation, latencies) in other.latencies {
            let all = self.latencies.entry(operation).or_insert_with(histogram);
            all.add(latencies).expect("both were made with the same bounds");
        }
        for (code, count) in other.errors {
            *self.errors.entry(code).or_default() += count;
        }
        self.correctness.add(&other.correctness);
    }
}

fn histogram() -> Histogram<u64> {
    let max = u64::try_from(LATENCY_MAX.as_nanos()).expect("two minutes are few nanoseconds");
    Histogram::new_with_bounds(100, max, 3).expect("the bounds are sound")
}

/// A tally that the callers of one thread share.
#[derive(Debug, Default)]
pub(super) struct SharedTally(Mutex<Tally>);

impl SharedTally {
    pub(super) fn lock(&self) -> MutexGuard<'_, Tally> {
        // Counts stay valid, whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_of_threads_add_up() {
        let mut all = Tally::default();
        for milliseconds in [1, 3] {
            let mut one = Tally::default();
            one.record(Operation::Cycle, Duration::from_millis(milliseconds));
            one.error("Unavailable OVERLOADED");
            one.correctness.double_grants += 1;
            one.correctness.left_out += milliseconds;
            all.add(one);
        }
        let cycles = &all.latencies[&Operation::Cycle];
        assert_eq!(cycles.len(), 2);
        assert!((cycles.max() as f64 / 3e6 - 1.0).abs() < 0.001);
        assert_eq!(all.errors["Unavailable OVERLOADED"], 2);
        assert_eq!((all.correctness.double_grants, all.correctness.left_out), (2, 4));
        assert!(!all.correctness.holds() && Correctness::default().holds());
        // Completions that could not be checked do not count as found.
        assert!(!Correctness { acknowledged: 9, unchecked: 1, ..Correctness::default() }.holds());
        // Those that were left out on purpose do.
        assert!(Correctness { acknowledged: 9, checked: 8, left_out: 1, ..Correctness::default() }.holds());
        // Nor is what a run presupposes and does not find an error of the service.
        let unprepared = Correctness { unprepared: 1, ..Correctness::default() };
        assert!(!unprepared.holds() && !unprepared.is_wrong());
    }

    #[test]
    fn what_takes_for_ever_is_counted_as_the_longest() {
        let mut tally = Tally::default();
        tally.record(Operation::Storm, Duration::MAX);
        assert!(tally.latencies[&Operation::Storm].max() >= 120_000_000_000);
    }
}
