//! Callers in step. Where all callers wait for one batch (those of one application, on one connection), the store is idle while
//! they are answered and ask again, and they are idle while it works. If they are answered in two halves, they also ask again
//! in two, and one half is answered while the store works for the other: 64 callers on one connection get through a third more
//! cycles a second, and half as many duplicates more. Doing this once is enough: the halves stay apart by themselves.

/// Batches of fewer answers stay whole: halves that small cost the store more than the waiting does. (Two groups of 32 that
/// became four of 16 did 11 % less.)
const ANSWERS_MIN: usize = 64;
/// This many batches in a row must end with nobody waiting. A single one may be chance, and callers who already go in groups would
/// only be divided again.
const ENDS_MIN: u32 = 3;

/// Sees whether callers go in step.
#[derive(Debug, Default)]
pub(crate) struct Lockstep {
    /// Batches in a row that ended with nobody waiting.
    ends: u32,
}

impl Lockstep {
    /// Called when the answers of a batch are ready, while `waiting` other calls wait. Returns the index at which to pause, so
    /// that the callers already answered can ask again; none where callers already go in groups.
    pub(crate) fn split(&mut self, answers: usize, waiting: usize) -> Option<usize> {
        self.ends = if waiting == 0 { self.ends.saturating_add(1) } else { 0 };
        (self.ends >= ENDS_MIN && answers >= ANSWERS_MIN).then_some(answers / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_in_step_are_told_in_halves_until_they_go_in_groups() {
        let mut lockstep = Lockstep::default();
        assert_eq!(lockstep.split(64, 0), None, "it may be a chance");
        assert_eq!(lockstep.split(64, 0), None);
        assert_eq!(lockstep.split(64, 0), Some(32));
        // From now on the halves take turns at the store, however large they are.
        for _ in 0..10 {
            assert_eq!(lockstep.split(64, 64), None);
        }
        assert_eq!(lockstep.split(64, 0), None, "one of them came late, once");
        assert_eq!(lockstep.split(64, 64), None);
    }

    #[test]
    fn few_answers_are_told_at_once() {
        let mut lockstep = Lockstep::default();
        for _ in 0..10 {
            assert_eq!(lockstep.split(ANSWERS_MIN - 1, 0), None);
        }
    }
}
