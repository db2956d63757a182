//! What people ask for: History, Stats, Cleanup. A small pool of its own, so that a long list never stands in the way
//! of a decision.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::future::BoxFuture;

use sqlx::{
    Executor as _, PgConnection, PgPool, Row as _,
    postgres::{PgBindIterExt as _, PgConnectOptions, PgPoolOptions},
};

use super::{
    connect::READING_SESSION,
    failure::{self, Failure},
    row,
};
use crate::{
    event::{Key, State, Time},
    ledger::{
        Error, EventHistory,
        filter::{
            CleanupProgress, CleanupScope, CleanupTotals, Counts, Cursor, HistoryFilter, Page, StatsFilter, StatsReport,
        },
    },
};

/// Connections for lists, counts, waiters and notifications. Few: they are people's and cron jobs'.
const CONNECTIONS_MAX: u32 = 6;
/// How long a call waits for one of them, the making of a connection included. Longer than the 300 ms of L6, which are for
/// decisions: these have a connection of their own, and a list that comes late is better than none.
const ACQUIRE_TIME_MAX: Duration = Duration::from_secs(2);
/// Above the server's statement time-out of these sessions: for a server that vanished without a word.
const READ_TIME_MAX: Duration = Duration::from_secs(6);
/// The slot of the counts that Cleanup changes. Writers' slots begin at 1.
const CLEANUP_SLOT: i32 = 0;

/// Before and after everything: bounds for filters that have none. The years 1970 and 9999.
pub(super) const EARLIEST: Time = Time(0);
pub(super) const LATEST: Time = Time(253_370_764_800_000_000);

#[derive(Clone)]
pub(super) struct Reader {
    pool: PgPool,
}

impl Reader {
    pub(super) fn new(options: PgConnectOptions) -> Reader {
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS_MAX)
            .acquire_timeout(ACQUIRE_TIME_MAX)
            // A ping costs a round trip on each use, and says nothing about the next moment.
            .test_before_acquire(false)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    connection.execute(READING_SESSION).await?;
                    Ok(())
                })
            })
            .connect_lazy_with(options);
        Reader { pool }
    }

    /// The pool, for the one who listens.
    pub(super) fn pool(&self) -> PgPool {
        self.pool.clone()
    }

    /// Runs a read in a task of its own, so that a caller who goes away never leaves a connection half used; bounded,
    /// because sqlx waits for ever on a server that vanished. A connection that has seen trouble is closed, not given back:
    /// sqlx would ping it, without a time-out, and keep its place in the pool meanwhile (pitfalls 3.1.3).
    pub(super) async fn run<T, F>(&self, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>> + Send + 'static,
    {
        let pool = self.pool.clone();
        let task = tokio::spawn(async move {
            let mut connection = pool.acquire().await.map_err(|error| read_error(&error))?;
            let answer = tokio::time::timeout(READ_TIME_MAX, read(&mut connection)).await;
            let error = match answer {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error,
                Err(_elapsed) => sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()),
            };
            if matches!(failure::classify(&error), Failure::Broken | Failure::Refusing | Failure::Defect) {
                connection.close_on_drop();
            }
            Err(read_error(&error))
        });
        task.await.unwrap_or_else(|_panicked| Err(Error::Internal("a read of the ledger ended early".into())))
    }

    pub(super) async fn close(&self) {
        drop(tokio::time::timeout(Duration::from_millis(500), self.pool.close()).await);
    }

    pub(super) async fn check(&self) -> Result<(), Error> {
        self.run(move |connection| {
            Box::pin(async move { sqlx::query("select 1").execute(&mut *connection).await.map(drop) })
        })
        .await
    }

    pub(super) async fn now(&self) -> Result<Time, Error> {
        self.run(move |connection| {
            Box::pin(async move { sqlx::query_scalar("select clock_timestamp()").fetch_one(&mut *connection).await })
        })
        .await
    }

    pub(super) async fn peek(&self, keys: Vec<Key>) -> Result<Vec<(Key, State, i64)>, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                let rows = sqlx::query(include_str!("peek.sql"))
                    .bind(keys.iter().map(|key| key.tenant.as_str()).bind_iter())
                    .bind(keys.iter().map(|key| key.provider.as_str()).bind_iter())
                    .bind(keys.iter().map(|key| key.event_id.as_str()).bind_iter())
                    .fetch_all(&mut *connection)
                    .await?;
                rows.iter()
                    .map(|row| {
                        let key = Key { tenant: row.try_get(0)?, provider: row.try_get(1)?, event_id: row.try_get(2)? };
                        Ok((key, row::state(row.try_get(3)?)?, row.try_get(4)?))
                    })
                    .collect()
            })
        })
        .await
    }

    pub(super) async fn history_of(&self, key: Key) -> Result<Option<EventHistory>, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                let Some(row) = sqlx::query(include_str!("history_event.sql"))
                    .bind(key.tenant)
                    .bind(key.provider)
                    .bind(key.event_id)
                    .fetch_optional(&mut *connection)
                    .await?
                else {
                    return Ok(None);
                };
                let event = row::event(&row, 0)?;
                let mut attempts = Vec::new();
                for row in sqlx::query(include_str!("history_attempts.sql"))
                    .bind(event.row)
                    .fetch_all(&mut *connection)
                    .await?
                {
                    // Granted again between the two reads: the event's row tells of its latest attempt as it was.
                    attempts.extend(row::archived(&row)?.filter(|attempt| attempt.attempt <= event.archived_count()));
                }
                attempts.extend(event.latest_attempt());
                let mut resolutions = Vec::new();
                for row in sqlx::query(include_str!("history_resolutions.sql"))
                    .bind(event.row)
                    .fetch_all(&mut *connection)
                    .await?
                {
                    resolutions.extend(row::resolution(&row)?);
                }
                Ok(Some(EventHistory { event, attempts, resolutions }))
            })
        })
        .await
    }

    pub(super) async fn history(&self, filter: HistoryFilter) -> Result<Page, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                // The end is exclusive: a place before every row that was created at it.
                let end = Cursor { create_time: filter.end_time.unwrap_or(LATEST), row: 0 };
                let after = filter.after.map_or(end, |after| after.min(end));
                let states = (!filter.states.is_empty())
                    .then(|| filter.states.iter().map(|state| state.as_str()).collect::<Vec<_>>());
                // One more than the page has: whether there is a next one.
                let limit = i64::try_from(filter.page_size).unwrap_or(i64::MAX).saturating_add(1);
                let rows = sqlx::query(include_str!("history_page.sql"))
                    .bind(after.create_time)
                    .bind(after.row)
                    .bind(filter.start_time.unwrap_or(EARLIEST))
                    .bind(filter.tenant)
                    .bind(filter.provider)
                    .bind(filter.event_type)
                    .bind(states)
                    .bind(limit)
                    .fetch_all(&mut *connection)
                    .await?;
                let mut events = rows.iter().map(|row| row::event(row, 0)).collect::<Result<Vec<_>, _>>()?;
                let more = events.len() > filter.page_size;
                events.truncate(filter.page_size);
                let next = events.last().filter(|_| more).map(Cursor::of);
                Ok(Page { events, next })
            })
        })
        .await
    }

    pub(super) async fn cleanup_step(&self, scope: &CleanupScope, progress: &mut CleanupProgress) -> Result<(), Error> {
        let after = progress.cursor.unwrap_or(Cursor { create_time: EARLIEST, row: 0 });
        let limit = i32::try_from(scope.batch_size).unwrap_or(i32::MAX);
        let wanted = scope.clone();
        let rows = self
            .run(move |connection| {
                Box::pin(async move {
                    sqlx::query(include_str!("cleanup.sql"))
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
                        .await
                })
            })
            .await?;
        let read = |error: sqlx::Error| read_error(&error);
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
        progress.done = looked_at < i64::from(limit);
        if progress.done && !scope.dry_run {
            self.forget_deliveries(scope, limit).await?;
            self.fold_counts(scope.before).await?;
        }
        Ok(())
    }

    /// Folds the counts of what a Cleanup has passed.
    async fn fold_counts(&self, before: Time) -> Result<(), Error> {
        self.run(move |connection| {
            Box::pin(async move {
                sqlx::query(include_str!("cleanup_counts.sql"))
                    .bind(before.hour())
                    .bind(CLEANUP_SLOT)
                    .execute(&mut *connection)
                    .await
                    .map(drop)
            })
        })
        .await
    }

    /// Removes delivery ids older than what the scope deletes, in batches.
    async fn forget_deliveries(&self, scope: &CleanupScope, limit: i32) -> Result<(), Error> {
        loop {
            let (before, tenant, provider) = (scope.before, scope.tenant.clone(), scope.provider.clone());
            let removed = self
                .run(move |connection| {
                    Box::pin(async move {
                        sqlx::query(include_str!("cleanup_deliveries.sql"))
                            .bind(before)
                            .bind(tenant)
                            .bind(provider)
                            .bind(limit)
                            .execute(&mut *connection)
                            .await
                    })
                })
                .await?
                .rows_affected();
            if removed < u64::from(limit.unsigned_abs()) {
                return Ok(());
            }
        }
    }
}

/// What a failed read means to its caller. Nothing was changed by it; a Cleanup step that was cut off may have been
/// applied, and the next run finds what it left.
fn read_error(error: &sqlx::Error) -> Error {
    match failure::classify(error) {
        Failure::Broken | Failure::Refusing | Failure::TooSlow | Failure::Contended => {
            tracing::warn!(error = error as &dyn std::error::Error, "the ledger could not be read");
            Error::Unavailable { retry_after: Duration::from_secs(1) }
        }
        Failure::BadItem | Failure::Defect => {
            tracing::error!(error = error as &dyn std::error::Error, "a read of the ledger failed");
            Error::Internal("a read of the ledger failed".into())
        }
    }
}
