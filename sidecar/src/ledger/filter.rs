//! What History, Stats and Cleanup are asked and answered with, between the API and the ledgers.

use std::{
    collections::BTreeMap,
    ops::{Index, IndexMut},
    time::Duration,
};

use super::timings::{Percentiles, Sparse};
use crate::event::{Event, Micros, RowId, State, Time};

/// Bounds for filters that have none: before and after everything. The years 1970 and 9999.
pub(super) const EARLIEST: Time = Time(0);
pub(super) const LATEST: Time = Time(253_370_764_800_000_000);

/// A listing of events, newest first.
#[derive(Clone, Debug, Default)]
pub struct HistoryFilter {
    /// None: all tenants.
    pub tenant: Option<String>,
    /// None: all providers.
    pub provider: Option<String>,
    /// None: all types.
    pub event_type: Option<String>,
    /// Empty: all states.
    pub states: Vec<State>,
    /// Created at or after.
    pub start_time: Option<Time>,
    /// Created before.
    pub end_time: Option<Time>,
    /// At least 1.
    pub page_size: usize,
    /// Where the last page ended.
    pub after: Option<Cursor>,
}

/// A place in the order of events by creation: key-set pages neither skip nor repeat when events are added or deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// The event's creation.
    pub create_time: Time,
    /// The event's row, which decides between equal times.
    pub row: RowId,
}

impl Cursor {
    /// The place of an event.
    pub fn of(event: &Event) -> Cursor {
        Cursor { create_time: event.create_time, row: event.row }
    }

    /// The place before every event that was created at this time.
    pub(super) fn before(time: Time) -> Cursor {
        Cursor { create_time: time, row: RowId::NONE }
    }
}

/// One page.
#[derive(Clone, Debug)]
pub struct Page {
    /// Newest first.
    pub events: Vec<Event>,
    /// Where the next page begins; None on the last one.
    pub next: Option<Cursor>,
}

impl Page {
    /// The most bytes that a page carries: clients take messages of 4 MiB unless told otherwise, and results have up to 64 KiB.
    pub const BYTES_MAX: usize = 3 << 20;
}

/// A page while its events are read, newest first.
#[derive(Debug)]
pub(super) struct Filling {
    page_size: usize,
    events: Vec<Event>,
    /// The bytes of those of their fields that have no fixed size.
    bytes: usize,
}

impl Filling {
    pub(super) fn new(page_size: usize) -> Filling {
        Filling { page_size: page_size.max(1), events: Vec::new(), bytes: 0 }
    }

    /// How many more events are worth reading: one more than the page has tells that there is a next one.
    pub(super) fn wanted(&self) -> i64 {
        i64::try_from(self.page_size.saturating_add(1) - self.events.len()).unwrap_or(i64::MAX)
    }

    /// Takes the next event; false: the page was full, and the next one begins with it. It is full as well once it holds
    /// [`Page::BYTES_MAX`]: 500 results of 64 KiB would be read for a message that takes a tenth of them.
    pub(super) fn push(&mut self, event: Event) -> bool {
        if self.events.len() >= self.page_size || self.bytes >= Page::BYTES_MAX {
            return false;
        }
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        self.bytes += event.result.as_ref().map_or(0, |result| result.body.len())
            + text(&event.metadata)
            + text(&event.completion_metadata)
            + text(&event.last_error);
        self.events.push(event);
        true
    }

    /// The page, after an event did not fit onto it.
    pub(super) fn full(self) -> Page {
        let next = self.events.last().map(Cursor::of);
        self.ending_at(next)
    }

    /// The page, and where the next one begins, if there is one.
    pub(super) fn ending_at(self, next: Option<Cursor>) -> Page {
        Page { events: self.events, next }
    }
}

/// Which events are counted.
#[derive(Clone, Debug)]
pub struct StatsFilter {
    /// None: all tenants.
    pub tenant: Option<String>,
    /// None: all providers.
    pub provider: Option<String>,
    /// A full hour; created at or after.
    pub start_time: Option<Time>,
    /// A full hour; created before.
    pub end_time: Option<Time>,
    /// A multiple of an hour.
    pub bucket: Option<Micros>,
    /// The most buckets that the caller can report. A report of more has nothing but the counts: no times, and nothing that is
    /// stuck.
    pub buckets_max: i64,
    /// The most counts that the caller can report, one for each provider in each bucket. A report of more has one more, and nothing
    /// else: providers are whatever callers name.
    pub counts_max: usize,
    /// Whether providers are told apart; if not, all are counted under an empty name.
    pub by_provider: bool,
    /// Whether times are wanted: reading them takes longer than everything else.
    pub timings: bool,
}

/// How many buckets there are from `start` on, before `end`.
pub(crate) fn buckets_between(start: Time, end: Time, bucket: Micros) -> i64 {
    (end.since(start).0 + bucket.0 - 1) / bucket.0.max(1)
}

impl StatsFilter {
    /// The hours, half open.
    pub(super) fn bounds(&self) -> (Time, Time) {
        (self.start_time.unwrap_or(EARLIEST), self.end_time.unwrap_or(LATEST))
    }

    /// The start of the bucket of an hour within the bounds; without buckets, of all hours.
    pub(super) fn bucket_of(&self, hour: Time) -> Time {
        let (start, _) = self.bounds();
        match self.bucket {
            Some(bucket) if bucket.0 > 0 => Time(start.0 + (hour.0 - start.0).div_euclid(bucket.0) * bucket.0),
            Some(_) | None => start,
        }
    }

    /// Under which bucket and provider an hour is reported.
    pub(super) fn place_of(&self, hour: Time, provider: String) -> (Time, String) {
        (self.bucket_of(hour), if self.by_provider { provider } else { String::new() })
    }

    /// Adds what was counted of an hour and a provider; false: there are more counts than are wanted, and no more need be read.
    pub(super) fn add(
        &self,
        counts: &mut BTreeMap<(Time, String), Counts>,
        hour: Time,
        provider: String,
        found: &Counts,
    ) -> bool {
        if *found != Counts::default() {
            counts.entry(self.place_of(hour, provider)).or_default().add(found);
        }
        counts.len() <= self.counts_max
    }

    /// Whether what was counted has more buckets or counts than are wanted. Known before the times are read, of which each bucket
    /// and provider has many.
    pub(super) fn is_exceeded_by(&self, counts: &BTreeMap<(Time, String), Counts>) -> bool {
        if counts.len() > self.counts_max {
            return true;
        }
        match (self.bucket, counts.keys().next(), counts.keys().next_back()) {
            (Some(bucket), Some((first, _)), Some((last, _))) => {
                buckets_between(*first, last.plus(bucket), bucket) > self.buckets_max
            }
            _ => false,
        }
    }

    /// The days (half open; none: `start` twice) that lie within the bounds and within one bucket each: their hours need not be
    /// told apart.
    pub(super) fn whole_days(&self) -> (Time, Time) {
        let (start, end) = self.bounds();
        let told_apart = self.bucket.is_some_and(|bucket| bucket.0 % Micros::DAY.0 != 0 || start != start.day());
        let (first, last) = (start.plus(Micros(Micros::DAY.0 - 1)).day(), end.day());
        if told_apart || first >= last { (start, start) } else { (first, last) }
    }
}

/// Counts of events (L5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// By the state that the events are in, in the order of [`State::ALL`].
    pub states: [i64; State::ALL.len()],
    /// Calls answered with anything but the lock.
    pub duplicates: i64,
    /// Attempts beyond the first.
    pub retries: i64,
    /// Processing past the lock's expiry.
    pub stuck: i64,
}

impl Index<State> for Counts {
    type Output = i64;

    fn index(&self, state: State) -> &i64 {
        &self.states[state as usize]
    }
}

impl IndexMut<State> for Counts {
    fn index_mut(&mut self, state: State) -> &mut i64 {
        &mut self.states[state as usize]
    }
}

impl Counts {
    /// All events.
    pub fn total(&self) -> i64 {
        self.states.iter().sum()
    }

    /// Adds the other's counts to these.
    pub fn add(&mut self, other: &Counts) {
        for (mine, theirs) in self.states.iter_mut().zip(other.states) {
            *mine += theirs;
        }
        self.duplicates += other.duplicates;
        self.retries += other.retries;
        self.stuck += other.stuck;
    }
}

/// Counts per bucket and provider, and when they were taken.
#[derive(Clone, Debug, PartialEq)]
pub struct StatsReport {
    /// By the start of the bucket (without buckets, all stand under one key that means nothing) and provider.
    pub counts: BTreeMap<(Time, String), Counts>,
    /// Of times from lock to completion, by the same keys, if they are wanted. Postgres has them within a second, and a crash
    /// loses those of that second.
    pub percentiles: BTreeMap<(Time, String), Percentiles>,
    /// The times of all buckets, by provider.
    pub timings: BTreeMap<String, Sparse>,
    /// The database's time.
    pub as_of: Time,
}

impl StatsReport {
    /// A report that has nothing but the counts.
    pub(super) fn of(counts: BTreeMap<(Time, String), Counts>, as_of: Time) -> StatsReport {
        StatsReport { counts, percentiles: BTreeMap::new(), timings: BTreeMap::new(), as_of }
    }
}

/// How old events get at least before Cleanup may delete them, where the configuration does not say: the longest time over which
/// providers deliver again by themselves, with a margin.
pub const RETENTION_MIN: Duration = Duration::from_secs(6 * 24 * 3_600);

/// What Cleanup deletes.
#[derive(Clone, Debug)]
pub struct CleanupScope {
    /// None: all tenants.
    pub tenant: Option<String>,
    /// None: all providers.
    pub provider: Option<String>,
    /// Ended (failed ones: last changed) before this moment.
    pub before: Time,
    /// Never processing or pending.
    pub states: Vec<State>,
    /// Counts, deletes nothing.
    pub dry_run: bool,
    /// Rows looked at in one transaction, at most.
    pub batch_size: usize,
}

/// How far a Cleanup has come.
#[derive(Clone, Debug, Default)]
pub struct CleanupProgress {
    /// Rows up to here were looked at.
    pub cursor: Option<Cursor>,
    /// Totals so far, by provider.
    pub providers: BTreeMap<String, CleanupTotals>,
    /// Delivery ids that came until then were looked at.
    pub deliveries_until: Option<Time>,
    /// Counts of hours before this one have been folded, where the ledger does that.
    pub folded_until: Option<Time>,
    /// Nothing is left to look at.
    pub done: bool,
}

/// Totals of a Cleanup for one provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanupTotals {
    /// Events that the scope covers.
    pub matched: i64,
    /// Events that were deleted.
    pub deleted: i64,
    /// The earliest end among them.
    pub oldest_end_time: Option<Time>,
}

impl CleanupTotals {
    /// Takes up one event that ended at `end_time`.
    pub fn count(&mut self, end_time: Time, deleted: bool) {
        self.matched += 1;
        self.deleted += i64::from(deleted);
        self.oldest_end_time = Some(self.oldest_end_time.map_or(end_time, |oldest| oldest.min(end_time)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{FencingToken, StoredResult, fixture::claim};

    const HOUR: i64 = Micros::HOUR.0;

    fn filter(start: Option<i64>, end: Option<i64>, bucket: Option<i64>) -> StatsFilter {
        let hours = |hours: i64| hours * HOUR;
        StatsFilter {
            tenant: None,
            provider: None,
            start_time: start.map(hours).map(Time),
            end_time: end.map(hours).map(Time),
            bucket: bucket.map(hours).map(Micros),
            buckets_max: 1_000,
            counts_max: 3,
            by_provider: true,
            timings: true,
        }
    }

    #[test]
    fn counts_are_read_until_there_are_more_than_are_wanted() {
        let one = Counts { duplicates: 1, ..Counts::default() };
        for (by_provider, hours, bucket, read, exceeded) in [
            (true, 1, None, 4, true),
            (true, 3, Some(1), 4, true),
            (false, 9, None, 90, false),
            (false, 3, Some(1), 30, false),
            (false, 9, Some(1), 31, true),
        ] {
            let filter = StatsFilter { by_provider, ..filter(None, None, bucket) };
            let mut counts = BTreeMap::new();
            let mut added = 0;
            for (hour, provider) in (0..hours).flat_map(|hour| (0..10).map(move |provider| (hour, provider))) {
                assert!(filter.add(&mut counts, Time(hour * HOUR), format!("nothing_{added}"), &Counts::default()));
                added += 1;
                if !filter.add(&mut counts, Time(hour * HOUR), format!("provider_{provider}"), &one) {
                    break;
                }
            }
            let case = format!("{by_provider} {hours} {bucket:?}");
            assert_eq!((added, filter.is_exceeded_by(&counts)), (read, exceeded), "{case}");
            assert!(counts.len() <= 4, "{case}");
            assert_eq!(counts.values().map(|counts| counts.duplicates).sum::<i64>(), read, "{case}");
        }
    }

    #[test]
    fn buckets_are_counted_from_the_first_to_the_last_that_have_something() {
        let counts = |hours: &[i64]| {
            hours.iter().map(|hour| ((Time(hour * HOUR), "stripe".to_owned()), Counts::default())).collect()
        };
        for (bucket, hours, exceeded) in [
            (Some(1), &[][..], false),
            (Some(1), &[9_000], false),
            (Some(1), &[5, 1_004], false),
            (Some(1), &[5, 1_005], true),
            (Some(24), &[0, 23_976], false),
            (Some(24), &[0, 24_000], true),
            (None, &[0, 24_000], false),
        ] {
            assert_eq!(filter(None, None, bucket).is_exceeded_by(&counts(hours)), exceeded, "{bucket:?} {hours:?}");
        }
    }

    #[test]
    fn a_page_is_full_when_it_has_all_events_or_all_bytes_that_it_may() {
        let event = |row: i64, bytes: usize| {
            let result = StoredResult { code: 200, body: vec![7; bytes].into(), content_type: String::new() };
            let result = (bytes > 0).then_some(result);
            Event {
                result,
                ..Event::inserted(&claim(&format!("evt_{row}"), "claim"), RowId(row), FencingToken(row), Time(row))
            }
        };
        for (page_size, bytes, fit) in
            [(3, 0, 3), (3, 64 << 10, 3), (0, 0, 1), (500, 64 << 10, 48), (500, (64 << 10) - 1, 49), (500, 4 << 20, 1)]
        {
            let mut filling = Filling::new(page_size);
            let pushed = (0..500).take_while(|row| filling.push(event(1_000 - row, bytes))).count();
            let page = filling.full();
            assert_eq!((pushed, page.events.len()), (fit, fit), "{page_size} of {bytes}");
            assert_eq!(page.next, page.events.last().map(Cursor::of));
        }
    }

    #[test]
    fn each_state_has_the_count_at_its_place() {
        for (place, state) in State::ALL.into_iter().enumerate() {
            let mut counts = Counts::default();
            counts[state] += 1;
            assert_eq!((counts.states[place], counts[state], counts.total()), (1, 1, 1), "{state:?}");
        }
    }

    #[test]
    fn days_stand_for_their_hours_where_no_hour_is_told_apart() {
        for (start, end, bucket, days) in [
            (None, None, None, (0, LATEST.0 / HOUR)),
            (Some(24), Some(72), None, (24, 72)),
            (Some(25), Some(71), None, (48, 48)),
            (Some(23), Some(73), None, (24, 72)),
            (Some(25), Some(72), None, (48, 72)),
            (Some(24), Some(72), Some(24), (24, 72)),
            (Some(24), Some(72), Some(48), (24, 72)),
            // From where it has parts of two days in a bucket.
            (Some(25), Some(97), Some(24), (25, 25)),
            (Some(24), Some(72), Some(1), (24, 24)),
            (Some(24), Some(72), Some(36), (24, 24)),
            // An open start is that of a day.
            (None, Some(72), Some(24), (0, 72)),
            (Some(30), Some(40), None, (30, 30)),
            (Some(72), Some(72), None, (72, 72)),
        ] {
            let of = filter(start, end, bucket);
            let (first, last) = of.whole_days();
            let found = (first.0 / HOUR, last.0 / HOUR);
            // None is none, whatever it is called.
            let same = found == days || (found.0 == found.1 && days.0 == days.1 && first == of.bounds().0);
            assert!(same, "{start:?} {end:?} {bucket:?}: {found:?}, not {days:?}");
            let mut hour = first;
            while hour < last.min(Time(first.0 + 100 * HOUR)) {
                assert_eq!(of.bucket_of(hour), of.bucket_of(hour.day()), "{of:?} {hour:?}");
                hour = hour.plus(Micros(HOUR));
            }
        }
    }
}
