//! The connections that read: small pools apart from the writer's connection, so that a long list never stands in the way of a
//! decision, nor of what the service itself has to know.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use oncegate_runtime::throttle::Throttle;
use sqlx::{
    Executor as _, PgConnection, PgPool, Postgres, Row as _,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use super::{
    bind::Bind as _,
    connect::READING_SESSION,
    failure::{self, Failure},
    target::Target,
};
use crate::{
    event::{FencingToken, Key, State, Time},
    ledger::{Error, metrics::LedgerMetrics},
};

/// How long a call waits for one of them, connecting included. Longer than the 300 ms of L6, which are for decisions: these
/// have a connection of their own, and a list that comes late is better than none.
const ACQUIRE_TIME_MAX: Duration = Duration::from_secs(2);
/// Above the server's statement time-out of these sessions: for a server that vanished without a word.
const READ_TIME_MAX: Duration = Duration::from_secs(6);
/// How long a connection is used. One to a server that another has taken over from would go on answering for as long as it
/// lives.
const LIFE_MAX: Duration = Duration::from_secs(60);
/// How long a connection that is given back may keep its place before it is closed. Less than the next caller waits for it.
const RETURN_TIME_MAX: Duration = Duration::from_secs(1);

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The statement failed, or its answer could not be read.
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
    /// What was read is not of the database that the ledger stands on: a connection may outlive a failover.
    #[error("the node that was read is another one than the ledger's")]
    OtherNode,
}

impl ReadError {
    fn failure(&self) -> Failure {
        match self {
            ReadError::Sql(error) => failure::classify(error),
            // Another connection may lead to the right one.
            ReadError::OtherNode => Failure::Broken,
        }
    }
}

/// Connections that read. Clones share them.
#[derive(Clone)]
pub(super) struct Reader {
    pool: PgPool,
    target: Target,
    /// What the pool makes connections with.
    known: Arc<Mutex<Arc<PgConnectOptions>>>,
    metrics: Arc<LedgerMetrics>,
    failures: Arc<Throttle>,
}

impl Reader {
    /// A pool of so many connections, made when they are needed.
    pub(super) fn new(target: &Target, connections_max: u32, metrics: Arc<LedgerMetrics>) -> Reader {
        let options = target.options();
        let pool = PgPoolOptions::new()
            .max_connections(connections_max)
            .acquire_timeout(ACQUIRE_TIME_MAX)
            .max_lifetime(LIFE_MAX)
            // A ping costs a round trip on each use, and says nothing about the next moment.
            .test_before_acquire(false)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    connection.execute(READING_SESSION).await?;
                    Ok(())
                })
            })
            .connect_lazy_with((*options).clone());
        let known = Arc::new(Mutex::new(options));
        Reader { pool, target: target.clone(), known, metrics, failures: Arc::default() }
    }

    /// A pool of one connection more, to the same database.
    pub(super) fn another(&self) -> Reader {
        Reader::new(&self.target, 1, self.metrics.clone())
    }

    /// Has new connections made with what the target tells by now.
    fn follow_target(&self) {
        let options = self.target.options();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&known, &options) {
            self.pool.set_connect_options((*options).clone());
            *known = options;
        }
    }

    /// The pool, for the one who listens.
    pub(super) fn pool(&self) -> PgPool {
        self.pool.clone()
    }

    /// Runs a read in a task of its own, so that a caller who goes away never leaves a connection half used; bounded,
    /// because sqlx waits for ever on a server that vanished. A connection that has seen trouble is closed, not given back.
    pub(super) async fn run<T, F>(&self, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, ReadError>> + Send + 'static,
    {
        self.follow_target();
        let reader = self.clone();
        let task = tokio::spawn(async move {
            let mut connection = reader.pool.acquire().await.map_err(|error| reader.failed(error))?;
            let answer = tokio::time::timeout(READ_TIME_MAX, read(&mut connection)).await;
            let error = match answer {
                Ok(Ok(value)) => {
                    give_back(connection);
                    return Ok(value);
                }
                Ok(Err(error)) => error,
                Err(_elapsed) => failure::timed_out().into(),
            };
            if error.failure().ends_connection() {
                connection.close_on_drop();
            } else {
                give_back(connection);
            }
            Err(reader.failed(error))
        });
        task.await.unwrap_or_else(|_panicked| Err(Error::Internal("a read of the ledger ended early".into())))
    }

    /// What a failed read means to its caller. Nothing was changed by it; a Cleanup step that was cut off may have been
    /// applied, and the next run finds what it left.
    pub(super) fn failed(&self, error: impl Into<ReadError>) -> Error {
        let error = error.into();
        let failure = error.failure();
        self.metrics.failed(failure.into());
        match failure {
            // What is damaged may be all: one read does not tell.
            Failure::Broken | Failure::Refusing | Failure::TooSlow | Failure::Contended | Failure::Damaged => {
                // What the service itself has to know is asked for ten times a second.
                if let Some(unreported) = self.failures.pass() {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        unreported,
                        "the ledger could not be read"
                    );
                }
                Error::unavailable()
            }
            Failure::Unreadable => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the ledger has what this version cannot read"
                );
                Error::unreadable()
            }
            Failure::BadItem | Failure::Defect => {
                tracing::error!(error = &error as &dyn std::error::Error, "a read of the ledger failed");
                Error::Internal("a read of the ledger failed".into())
            }
        }
    }

    pub(super) async fn close(&self) {
        drop(tokio::time::timeout(Duration::from_millis(500), self.pool.close()).await);
    }

    pub(super) async fn check(&self) -> Result<(), Error> {
        self.run(move |connection| {
            Box::pin(async move {
                sqlx::query("select 1").execute(&mut *connection).await?;
                Ok(())
            })
        })
        .await
    }

    /// Whether commits on this server wait for a standby that is not there.
    pub(super) async fn misses_standby(&self) -> Result<bool, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                Ok(sqlx::query_scalar(include_str!("misses_standby.sql")).fetch_one(&mut *connection).await?)
            })
        })
        .await
    }

    pub(super) async fn now(&self) -> Result<Time, Error> {
        self.run(move |connection| {
            Box::pin(
                async move { Ok(sqlx::query_scalar("select clock_timestamp()").fetch_one(&mut *connection).await?) },
            )
        })
        .await
    }

    pub(super) async fn peek(&self, keys: Vec<Key>) -> Result<Vec<(Key, State, FencingToken)>, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                let rows =
                    sqlx::query(include_str!("peek.sql")).bind_keys(keys.iter()).fetch_all(&mut *connection).await?;
                let mut found = Vec::with_capacity(rows.len());
                for row in &rows {
                    let Some(state) = State::parse(row.try_get(3)?) else { continue };
                    let key = Key { tenant: row.try_get(0)?, provider: row.try_get(1)?, event_id: row.try_get(2)? };
                    found.push((key, state, row.try_get(4)?));
                }
                Ok(found)
            })
        })
        .await
    }
}

/// Gives a connection back to its pool, as dropping it does, but not for longer than it may take: sqlx pings it first, without
/// a time-out, and if the server vanishes in that moment the connection would keep its place for as long as TCP still hopes, a
/// quarter of an hour. What is given up on is dropped, which closes the connection and frees the place. The answer does not
/// wait for it.
fn give_back(mut connection: PoolConnection<Postgres>) {
    let returned = connection.return_to_pool();
    tokio::spawn(async {
        if tokio::time::timeout(RETURN_TIME_MAX, returned).await.is_err() {
            tracing::debug!("a connection that was given back did not answer, and is closed");
        }
    });
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    const READY: &[u8] = b"Z\0\0\0\x05I";

    /// A server that lets anybody in, says of every query that it is done, and falls silent when it is pinged.
    async fn answer_queries_alone(mut stream: TcpStream) -> std::io::Result<()> {
        let length = stream.read_u32().await?;
        let mut startup = vec![0; usize::try_from(length - 4).unwrap()];
        stream.read_exact(&mut startup).await?;
        stream.write_all(&[b"R\0\0\0\x08\0\0\0\0", READY].concat()).await?;
        loop {
            let kind = stream.read_u8().await?;
            let length = stream.read_u32().await?;
            let mut message = vec![0; usize::try_from(length - 4).unwrap()];
            stream.read_exact(&mut message).await?;
            if kind == b'Q' {
                stream.write_all(&[b"C\0\0\0\x08SET\0", READY].concat()).await?;
            }
        }
    }

    #[tokio::test]
    async fn a_connection_whose_server_vanishes_while_it_is_given_back_keeps_no_one_from_reading() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = format!("postgres://oncegate:any@127.0.0.1:{port}/oncegate?sslmode=disable");
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer_queries_alone(stream));
            }
        });
        let reader = Reader::new(&Target::given(&url).unwrap(), 1, Arc::default());
        for _ in 0..2 {
            reader
                .run(|connection| {
                    Box::pin(async move {
                        connection.execute("select 1").await?;
                        Ok(())
                    })
                })
                .await
                .unwrap();
        }
    }
}
