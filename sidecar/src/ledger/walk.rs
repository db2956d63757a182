//! How a listing walks through its stretches and where its page ends: the rules that both ledgers follow, without their
//! statements and their clock.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    filter::{Cursor, EARLIEST, Filling, HistoryFilter, LATEST, Page},
    stretches::Stretch,
};
use crate::event::{Event, Time};

/// Rows that one statement of a listing looks at: some milliseconds' worth.
const LOOK_MAX: i64 = 20_000;
/// A page that is not full by then ends where the walk has come to, and the next one goes on: what is rare among millions of
/// events is found over some pages, none of which takes long.
pub(crate) const PAGE_TIME_MAX: Duration = Duration::from_millis(500);

/// What a page may be taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// The earliest creation.
    pub(crate) start: Time,
    /// Before this place.
    pub(crate) end: Cursor,
    /// Whether the counts can tell which hours have nothing that is wanted.
    pub(crate) by_hours: bool,
}

impl Bounds {
    pub(crate) fn of(filter: &HistoryFilter) -> Bounds {
        let end = Cursor::before(filter.end_time.unwrap_or(LATEST));
        Bounds {
            start: filter.start_time.unwrap_or(EARLIEST),
            end: filter.after.map_or(end, |after| after.min(end)),
            by_hours: !filter.states.is_empty() || filter.tenant.is_some() || filter.provider.is_some(),
        }
    }

    /// All of it, as one stretch.
    pub(crate) fn whole(&self) -> Stretch {
        Stretch { start: self.start, end: self.end }
    }
}

/// What the next statement of a walk looks at, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    /// Rows before this place.
    pub(crate) place: Cursor,
    /// The earliest creation.
    pub(crate) start: Time,
    /// The most events that are worth finding.
    pub(crate) wanted: i64,
    /// The most rows to look at, whether they are wanted or not.
    pub(crate) look_max: i64,
}

/// A page under way. While there is a [`Walk::look`], its events are pushed, and then the walk is told how far it looked.
#[derive(Debug)]
pub(crate) struct Walk {
    filling: Filling,
    /// What is left to walk, newest first; empty: the page has ended.
    stretches: VecDeque<Stretch>,
    /// An event did not go onto the page.
    is_full: bool,
    /// Where a page begins that goes on because the time of this one was over.
    next: Option<Cursor>,
    begun: Instant,
    time_max: Duration,
}

impl Walk {
    /// A page that was begun at this moment, and may take this long.
    pub(crate) fn new(page_size: usize, stretches: Vec<Stretch>, begun: Instant, time_max: Duration) -> Walk {
        let (filling, stretches) = (Filling::new(page_size), stretches.into());
        Walk { filling, stretches, is_full: false, next: None, begun, time_max }
    }

    /// What to look at next; None: the page has ended.
    pub(crate) fn look(&self) -> Option<Look> {
        let wanted = self.filling.wanted();
        self.stretches.front().map(|left| Look {
            place: left.end,
            start: left.start,
            wanted,
            look_max: LOOK_MAX.max(wanted),
        })
    }

    /// Takes the next event; false: it does not go onto the page, which has ended before it.
    pub(crate) fn push(&mut self, event: Event) -> bool {
        if !self.filling.push(event) {
            self.is_full = true;
            self.stretches.clear();
        }
        !self.is_full
    }

    /// All events of the look were pushed. `boundary` is the last row that it looked at, if there may be more behind it.
    pub(crate) fn looked(&mut self, boundary: Option<Cursor>, now: Instant) {
        let Some(left) = self.stretches.front_mut() else { return };
        let place = boundary.unwrap_or(left.last());
        match boundary {
            Some(boundary) => left.end = boundary,
            // The stretch is walked to its end.
            None => drop(self.stretches.pop_front()),
        }
        // Behind the last stretch there is nothing to go on with, however long it took.
        if !self.stretches.is_empty() && now.saturating_duration_since(self.begun) >= self.time_max {
            self.next = Some(place);
            self.stretches.clear();
        }
    }

    /// The page that the walk has come to.
    pub(crate) fn page(self) -> Page {
        if self.is_full { self.filling.full() } else { self.filling.ending_at(self.next) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{FencingToken, RowId, State, fixture::claim};

    /// The place of a row, which was created at the time of its number.
    fn at(row: i64) -> Cursor {
        Cursor { create_time: Time(row), row: RowId(row) }
    }

    fn event(row: i64) -> Event {
        Event::inserted(&claim(&format!("evt_{row}"), "claim"), RowId(row), FencingToken(row), Time(row))
    }

    fn stretch((start, end): (i64, i64)) -> Stretch {
        Stretch { start: Time(start), end: Cursor::before(Time(end)) }
    }

    /// What one look finds: rows, the boundary, and how many milliseconds after the beginning it is done.
    type Found<'a> = (&'a [i64], Option<i64>, u64);

    /// Walks; gives the page's rows, where the next one begins, and where each look began.
    fn walk(
        page_size: usize,
        stretches: &[(i64, i64)],
        found: &[Found<'_>],
    ) -> (Vec<i64>, Option<Cursor>, Vec<Cursor>) {
        let begun = Instant::now();
        let stretches = stretches.iter().copied().map(stretch).collect();
        let mut walk = Walk::new(page_size, stretches, begun, PAGE_TIME_MAX);
        let (mut found, mut looks) = (found.iter(), Vec::new());
        while let Some(look) = walk.look() {
            looks.push(look.place);
            let (rows, boundary, millis) = found.next().expect("the page has not ended");
            assert!(rows.iter().all(|row| at(*row) < look.place && Time(*row) >= look.start), "{look:?} {rows:?}");
            if rows.iter().all(|row| walk.push(event(*row))) {
                walk.looked(boundary.map(at), begun + Duration::from_millis(*millis));
            }
        }
        assert_eq!(found.next(), None, "the page has ended early");
        let page = walk.page();
        (page.events.iter().map(|event| event.row.0).collect(), page.next, looks)
    }

    #[test]
    fn a_page_ends_when_it_is_full_when_its_time_is_over_or_when_nothing_is_left() {
        let before = |time: i64| Cursor::before(Time(time));
        let one: &[(i64, i64)] = &[(0, 100)];
        let two: &[(i64, i64)] = &[(50, 100), (0, 20)];
        type Case<'a> = (&'a str, &'a [(i64, i64)], &'a [Found<'a>], &'a [i64], Option<Cursor>, &'a [Cursor]);
        let cases: &[Case<'_>] = &[
            ("full", one, &[(&[90, 80, 70, 60], Some(60), 0)], &[90, 80, 70], Some(at(70)), &[before(100)]),
            (
                "full, its time over",
                one,
                &[(&[90, 80, 70, 60], None, 900)],
                &[90, 80, 70],
                Some(at(70)),
                &[before(100)],
            ),
            ("all rows at the end", one, &[(&[90, 80, 70], None, 0)], &[90, 80, 70], None, &[before(100)]),
            (
                "full by the next look",
                one,
                &[(&[90, 80, 70], Some(65), 0), (&[60], None, 0)],
                &[90, 80, 70],
                Some(at(70)),
                &[before(100), at(65)],
            ),
            (
                "all rows, and nothing behind them",
                one,
                &[(&[90, 80, 70], Some(65), 0), (&[], None, 0)],
                &[90, 80, 70],
                None,
                &[before(100), at(65)],
            ),
            (
                "a stretch walked to its end",
                two,
                &[(&[90], None, 499), (&[10], None, 499)],
                &[90, 10],
                None,
                &[before(100), before(20)],
            ),
            ("time over within a stretch", one, &[(&[90], Some(60), 500)], &[90], Some(at(60)), &[before(100)]),
            ("time over with nothing found", one, &[(&[], Some(60), 500)], &[], Some(at(60)), &[before(100)]),
            (
                "time nearly over within a stretch",
                one,
                &[(&[90], Some(60), 499), (&[40], Some(30), 500)],
                &[90, 40],
                Some(at(30)),
                &[before(100), at(60)],
            ),
            ("time over between stretches", two, &[(&[90], None, 500)], &[90], Some(before(50)), &[before(100)]),
            (
                "time over within the last stretch",
                two,
                &[(&[90], None, 0), (&[15], Some(12), 500)],
                &[90, 15],
                Some(at(12)),
                &[before(100), before(20)],
            ),
            (
                "time over after the last stretch",
                two,
                &[(&[90], None, 0), (&[15], None, 500)],
                &[90, 15],
                None,
                &[before(100), before(20)],
            ),
            ("nothing to walk", &[], &[], &[], None, &[]),
        ];
        for (name, stretches, found, rows, next, looks) in cases {
            assert_eq!(walk(3, stretches, found), (rows.to_vec(), *next, looks.to_vec()), "{name}");
        }
    }

    #[test]
    fn a_look_wants_one_more_than_the_page_has_room_for_and_looks_at_as_many_at_least() {
        for (page_size, pushed, wanted, look_max) in
            [(50, 0, 51, LOOK_MAX), (50, 20, 31, LOOK_MAX), (50, 50, 1, LOOK_MAX), (30_000, 0, 30_001, 30_001)]
        {
            let mut walk = Walk::new(page_size, vec![stretch((0, 100))], Instant::now(), PAGE_TIME_MAX);
            assert!((0..pushed).all(|row| walk.push(event(99 - row))));
            let expected = Look { place: Cursor::before(Time(100)), start: Time(0), wanted, look_max };
            assert_eq!(walk.look(), Some(expected), "{page_size} {pushed}");
        }
    }

    #[test]
    fn the_bounds_are_those_of_the_filter_from_where_the_last_page_ended() {
        let of = |start: Option<i64>, end: Option<i64>, after: Option<i64>| {
            let (start_time, end_time) = (start.map(Time), end.map(Time));
            let bounds =
                Bounds::of(&HistoryFilter { start_time, end_time, after: after.map(at), ..Default::default() });
            (bounds.start, bounds.end)
        };
        assert_eq!(of(None, None, None), (EARLIEST, Cursor::before(LATEST)));
        assert_eq!(of(Some(5), Some(9), None), (Time(5), Cursor::before(Time(9))));
        assert_eq!(of(None, None, Some(7)), (EARLIEST, at(7)));
        assert_eq!(of(None, Some(9), Some(7)), (EARLIEST, at(7)));
        // A token of a listing that ended later.
        assert_eq!(of(None, Some(9), Some(9)), (EARLIEST, Cursor::before(Time(9))));
    }

    #[test]
    fn hours_are_looked_up_where_the_counts_can_tell_them_apart() {
        let none = HistoryFilter::default;
        for (filter, by_hours) in [
            (none(), false),
            (HistoryFilter { event_type: Some("rare".into()), start_time: Some(Time(5)), ..none() }, false),
            (HistoryFilter { tenant: Some("default".into()), ..none() }, true),
            (HistoryFilter { provider: Some("stripe".into()), ..none() }, true),
            (HistoryFilter { states: vec![State::Dead], ..none() }, true),
        ] {
            assert_eq!(Bounds::of(&filter).by_hours, by_hours, "{filter:?}");
        }
    }
}
