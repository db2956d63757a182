//! Which stretches of time a listing has to walk. The counts tell which hours have any event of the state, tenant and
//! provider that are wanted, so that a rare one is found without reading what lies between (L5).

use std::time::Duration;

use super::filter::Cursor;
use crate::event::{Micros, Time};

/// Rows that one statement of a listing looks at: some milliseconds' worth.
pub(crate) const LOOK_MAX: i64 = 20_000;
/// A page that is not full by then ends where the walk has come to, and the next one goes on: what is rare among millions of
/// events is found over some pages, none of which takes long.
pub(crate) const PAGE_TIME_MAX: Duration = Duration::from_millis(500);

const HOUR: Micros = Micros(3_600_000_000);

/// A stretch of the order of events by creation, half open: from `start` on, before `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) start: Time,
    pub(crate) end: Cursor,
}

/// The stretches that the hours (newest first) make up within the bounds, newest first; neighbours are one.
pub(crate) fn of_hours(hours: impl IntoIterator<Item = Time>, start: Time, end: Cursor) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    for hour in hours {
        let next = Cursor { create_time: hour.plus(HOUR), row: 0 };
        match stretches.last_mut() {
            Some(last) if last.start == next.create_time => last.start = hour,
            Some(_) | None => stretches.push(Stretch { start: hour, end: next }),
        }
    }
    stretches
        .into_iter()
        .map(|stretch| Stretch { start: stretch.start.max(start), end: stretch.end.min(end) })
        .filter(|stretch| Cursor { create_time: stretch.start, row: 0 } < stretch.end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hour(number: i64) -> Time {
        Time(number * HOUR.0)
    }

    fn before(time: Time) -> Cursor {
        Cursor { create_time: time, row: 0 }
    }

    #[test]
    fn neighbouring_hours_are_one_stretch_within_the_bounds() {
        let hours = [9, 8, 7, 4, 2, 1].map(hour);
        let stretches = |start, end| -> Vec<(i64, i64)> {
            of_hours(hours, start, before(end))
                .into_iter()
                .map(|stretch| (stretch.start.0 / HOUR.0, stretch.end.create_time.0 / HOUR.0))
                .collect()
        };
        assert_eq!(stretches(hour(0), hour(20)), [(7, 10), (4, 5), (1, 3)]);
        assert_eq!(stretches(hour(2), hour(8)), [(7, 8), (4, 5), (2, 3)]);
        assert_eq!(stretches(hour(5), hour(7)), []);
        assert_eq!(of_hours([], hour(0), before(hour(9))), []);
        // The place within an hour where the last page ended.
        let end = Cursor { create_time: Time(hour(4).0 + 5), row: 17 };
        assert_eq!(of_hours(hours, hour(4), end), [Stretch { start: hour(4), end }]);
    }
}
