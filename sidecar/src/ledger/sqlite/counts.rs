//! The counts that Stats answers from (L5): what a transaction changes is added up in memory and written once, before
//! its commit, so that they always equal a recount of the rows.

use std::collections::BTreeMap;

use rusqlite::{Connection, params};

use crate::{
    event::{Event, Time},
    ledger::{
        filter::Counts,
        place::Place,
        timings::{Timings, processing_time},
    },
};

/// What a transaction adds to the counts.
#[derive(Debug, Default)]
pub(super) struct Deltas {
    places: BTreeMap<Place, Counts>,
    timings: BTreeMap<Place, Timings>,
}

impl Deltas {
    /// What is added where events of this tenant and provider are counted that were created at `create_time`.
    pub(super) fn at(&mut self, tenant: &str, provider: &str, create_time: Time) -> &mut Counts {
        self.places.entry(Place::at(tenant, provider, create_time)).or_default()
    }

    /// An event was marked: counts how long its completion took, if it was one.
    pub(super) fn marked(&mut self, event: &Event) {
        if let Some(time) = processing_time(event) {
            self.timings.entry(Place::of(event)).or_default().record(time);
        }
    }

    /// An event was created, or went from one state into another, by a grant or without one.
    pub(super) fn changed(&mut self, before: Option<&Event>, after: &Event) {
        let counts = self.at(&after.key.tenant, &after.key.provider, after.create_time);
        if let Some(before) = before {
            counts[before.state] -= 1;
            counts.retries += retries(after.attempt_count) - retries(before.attempt_count);
        }
        counts[after.state] += 1;
    }

    /// Whether there is anything to write.
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty() && self.timings.is_empty()
    }

    /// Writes them.
    pub(super) fn write(&self, conn: &Connection) -> rusqlite::Result<()> {
        let mut statement = conn.prepare_cached(include_str!("count.sql"))?;
        for (place, counts) in &self.places {
            let [pending, processing, completed, failed, unknown, dead] = counts.states;
            statement.execute(params![
                place.tenant,
                place.provider,
                place.hour,
                pending,
                processing,
                completed,
                failed,
                unknown,
                dead,
                counts.duplicates,
                counts.retries,
            ])?;
        }
        let mut statement = conn.prepare_cached(include_str!("timing.sql"))?;
        for (place, timings) in &self.timings {
            for (bucket, count) in timings.buckets() {
                statement.execute(params![place.tenant, place.provider, place.hour, bucket, count])?;
            }
        }
        Ok(())
    }

    /// Removes what counts nothing any more, after [`Self::write`].
    pub(super) fn prune(&self, conn: &Connection) -> rusqlite::Result<()> {
        let mut counts = conn.prepare_cached(include_str!("count_prune.sql"))?;
        let mut timings = conn.prepare_cached(include_str!("timing_prune.sql"))?;
        for place in self.places.keys() {
            counts.execute(params![place.tenant, place.provider, place.hour])?;
            timings.execute(params![place.tenant, place.provider, place.hour])?;
        }
        Ok(())
    }
}

/// The attempts of an event beyond the first.
pub(super) fn retries(attempt_count: i32) -> i64 {
    i64::from(attempt_count.saturating_sub(1).max(0))
}
