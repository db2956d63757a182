//! What History, Stats and Cleanup are asked and answered with, between the API and the ledgers.

use std::collections::BTreeMap;

use super::timings::Timings;
use crate::event::{Event, Micros, State, Time};

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
    pub row: i64,
}

impl Cursor {
    /// The place of an event.
    pub fn of(event: &Event) -> Cursor {
        Cursor { create_time: event.create_time, row: event.row }
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
    /// Times from lock to completion, by the same keys. Postgres has them within a second, and a crash loses that second's.
    pub timings: BTreeMap<(Time, String), Timings>,
    /// The database's time.
    pub as_of: Time,
}

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
    /// Rows looked at in one transaction.
    pub batch_size: usize,
}

/// How far a Cleanup has come.
#[derive(Clone, Debug, Default)]
pub struct CleanupProgress {
    /// Rows up to here were looked at.
    pub cursor: Option<Cursor>,
    /// Totals so far, by provider.
    pub providers: BTreeMap<String, CleanupTotals>,
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
