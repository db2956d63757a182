//! Connections: session settings, the checks that a node must pass before it may decide anything, and its identity.

use std::{sync::Arc, time::Duration};

use crate::ledger::durability::{Durability, PostgresSays};
use sqlx::{Connection as _, Executor as _, PgConnection, Row as _, postgres::PgConnectOptions};

/// How long a connection may take, from the first packet to the last check.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_millis(1_000);
/// How long the service waits for the answer of one statement. The server gives up after its own statement time-out (1 s);
/// this is for a server that has vanished without a word.
pub(super) const STATEMENT_TIME_MAX: Duration = Duration::from_millis(1_500);

/// Settings of every session.
///
/// The planner's: a table that was never analyzed, or was analyzed in a quiet moment, must not lead a prepared statement to a
/// plan that reads whole tables. Every statement of this folder is meant to walk an index in a nested loop, for any number of
/// items: a plan made for a few would be made anew each time, should it look cheaper than the one for all. Free pages and
/// costly rows serve the same purpose: where statistics tell of a handful of rows, left by a Cleanup or by a first analysis,
/// reading all of the primary key looked as cheap as finding each in it. The time-outs are the server's own, because dropping a
/// query does not cancel it (L6).
const SESSION: &str = "
    set default_transaction_isolation = 'read committed';
    set enable_seqscan = off;
    set enable_hashjoin = off;
    set enable_mergejoin = off;
    set enable_bitmapscan = off;
    set seq_page_cost = 0;
    set random_page_cost = 0;
    set cpu_tuple_cost = 1;
    set jit = off;
    set plan_cache_mode = force_generic_plan;
    set statement_timeout = '1s';
    set lock_timeout = '500ms';
    set idle_in_transaction_session_timeout = '5s';
    set timezone = 'UTC';
";

/// Settings of a session that reads lists and counts: more time. The same plans are ruled out: statistics of an empty table
/// made it read a third of a million index entries for a page of fifty. Its costs stay as they are. Each statement is planned
/// anew, for these are few and read much: the plan that a small table had left looked 90,000 open events up in a list, one by
/// one. Only a Cleanup step waits for a lock here: for counts that another Cleanup is changing, until that step has ended,
/// which takes a while on a busy machine.
pub(super) const READING_SESSION: &str = "
    set default_transaction_isolation = 'read committed';
    set enable_seqscan = off;
    set enable_hashjoin = off;
    set enable_mergejoin = off;
    set enable_bitmapscan = off;
    set jit = off;
    set plan_cache_mode = force_custom_plan;
    set statement_timeout = '5s';
    set lock_timeout = '4s';
    set idle_in_transaction_session_timeout = '5s';
    set timezone = 'UTC';
";

/// Whether the node refuses writes: a standby, or told to.
pub(super) const READ_ONLY: &str = "select current_setting('transaction_read_only')::boolean";

/// How long a statement of a session that writes waits for a row, as [`SESSION`] sets it.
pub(super) const LOCK_TIMEOUT: &str = "500ms";

/// Why a node may not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It did not answer in time.
    #[error("the database did not answer within {} ms", CONNECT_TIME_MAX.as_millis())]
    TimedOut,
    /// It answered with an error.
    #[error("the database refused the connection")]
    Refused(#[source] sqlx::Error),
    /// It is a standby, or read-only: it cannot decide (PG6).
    #[error("the database node is read-only: a standby, or told to refuse writes")]
    ReadOnly,
    /// A commit of another session of ours waits there, and nothing ends that but the standby, the disk or an operator. A session more
    /// would wait as well, and be one more that nobody else can have.
    #[error("commits on the database wait for a standby, or for its disk")]
    CommitsWait,
}

/// What a node is, read on every connection of the writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// System identifier, timeline, database and the server's start: another one after a restore (also of a snapshot of
    /// the disk, which keeps all but the last), after a promotion, and in a copy.
    pub identity: String,
    /// What an acknowledged commit survives, as the node is set.
    pub durability: Durability,
    /// What cached values are authenticated with.
    pub(super) cache_key: CacheKey,
}

/// A secret that `Debug` does not show.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct CacheKey(pub(super) Arc<[u8]>);

impl std::fmt::Debug for CacheKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CacheKey(***)")
    }
}

/// Opens a connection that writes, under a name that the server shows, with a slot of its kind. Not cancel-safe in what it leaves
/// on the server, so it runs in the task that writes.
pub(super) async fn writing(
    options: &PgConnectOptions,
    name: &str,
    slots: Slots,
) -> Result<(PgConnection, Node, i32), ConnectError> {
    tokio::time::timeout(CONNECT_TIME_MAX, async {
        let mut connection = PgConnection::connect_with(&options.clone().application_name(name)).await?;
        connection.execute(SESSION).await?;
        let row = sqlx::query(include_str!("node.sql")).fetch_one(&mut connection).await?;
        if row.try_get::<bool, _>("read_only")? {
            return Ok(Err(ConnectError::ReadOnly));
        }
        if row.try_get::<bool, _>("commits_wait")? {
            return Ok(Err(ConnectError::CommitsWait));
        }
        let says = PostgresSays {
            synchronous_commit: row.try_get("synchronous_commit")?,
            fsync: row.try_get("fsync")?,
            full_page_writes: row.try_get("full_page_writes")?,
            synchronous_standby_names: row.try_get("synchronous_standby_names")?,
            standbys: row.try_get::<bool, _>("sees_standbys")?.then(|| row.try_get("standbys")).transpose()?,
            synchronous_standby: row.try_get("synchronous_standby")?,
        };
        let node = Node {
            identity: format!(
                "{}:{}:{}:{}",
                row.try_get::<&str, _>("system_identifier")?,
                row.try_get::<&str, _>("timeline")?,
                row.try_get::<&str, _>("database")?,
                row.try_get::<i64, _>("started")?
            ),
            durability: Durability::of_postgres(&says),
            cache_key: CacheKey(row.try_get::<&str, _>("cache_key")?.as_bytes().into()),
        };
        // An acknowledged completion must be durable, whatever the database's default is (L4), and whatever that becomes while the
        // session lasts: it follows a reload, unless it has set the value itself.
        let commit = if says.is_raised() { "on" } else { &says.synchronous_commit };
        sqlx::query("select set_config('synchronous_commit', $1, false)").bind(commit).execute(&mut connection).await?;
        advance_token(&mut connection, &node.identity).await?;
        let slot = slots.take(&mut connection).await?;
        Ok(Ok((connection, node, slot)))
    })
    .await
    .map_err(|_| ConnectError::TimedOut)?
    .map_err(ConnectError::Refused)?
}

/// Moves the token to at least now, if the database has another identity than the one it was last checked against (S2).
async fn advance_token(connection: &mut PgConnection, identity: &str) -> Result<(), sqlx::Error> {
    let moved = sqlx::query(include_str!("advance_token.sql")).bind(identity).fetch_optional(&mut *connection).await?;
    if moved.is_some() {
        tracing::info!(identity, "the database has started anew; fencing tokens continue from the present time");
    }
    Ok(())
}

/// Slots for counts: each session that writes has its own, so that no two write the same row (L5). A slot is a session-level
/// advisory lock: it is free again when the connection ends. Two on one slot (behind a transaction pooler, say) would be
/// slower, not wrong.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    /// The namespace of their locks.
    class: i32,
    /// The lowest.
    first: i32,
}

impl Slots {
    /// Those of the writers, one per sidecar, so that counting the locks of this class counts sidecars. It is "once" as a
    /// number.
    pub(super) const WRITERS: Slots = Slots { class: 0x6f6e_6365, first: 1 };
    /// Those of the connections that write each second's counts.
    pub(super) const COUNTS: Slots = Slots { class: 0x6f6e_6366, first: 101 };
    /// Slots of each kind.
    const COUNT: i32 = 64;

    /// The class of the locks, as `pg_locks` has it.
    pub(super) fn class(self) -> i32 {
        self.class
    }

    /// Takes the first that is free, or else one that is shared.
    async fn take(self, connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
        let slot: Option<i32> = sqlx::query_scalar(include_str!("take_slot.sql"))
            .bind(self.class)
            .bind(self.first)
            .bind(self.first + Self::COUNT - 1)
            .fetch_optional(&mut *connection)
            .await?;
        Ok(slot.unwrap_or(self.first + Self::COUNT))
    }
}
