//! Limits log lines that a stranger or an outage would repeat thousands of times a second.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

/// Lets a few per second pass, and counts the others.
#[derive(Debug)]
pub struct Throttle {
    per_second: u32,
    /// Seconds are counted from here, so the count never goes back.
    made: Instant,
    /// The second in which the last one passed, starting at one, and in the lower half how many did. A single number, so
    /// that concurrent callers cannot begin the same second twice.
    passed: AtomicU64,
    held_back: AtomicU64,
}

impl Throttle {
    /// Lets this many per second pass.
    #[must_use]
    pub fn per_second(count: u32) -> Self {
        Self { per_second: count, made: Instant::now(), passed: AtomicU64::new(0), held_back: AtomicU64::new(0) }
    }

    /// How many were held back since the last one that passed, if this one may.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(self.made.elapsed().as_secs() + 1)
    }

    pub(crate) fn pass_at(&self, now: u64) -> Option<u64> {
        let counted = self.passed.fetch_update(Relaxed, Relaxed, |passed| {
            let (second, count) = (passed >> 32, passed & u64::from(u32::MAX));
            // A caller that read the clock before another one is too late to begin a second of its own.
            if now > second { Some(now << 32 | 1) } else { (count < u64::from(self.per_second)).then(|| passed + 1) }
        });
        if counted.is_ok() {
            Some(self.held_back.swap(0, Relaxed))
        } else {
            self.held_back.fetch_add(1, Relaxed);
            None
        }
    }
}

/// One per second.
impl Default for Throttle {
    fn default() -> Self {
        Self::per_second(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_passes_and_says_how_many_did_not() {
        let throttle = Throttle::default();
        let passed: Vec<_> = [7, 7, 7, 8, 8, 9].map(|now| throttle.pass_at(now)).to_vec();
        assert_eq!(passed, [Some(0), None, None, Some(2), None, Some(1)]);
    }

    #[test]
    fn strangers_cannot_fill_the_log_and_are_counted() {
        let throttle = Throttle::per_second(100);
        assert_eq!((0..1_000).filter(|_| throttle.pass_at(7).is_some()).count(), 100);
        assert_eq!([throttle.pass_at(8), throttle.pass_at(8)], [Some(900), Some(0)]);
    }

    #[test]
    fn one_that_read_the_clock_before_another_does_not_begin_its_second_anew() {
        let throttle = Throttle::default();
        let passed: Vec<_> = [7, 8, 7, 8, 7, 9].map(|now| throttle.pass_at(now)).to_vec();
        assert_eq!(passed, [Some(0), Some(0), None, None, None, Some(3)]);
    }

    #[test]
    fn of_many_threads_at_once_as_many_pass_as_of_one() {
        let throttle = Throttle::per_second(10);
        let passed = std::thread::scope(|scope| {
            let tasks: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..1_000).filter(|call| throttle.pass_at(1 + call / 500).is_some()).count()))
                .collect();
            tasks.into_iter().map(|task| task.join().unwrap()).sum::<usize>()
        });
        assert_eq!(passed, 20);
    }
}
