//! Which stretches of time a listing has to walk. The counts tell which hours have any event of the state, tenant and
//! provider that are wanted, so that a rare one is found without reading what lies between (L5).

use super::filter::Cursor;
use crate::event::{Micros, Time};

/// A stretch of the order of events by creation, half open: from `start` on, before `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) start: Time,
    pub(crate) end: Cursor,
}

impl Stretch {
    /// Its last place, in the order of a listing.
    pub(crate) fn last(&self) -> Cursor {
        Cursor::before(self.start)
    }
}

/// The stretches that the hours (newest first) make up within the bounds, newest first; neighbours are one.
pub(crate) fn of_hours(hours: impl IntoIterator<Item = Time>, start: Time, end: Cursor) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    for hour in hours {
        let next = Cursor::before(hour.plus(Micros::HOUR));
        match stretches.last_mut() {
            Some(last) if last.start == next.create_time => last.start = hour,
            Some(_) | None => stretches.push(Stretch { start: hour, end: next }),
        }
    }
    stretches
        .into_iter()
        .map(|stretch| Stretch { start: stretch.start.max(start), end: stretch.end.min(end) })
        .filter(|stretch| stretch.last() < stretch.end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::RowId;

    fn hour(number: i64) -> Time {
        Time(number * Micros::HOUR.0)
    }

    #[test]
    fn neighbouring_hours_are_one_stretch_within_the_bounds() {
        let hours = [9, 8, 7, 4, 2, 1].map(hour);
        let stretches = |start, end| -> Vec<(i64, i64)> {
            of_hours(hours, start, Cursor::before(end))
                .into_iter()
                .map(|stretch| (stretch.start.0 / Micros::HOUR.0, stretch.end.create_time.0 / Micros::HOUR.0))
                .collect()
        };
        assert_eq!(stretches(hour(0), hour(20)), [(7, 10), (4, 5), (1, 3)]);
        assert_eq!(stretches(hour(2), hour(8)), [(7, 8), (4, 5), (2, 3)]);
        assert_eq!(stretches(hour(5), hour(7)), []);
        assert_eq!(of_hours([], hour(0), Cursor::before(hour(9))), []);
        // The place within an hour where the last page ended.
        let end = Cursor { create_time: Time(hour(4).0 + 5), row: RowId(17) };
        assert_eq!(of_hours(hours, hour(4), end), [Stretch { start: hour(4), end }]);
    }
}
