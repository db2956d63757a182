//! One bounded step of Cleanup.

use std::time::{Duration, Instant};

use rusqlite::{OptionalExtension as _, Row, params};

use super::{Fault, Transaction};
use crate::{
    event::{Micros, RowId, State, Time},
    ledger::{
        filter::{CleanupProgress, CleanupScope, Cursor},
        sqlite::counts::retries,
    },
};

/// Rows of a step between two looks at the clock. Each step has so many, if there are: however slow the disk, it gets on.
pub(in crate::ledger::sqlite) const ROWS_MIN: usize = 64;
/// Delivery ids of a step. They are small, and all of about one size.
pub(in crate::ledger::sqlite) const DELIVERIES_MAX: usize = 1_000;

/// What decides whether an event goes.
struct Candidate {
    row: RowId,
    create_time: Time,
    tenant: String,
    provider: String,
    state: State,
    /// When it ended; of a failed one, when it was last changed.
    end_time: Time,
    duplicate_count: i64,
    attempt_count: i32,
    /// There may be attempts in the archive, or resolutions.
    more_rows: bool,
}

impl Candidate {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            row: row.get(0)?,
            create_time: row.get(1)?,
            tenant: row.get(2)?,
            provider: row.get(3)?,
            state: row.get(4)?,
            end_time: row.get(5)?,
            duplicate_count: row.get(6)?,
            attempt_count: row.get(7)?,
            more_rows: row.get(8)?,
        })
    }

    fn is_in(&self, scope: &CleanupScope) -> bool {
        // Whatever the scope says.
        self.state.is_deletable()
            && scope.states.contains(&self.state)
            && self.end_time < scope.before
            && scope.tenant.as_ref().is_none_or(|tenant| *tenant == self.tenant)
            && scope.provider.as_ref().is_none_or(|provider| *provider == self.provider)
    }
}

impl Transaction<'_> {
    /// Looks at the next rows after the cursor and deletes, or counts, those that the scope covers: as many as it says, or as
    /// the time allows, because all calls wait meanwhile, and a row may be of a hundred bytes or of many kilobytes. Past the
    /// last row it goes on to the delivery ids.
    pub(in crate::ledger::sqlite) fn cleanup(
        &mut self,
        scope: &CleanupScope,
        progress: &mut CleanupProgress,
        time_max: Duration,
    ) -> Result<(), Fault> {
        let begun = Instant::now();
        // A step that looks at nothing would never end.
        let limit = scope.batch_size.max(1);
        let mut left = limit;
        while left > 0 {
            let wanted = left.min(ROWS_MIN);
            let looked_at = self.cleanup_span(scope, progress, wanted)?;
            if looked_at < wanted {
                let limit = limit.min(DELIVERIES_MAX);
                progress.done = scope.dry_run || !self.delete_deliveries(scope, progress, limit)?;
                break;
            }
            left -= looked_at;
            if begun.elapsed() >= time_max {
                break;
            }
        }
        Ok(())
    }

    /// The next so many rows. Returns how many there were.
    fn cleanup_span(
        &mut self,
        scope: &CleanupScope,
        progress: &mut CleanupProgress,
        limit: usize,
    ) -> Result<usize, Fault> {
        let span = self.span(scope, progress.cursor, limit)?;
        if let Some(last) = span.last() {
            progress.cursor = Some(Cursor { create_time: last.create_time, row: last.row });
        }
        for candidate in span.iter().filter(|candidate| candidate.is_in(scope)) {
            if !scope.dry_run {
                self.delete(candidate)?;
            }
            let totals = progress.providers.entry(candidate.provider.clone()).or_default();
            totals.count(candidate.end_time, !scope.dry_run);
        }
        Ok(span.len())
    }

    fn span(&self, scope: &CleanupScope, after: Option<Cursor>, limit: usize) -> Result<Vec<Candidate>, Fault> {
        let after = after.unwrap_or(Cursor { create_time: Time(i64::MIN), row: RowId(i64::MIN) });
        let mut statement = self.prepare(include_str!("../cleanup_span.sql"))?;
        let rows = statement
            .query_map(params![after.create_time, after.row, scope.before, sql_limit(limit)], Candidate::from_row)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn delete(&mut self, candidate: &Candidate) -> Result<(), Fault> {
        self.writes()?;
        self.deleted_until = self.deleted_until.max(Some(candidate.create_time.hour()));
        if candidate.more_rows {
            self.prepare(include_str!("../cleanup_attempts.sql"))?.execute(params![candidate.row])?;
            self.prepare(include_str!("../cleanup_resolutions.sql"))?.execute(params![candidate.row])?;
        }
        self.prepare(include_str!("../cleanup_event.sql"))?.execute(params![candidate.row])?;
        let counts = self.deltas.at(&candidate.tenant, &candidate.provider, candidate.create_time);
        counts[candidate.state] -= 1;
        counts.duplicates -= candidate.duplicate_count;
        counts.retries -= retries(candidate.attempt_count);
        Ok(())
    }

    /// Removes those of the next delivery ids that the scope covers; whether there may be more of them.
    fn delete_deliveries(
        &mut self,
        scope: &CleanupScope,
        progress: &mut CleanupProgress,
        limit: usize,
    ) -> Result<bool, Fault> {
        self.writes()?;
        let after = progress.deliveries_until.unwrap_or(Time(i64::MIN));
        let last: Option<Time> = self
            .prepare(include_str!("../cleanup_deliveries_span.sql"))?
            .query_row(params![after, scope.before, sql_limit(limit)], |row| row.get(0))
            .optional()?;
        let until = last.unwrap_or_else(|| scope.before.minus(Micros(1)));
        self.prepare(include_str!("../cleanup_deliveries.sql"))?.execute(params![
            after,
            until,
            scope.tenant,
            scope.provider
        ])?;
        progress.deliveries_until = Some(until);
        Ok(last.is_some())
    }
}

fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
