//! How long to wait before a call to the sidecar is repeated.

use std::time::Duration;

/// Doubling pauses with jitter, so that gateways that lost the sidecar at the same moment do not all come back at the same
/// moment.
pub(super) struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    /// The longest pause between marks, without jitter.
    pub(super) const MARKS_MAX: Duration = Duration::from_secs(30);

    /// For claims, with a provider waiting: 100 ms up to 2 s.
    pub(super) fn claims() -> Self {
        Self { next: Duration::from_millis(100), max: Duration::from_secs(2) }
    }

    /// For marks, which are repeated as long as it takes: 100 ms up to 30 s.
    pub(super) fn marks() -> Self {
        Self { next: Duration::from_millis(100), max: Self::MARKS_MAX }
    }

    /// Half to all of the current pause.
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.next.mul_f64(rand::random_range(0.5..=1.0));
        self.next = (self.next * 2).min(self.max);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_limit_and_vary() {
        let mut backoff = Backoff::claims();
        for full in [100, 200, 400, 800, 1_600, 2_000, 2_000] {
            let pause = backoff.next();
            let full = Duration::from_millis(full);
            assert!(full / 2 <= pause && pause <= full, "{pause:?} of {full:?}");
        }
    }
}
