//! Cleanup: one bounded step after another, each a transaction of its own.

use sqlx::{Connection as _, Executor as _, PgConnection, Row as _, postgres::PgBindIterExt as _};

use super::{
    failure::{self, Failure},
    read::Reader,
};
use crate::{
    event::{RowId, Time},
    ledger::{
        Error,
        filter::{CleanupProgress, CleanupScope, CleanupTotals, Cursor, EARLIEST},
    },
};

/// The slot of the counts that Cleanup changes, by which the check knows how far one came. Writers' slots begin at 1.
pub(super) const CLEANUP_SLOT: i32 = 0;

impl Reader {
    pub(super) async fn cleanup_step(&self, scope: &CleanupScope, progress: &mut CleanupProgress) -> Result<(), Error> {
        let after = progress.cursor.unwrap_or(Cursor { create_time: EARLIEST, row: RowId::NONE });
        let limit = i32::try_from(scope.batch_size).unwrap_or(i32::MAX);
        let wanted = scope.clone();
        let rows = self
            .run(move |connection| {
                Box::pin(async move {
                    let rows = sqlx::query(include_str!("cleanup.sql"))
                        .bind(after.create_time)
                        .bind(after.row)
                        .bind(wanted.before)
                        .bind(wanted.states.iter().map(|state| state.as_str()).bind_iter())
                        .bind(wanted.tenant)
                        .bind(wanted.provider)
                        .bind(limit)
                        .bind(!wanted.dry_run)
                        .bind(CLEANUP_SLOT)
                        .fetch_all(&mut *connection)
                        .await?;
                    Ok(rows)
                })
            })
            .await?;
        let read = |error: sqlx::Error| self.failed(error);
        let mut looked_at = 0;
        for row in &rows {
            looked_at = row.try_get("looked_at").map_err(read)?;
            if let Some(create_time) = row.try_get::<Option<Time>, _>("last_create_time").map_err(read)? {
                progress.cursor = Some(Cursor { create_time, row: row.try_get("last_row").map_err(read)? });
            }
            if let Some(provider) = row.try_get::<Option<String>, _>("provider").map_err(read)? {
                let totals: &mut CleanupTotals = progress.providers.entry(provider).or_default();
                totals.matched += row.try_get::<i64, _>("matched").map_err(read)?;
                totals.deleted += row.try_get::<i64, _>("deleted").map_err(read)?;
                let oldest: Option<Time> = row.try_get("oldest_end_time").map_err(read)?;
                totals.oldest_end_time = match (totals.oldest_end_time, oldest) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                };
            }
        }
        // After the last event come the delivery ids, and then the counts, as many in one step: each step has its report and
        // its pause.
        let past_events = looked_at < i64::from(limit);
        progress.done = past_events && (scope.dry_run || !self.forget_deliveries(scope, progress, limit).await?);
        if progress.done && !scope.dry_run {
            let (from, before) = (progress.folded_until.unwrap_or(EARLIEST), scope.before.hour());
            let until = self.fold_hours(from, before, limit).await?;
            progress.folded_until = Some(until);
            progress.done = until >= before;
        }
        Ok(())
    }

    /// Folds the counts of some hours that a Cleanup has passed, and forgets the processing times of those that have nothing
    /// completed any more. Gives the hour to go on from. It only tidies: what this run leaves, because another Cleanup has the
    /// same counts in hand or the server has no time for them, the next one finds.
    async fn fold_hours(&self, from: Time, before: Time, limit: i32) -> Result<Time, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                let until: Option<Time> = sqlx::query_scalar(include_str!("cleanup_hours.sql"))
                    .bind(from)
                    .bind(before)
                    .bind(limit)
                    .fetch_optional(&mut *connection)
                    .await?;
                let until = until.unwrap_or(before);
                let Err(error) = fold(connection, from, until).await else { return Ok(until) };
                match failure::classify(&error) {
                    Failure::Contended => {
                        tracing::debug!(
                            error = &error as &dyn std::error::Error,
                            "counts are left for the next cleanup"
                        );
                    }
                    // Unlike what another session has in hand, this may happen again every night.
                    Failure::TooSlow => {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "counts take too long to fold, and are left for the next cleanup"
                        );
                    }
                    _ => return Err(error.into()),
                }
                Ok(until)
            })
        })
        .await
    }

    /// Removes those of the next delivery ids that the scope covers; whether there may be more of them.
    async fn forget_deliveries(
        &self,
        scope: &CleanupScope,
        progress: &mut CleanupProgress,
        limit: i32,
    ) -> Result<bool, Error> {
        let after = progress.deliveries_until.unwrap_or(EARLIEST);
        let (before, tenant, provider) = (scope.before, scope.tenant.clone(), scope.provider.clone());
        let (looked_at, until): (i64, Option<Time>) = self
            .run(move |connection| {
                Box::pin(async move {
                    let row = sqlx::query_as(include_str!("cleanup_deliveries.sql"))
                        .bind(after)
                        .bind(before)
                        .bind(tenant)
                        .bind(provider)
                        .bind(limit)
                        .fetch_one(&mut *connection)
                        .await?;
                    Ok(row)
                })
            })
            .await?;
        progress.deliveries_until = until.or(progress.deliveries_until);
        Ok(looked_at >= i64::from(limit))
    }
}

async fn fold(connection: &mut PgConnection, from: Time, until: Time) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    // While it waits for another Cleanup's step it holds rows that writers may want, so it must not wait for long.
    transaction.execute("set local lock_timeout = '100ms'").await?;
    // Nor for the disk or a standby, with rows in hand that writers want; what a crash undoes the next run folds.
    transaction.execute("select set_config('synchronous_commit', 'off', true)").await?;
    let folded = sqlx::query(include_str!("cleanup_counts.sql"))
        .bind(from)
        .bind(until)
        .bind(CLEANUP_SLOT)
        .execute(&mut *transaction)
        .await;
    if let Err(error) = folded {
        // Postgres reports an error before it releases the rows: whoever comes next would still find them locked.
        let _broken = transaction.rollback().await;
        return Err(error);
    }
    transaction.commit().await?;
    for statement in [include_str!("cleanup_zeros.sql"), include_str!("cleanup_timings.sql")] {
        sqlx::query(statement).bind(from).bind(until).execute(&mut *connection).await?;
    }
    Ok(())
}
