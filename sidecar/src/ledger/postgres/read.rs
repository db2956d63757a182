//! The connections that read: small pools apart from the writer's connection, so that a long list never stands in the way of a
//! decision, nor of what the service itself has to know.

use std::time::Duration;

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
    ledger::Error,
};

/// How long a call waits for one of them, the making of a connection included. Longer than the 300 ms of L6, which are for
/// decisions: these have a connection of their own, and a list that comes late is better than none.
const ACQUIRE_TIME_MAX: Duration = Duration::from_secs(2);
/// Above the server's statement time-out of these sessions: for a server that vanished without a word.
const READ_TIME_MAX: Duration = Duration::from_secs(6);

#[derive(Clone)]
pub(super) struct Reader {
    pool: PgPool,
}

impl Reader {
    /// A pool of so many connections, made when they are needed.
    pub(super) fn new(options: PgConnectOptions, connections_max: u32) -> Reader {
        let pool = PgPoolOptions::new()
            .max_connections(connections_max)
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
    /// sqlx would ping it, without a time-out, and keep its place in the pool meanwhile.
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

    /// Whether commits on this server wait for a standby that is not there.
    pub(super) async fn misses_standby(&self) -> Result<bool, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                sqlx::query_scalar(
                    "select not pg_is_in_recovery() and current_setting('synchronous_standby_names') <> '' and not exists (
                        select from pg_stat_replication where state = 'streaming' and sync_state in ('sync', 'quorum')
                    )",
                )
                .fetch_one(&mut *connection)
                .await
            })
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
}

/// What a failed read means to its caller. Nothing was changed by it; a Cleanup step that was cut off may have been
/// applied, and the next run finds what it left.
pub(super) fn read_error(error: &sqlx::Error) -> Error {
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
