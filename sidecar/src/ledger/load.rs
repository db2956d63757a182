//! How long the writer's batches take: what Cleanup goes by to leave the calls their time.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Batches of the writer between two looks: alone, and beside a step of Cleanup. Those of other processes are not seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Window {
    /// Mean time of a call in a batch that ran while no Cleanup step was under way.
    pub quiet: Option<Duration>,
    /// Mean time of a call in a batch, whatever ran beside it.
    pub all: Option<Duration>,
    /// A batch is under way: that none has ended does not mean that nobody calls.
    pub is_busy: bool,
    /// Other processes work on the same database: that none has been seen does not mean that nobody calls.
    pub is_shared: bool,
    /// Steps and batches take turns: while a step is under way no call gets on.
    pub takes_turns: bool,
}

/// What one Cleanup has seen so far. Each has its own: two at once do not take each other's view.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    all: Sum,
    quiet: Sum,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    nanos: u128,
    calls: u64,
}

impl Sum {
    fn add(&mut self, time: Duration, calls: u64) {
        self.nanos += time.as_nanos() * u128::from(calls);
        self.calls += calls;
    }

    /// The mean of what came since.
    fn mean_since(self, before: Sum) -> Option<Duration> {
        let nanos = (self.nanos - before.nanos).checked_div(u128::from(self.calls - before.calls))?;
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

/// Measures batches. Shared by the writer, which reports, and Cleanups, which look.
#[derive(Debug, Default)]
pub struct Load {
    sums: Mutex<Seen>,
    steps: AtomicUsize,
    /// Batches under way.
    batches: AtomicUsize,
    /// There are other processes on the same database.
    shared: AtomicBool,
    takes_turns: bool,
}

/// A batch that is under way, until it is dropped: it counts even if what it does panics.
#[derive(Debug)]
#[must_use = "the batch ends when this is dropped"]
pub struct Batch<'l> {
    load: &'l Load,
    begun: Instant,
    calls: u64,
    /// No Cleanup step was under way when it began.
    quiet: bool,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let load = self.load;
        load.batches.fetch_sub(1, Ordering::Relaxed);
        let time = self.begun.elapsed();
        let quiet = self.quiet && load.steps.load(Ordering::Relaxed) == 0;
        // Numbers are added under it; nothing there can panic half-way.
        let mut sums = load.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.all.add(time, self.calls);
        if quiet {
            sums.quiet.add(time, self.calls);
        }
    }
}

/// A Cleanup step that is under way, until it is dropped.
#[derive(Debug)]
pub struct Step<'l>(&'l Load);

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.steps.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Load {
    /// Of a writer that also does the steps of Cleanup.
    pub fn taking_turns() -> Load {
        Load { takes_turns: true, ..Load::default() }
    }

    /// A batch of so many calls begins.
    pub fn batch(&self, calls: usize) -> Batch<'_> {
        self.batches.fetch_add(1, Ordering::Relaxed);
        let calls = u64::try_from(calls).unwrap_or(u64::MAX);
        Batch { load: self, begun: Instant::now(), calls, quiet: self.steps.load(Ordering::Relaxed) == 0 }
    }

    /// A Cleanup step begins.
    pub fn step(&self) -> Step<'_> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        Step(self)
    }

    /// Says whether other processes work on the same database.
    pub fn share(&self, shared: bool) {
        self.shared.store(shared, Ordering::Relaxed);
    }

    /// What has run since the last look. Remembers this one.
    pub fn look(&self, seen: &mut Seen) -> Window {
        let now = *self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(seen, now);
        Window {
            quiet: now.quiet.mean_since(before.quiet),
            all: now.all.mean_since(before.all),
            is_busy: self.batches.load(Ordering::Relaxed) > 0,
            is_shared: self.shared.load(Ordering::Relaxed),
            takes_turns: self.takes_turns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_beside_a_step_are_not_quiet_and_each_looks_for_itself() {
        let load = Load::default();
        let (mut one, mut other) = (Seen::default(), Seen::default());
        assert_eq!(load.look(&mut one), Window::default());
        drop(load.batch(3));
        let window = load.look(&mut one);
        assert!(window.quiet.is_some() && window.quiet == window.all, "{window:?}");
        let step = load.step();
        drop(load.batch(1));
        let window = load.look(&mut one);
        assert!(window.quiet.is_none() && window.all.is_some(), "{window:?}");
        // Begun before the step or after it: it was beside it for a while.
        let batch = load.batch(1);
        drop(step);
        drop(batch);
        let batch = load.batch(1);
        let step = load.step();
        drop(batch);
        assert_eq!(load.look(&mut one).quiet, None);
        drop(step);
        assert_eq!(load.look(&mut one), Window::default());
        assert!(load.look(&mut other).all.is_some(), "the other has not looked yet");
        // A batch that goes on for longer than the time between two looks.
        let batch = load.batch(1);
        assert_eq!(load.look(&mut other), Window { is_busy: true, ..Window::default() });
        drop(batch);
        assert!(!load.look(&mut other).is_busy);
    }
}
