//! Which of the acknowledged completions are asked for again at the end.

use rand::{Rng, RngExt as _};

/// At most so many of the events that were added. All of them, if there is room; otherwise each has the same chance to be
/// among them, so that what went wrong late in a long run is as likely to be found as what went wrong at its beginning.
#[derive(Debug)]
pub(super) struct Sample {
    kept: Vec<u64>,
    max: usize,
    /// How many were added.
    added: u64,
}

impl Sample {
    /// An empty one, which grows up to this many events.
    pub(super) fn of(max: usize) -> Self {
        // The room is made as it is needed: the limit may be far above what a run comes to.
        Self { kept: Vec::new(), max, added: 0 }
    }

    /// Adds an event: instead of one that is there, or not at all, if there is no more room (algorithm R).
    pub(super) fn add(&mut self, event: u64, random: &mut impl Rng) {
        let before = self.added;
        self.added += 1;
        if self.kept.len() < self.max {
            self.kept.push(event);
            return;
        }
        let place = usize::try_from(random.random_range(0..=before)).unwrap_or(usize::MAX);
        if let Some(kept) = self.kept.get_mut(place) {
            *kept = event;
        }
    }

    /// How many of those that were added are not in it.
    pub(super) fn left_out(&self) -> u64 {
        self.added - self.kept.len() as u64
    }

    /// The events that are in it, in no particular order.
    pub(super) fn into_events(self) -> Vec<u64> {
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn sample(max: usize, events: u64) -> Sample {
        // The same numbers every time.
        let mut random = StdRng::seed_from_u64(1);
        let mut sample = Sample::of(max);
        for event in 0..events {
            sample.add(event, &mut random);
        }
        sample
    }

    #[test]
    fn all_are_kept_where_there_is_room() {
        for events in [0, 1, 99, 100] {
            let sample = sample(100, events);
            assert_eq!(sample.left_out(), 0, "{events}");
            assert_eq!(sample.into_events(), (0..events).collect::<Vec<_>>(), "{events}");
        }
    }

    #[test]
    fn of_more_a_part_is_kept_and_the_rest_is_counted() {
        for (max, events) in [(0, 1), (0, 1_000), (1, 1_000), (100, 101), (100, 100_000)] {
            let sample = sample(max, events);
            assert_eq!(sample.left_out(), events - max as u64, "{max} of {events}");
            let kept = sample.into_events();
            assert_eq!(kept.len(), max, "{max} of {events}");
            let different: BTreeSet<u64> = kept.iter().copied().filter(|event| *event < events).collect();
            assert_eq!(different.len(), max, "{max} of {events}: none twice, and none that was not added");
        }
    }

    #[test]
    fn late_ones_are_as_likely_to_be_kept_as_early_ones() {
        const TENTHS: usize = 10;
        let mut by_tenth = [0_u32; TENTHS];
        for event in sample(1_000, 100_000).into_events() {
            by_tenth[event as usize / (100_000 / TENTHS)] += 1;
        }
        // A hundred of each are expected, give or take ten.
        assert!(by_tenth.iter().all(|kept| (60..=140).contains(kept)), "{by_tenth:?}");
    }
}
