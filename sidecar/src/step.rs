//! Callers in step. Where all callers wait for one batch (those of one application, on one connection), the store has nothing to
//! do while they are told and ask again, and they have nothing to do while it works. Told in two halves they ask again in
//! two, and the one is told while the store works for the other: a third more cycles a second of 64 callers on one
//! connection, half as many duplicates more. Once is enough: the halves stay apart by themselves.

/// Batches of fewer answers stay whole: halves that small cost the store more than it waits. (Two groups of 32 that became four
/// of 16 did 11 % less.)
const ANSWERS_MIN: usize = 64;
/// This many batches in a row must end with nobody waiting. A single one may be chance, and callers who already go in groups would
/// only be divided again.
const ENDS_MIN: u32 = 3;

/// Sees whether callers go in step.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Batches in a row that ended with nobody waiting.
    ends: u32,
}

impl Step {
    /// The answers of a batch are there, while `waiting` other calls wait. Returns the index at which to pause, so that the callers
    /// already answered can ask again; none where callers already go in groups.
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
        let mut step = Step::default();
        assert_eq!(step.split(64, 0), None, "it may be a chance");
        assert_eq!(step.split(64, 0), None);
        assert_eq!(step.split(64, 0), Some(32));
        // The halves are with the store in turn from now on, however large they are.
        for _ in 0..10 {
            assert_eq!(step.split(64, 64), None);
        }
        assert_eq!(step.split(64, 0), None, "one of them came late, once");
        assert_eq!(step.split(64, 64), None);
    }

    #[test]
    fn few_answers_are_told_at_once() {
        let mut step = Step::default();
        for _ in 0..10 {
            assert_eq!(step.split(ANSWERS_MIN - 1, 0), None);
        }
    }
}
