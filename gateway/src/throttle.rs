//! Log lines that a stranger or an outage would repeat thousands of times a second.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};

/// Lets one a second pass and counts the others.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    second: AtomicU64,
    held_back: AtomicU64,
}

impl Throttle {
    /// How many were held back since the last one that passed, if this one may.
    pub(crate) fn pass(&self) -> Option<u64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.pass_at(now)
    }

    fn pass_at(&self, now: u64) -> Option<u64> {
        let last = self.second.load(Relaxed);
        if now != last && self.second.compare_exchange(last, now, Relaxed, Relaxed).is_ok() {
            Some(self.held_back.swap(0, Relaxed))
        } else {
            self.held_back.fetch_add(1, Relaxed);
            None
        }
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
}
