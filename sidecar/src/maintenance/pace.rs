//! How fast a Cleanup may go: at full speed while surely nobody calls, and otherwise so that calls take no more than some percent
//! longer than they do without it.

use std::time::Duration;

use crate::ledger::load::Window;

/// How long calls may take while a Cleanup runs, relative to how long they take between its steps.
const SLOWDOWN_MAX: f64 = 1.06;
/// The longest pause after a step, as a multiple of the step's own time, so that a Cleanup never comes to a halt.
const PAUSE_MAX: f64 = 80.0;
/// The shortest while there are calls: a step has a twentieth of the time at most (T29). The time of a batch does not tell all that a
/// step takes from the calls: it takes a core from whoever works on the machine, and the next commits have to wait until its part
/// of the log is on the disk. On two cores and Postgres, calls lost 18 and 10 % of their rate with 0.25 here, and 12 % with 9.
const PAUSE_MIN: f64 = 19.0;
/// The same where steps and batches take turns: a step takes all of its time from the calls, and then they find its pages where theirs
/// were. Of the embedded store's rate at 16 callers they lost 17 % with 9 and 15 % with this.
const PAUSE_MIN_IN_TURNS: f64 = 24.0;
/// How much of the old baseline a new one keeps.
const MEMORY: f64 = 0.7;

/// Decides the pause after each step of a Cleanup.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// The pause, as a multiple of a step's time; 0: none.
    share: f64,
    /// How long a call takes without Cleanup, in seconds.
    baseline: Option<f64>,
    /// The steps only read, which takes little from others who are merely there: from those whose calls are seen all the same.
    reads_only: bool,
}

impl Pace {
    /// For steps that delete, or only read.
    pub fn new(reads_only: bool) -> Self {
        Self { reads_only, ..Self::default() }
    }

    /// The pause after a step that took this long, given what the writer did in the meantime.
    pub fn after(&mut self, step: Duration, window: Window) -> Duration {
        let pause_min = if window.takes_turns { PAUSE_MIN_IN_TURNS } else { PAUSE_MIN };
        let Some(all) = window.all else {
            if window.is_busy || window.is_shared && !self.reads_only {
                // A batch takes longer than some steps: this is when the database has the least to spare. And what batches
                // other processes have is not known here.
                self.share = self.share.max(pause_min);
                return step.mul_f64(self.share);
            }
            // Nobody calls.
            self.share = 0.0;
            return Duration::ZERO;
        };
        let all = all.as_secs_f64();
        if let Some(quiet) = window.quiet.map(|quiet| quiet.as_secs_f64()) {
            self.baseline = Some(self.baseline.map_or(quiet, |known| MEMORY * known + (1.0 - MEMORY) * quiet));
        }
        self.share = match self.baseline {
            Some(baseline) if all > baseline * SLOWDOWN_MAX => self.share * 1.5,
            Some(_) => self.share * 0.9,
            // Nothing to compare with yet.
            None => pause_min,
        }
        .clamp(pause_min, PAUSE_MAX);
        step.mul_f64(self.share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(10);

    fn window(quiet: Option<u64>, all: Option<u64>) -> Window {
        Window { quiet: quiet.map(Duration::from_micros), all: all.map(Duration::from_micros), ..Window::default() }
    }

    #[test]
    fn a_batch_that_does_not_end_is_no_reason_to_hurry() {
        let mut pace = Pace::default();
        let slow = (0..5).map(|_| pace.after(STEP, window(Some(1_000), Some(1_500)))).last();
        let busy = Window { is_busy: true, ..window(None, None) };
        assert_eq!(Some(pace.after(STEP, busy)), slow);
        assert_eq!(Pace::default().after(STEP, busy), STEP.mul_f64(PAUSE_MIN));
        assert_eq!(pace.after(STEP, window(None, None)), Duration::ZERO);
    }

    #[test]
    fn calls_that_take_turns_with_steps_are_left_more_of_the_time() {
        let mut pace = Pace::default();
        let in_turns = Window { takes_turns: true, ..window(Some(1_000), Some(1_000)) };
        for _ in 0..10 {
            assert_eq!(pace.after(STEP, in_turns), STEP.mul_f64(PAUSE_MIN_IN_TURNS));
        }
        assert_eq!(pace.after(STEP, Window { quiet: None, all: None, ..in_turns }), Duration::ZERO, "nobody calls");
    }

    #[test]
    fn others_whose_calls_are_not_seen_are_left_their_time() {
        let mut pace = Pace::default();
        let shared = Window { is_shared: true, ..window(None, None) };
        for _ in 0..10 {
            assert_eq!(pace.after(STEP, shared), STEP.mul_f64(PAUSE_MIN));
        }
        assert_eq!(pace.after(STEP, window(None, None)), Duration::ZERO, "they have gone");
    }

    #[test]
    fn what_only_reads_waits_for_calls_and_not_for_others_that_are_merely_there() {
        let mut pace = Pace::new(true);
        let shared = Window { is_shared: true, ..window(None, None) };
        assert_eq!(pace.after(STEP, shared), Duration::ZERO);
        for called in [
            Window { is_busy: true, ..shared },
            Window { is_shared: true, ..window(None, Some(1_000)) },
            Window { is_shared: true, ..window(Some(1_000), Some(1_000)) },
        ] {
            assert_eq!(pace.after(STEP, called), STEP.mul_f64(PAUSE_MIN));
        }
    }

    #[test]
    fn nobody_calls_and_it_goes_at_full_speed() {
        let mut pace = Pace::default();
        for _ in 0..10 {
            pace.after(STEP, window(Some(1_000), Some(2_000)));
        }
        assert!(pace.after(STEP, window(Some(1_000), Some(2_000))) > STEP);
        assert_eq!(pace.after(STEP, window(None, None)), Duration::ZERO);
    }

    #[test]
    fn calls_that_become_slow_slow_it_down_and_quick_ones_let_it_go() {
        let mut pace = Pace::default();
        let mut last = Duration::ZERO;
        for _ in 0..5 {
            let pause = pace.after(STEP, window(Some(1_000), Some(1_500)));
            assert!(pause > last, "{pause:?} after {last:?}");
            last = pause;
        }
        for _ in 0..50 {
            let pause = pace.after(STEP, window(Some(1_000), Some(1_010)));
            assert!(pause < last || pause == STEP.mul_f64(PAUSE_MIN), "{pause:?} after {last:?}");
            last = pause;
        }
        assert_eq!(last, STEP.mul_f64(PAUSE_MIN));
    }

    #[test]
    fn it_never_comes_to_rest_and_never_leaves_callers_nothing() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            let pause = pace.after(STEP, window(Some(10), Some(1_000_000)));
            assert!(pause <= STEP.mul_f64(PAUSE_MAX));
        }
        // With nothing to compare with, calls get most of the time.
        assert_eq!(Pace::default().after(STEP, window(None, Some(1_000))), STEP.mul_f64(PAUSE_MIN));
    }

    #[test]
    fn another_load_becomes_the_baseline() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.after(STEP, window(Some(1_000), Some(1_020)));
        }
        // Ten times the callers: each call takes longer, with and without Cleanup.
        let pauses: Vec<_> = (0..80).map(|_| pace.after(STEP, window(Some(10_000), Some(10_100)))).collect();
        assert!(pauses.iter().max() > pauses.last(), "it was careful at first: {pauses:?}");
        assert_eq!(pauses.last(), Some(&STEP.mul_f64(PAUSE_MIN)));
    }
}
