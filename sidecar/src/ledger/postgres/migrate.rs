//! Migrations of the Postgres schema: applied by `oncegate migrate`, or at start when told to; otherwise a schema that
//! does not fit is a refusal to start (L8). A newer schema fits if its migrations say so: they write the number of the
//! oldest migration that a program has to know into `oncegate_meta`.

use std::{cmp::Ordering, time::Duration};

use sqlx::{
    ConnectOptions as _, Connection as _, Executor as _, PgConnection, SqlSafeStr as _,
    migrate::{Migrate as _, MigrateError, Migration, MigrationType, Migrator},
    postgres::PgConnectOptions,
};

use super::{
    OpenError,
    connect::{CONNECT_TIME_MAX, ConnectError},
    failure::{self, Failure},
};

/// Every migration, oldest first. Never edited after a release; numbers never reused.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "events", include_str!("../../../../migrations/postgres/0001_events.sql")),
    (2, "stats", include_str!("../../../../migrations/postgres/0002_stats.sql")),
    (3, "compatible from", include_str!("../../../../migrations/postgres/0003_compatible_from.sql")),
    (4, "replays", include_str!("../../../../migrations/postgres/0004_replays.sql")),
    (5, "timing days", include_str!("../../../../migrations/postgres/0005_timing_days.sql")),
    (6, "key order", include_str!("../../../../migrations/postgres/0006_key_order.sql")),
    (7, "attempts", include_str!("../../../../migrations/postgres/0007_attempts.sql")),
    (8, "tenants", include_str!("../../../../migrations/postgres/0008_tenants.sql")),
];

/// Why a schema does not fit.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// It is older than this version needs.
    #[error(
        "the database's schema is at version {found} and this version of oncegate needs {needed}: run `oncegate migrate`"
    )]
    Behind {
        /// The newest migration that was applied; 0: none.
        found: i64,
        /// The newest migration of this version.
        needed: i64,
    },
    /// It is newer than this version can work on.
    #[error(
        "the database's schema is at version {found}, which programs that know version {compatible_from} can work on; this \
         version of oncegate knows {known}: run a newer one"
    )]
    Ahead {
        /// The newest migration that was applied.
        found: i64,
        /// The newest migration of this version.
        known: i64,
        /// The oldest migration that a program has to know.
        compatible_from: i64,
    },
    /// A migration failed half-way or was changed after it had been applied.
    #[error("a migration failed, or differs from the one that was applied")]
    Migrate(#[source] MigrateError),
    /// A migration failed half-way, which Postgres rolls back: somebody has changed the table by hand.
    #[error("migration {0} is on record in {TABLE} as begun and not done")]
    Dirty(i64),
    /// The database keeps text in an encoding that lacks some characters, and would refuse what is to be recorded.
    #[error("the database's encoding is {0}, and has to be UTF8: create one with `encoding 'UTF8' template template0`")]
    Encoding(String),
    /// The state of the schema could not be read.
    #[error("the state of the schema could not be read")]
    Read(#[source] sqlx::Error),
}

/// What a migration run did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// The version before; 0: an empty database.
    pub from: i64,
    /// The version after.
    pub to: i64,
}

fn needed() -> i64 {
    MIGRATIONS.last().map_or(0, |(version, ..)| *version)
}

fn migrator() -> Migrator {
    let mut migrator = Migrator::with_migrations(
        MIGRATIONS
            .iter()
            .map(|(version, description, sql)| {
                Migration::new(*version, (*description).into(), MigrationType::Simple, (*sql).into_sql_str(), false)
            })
            .collect(),
    );
    migrator.dangerous_set_table_name(TABLE);
    // Migrations of a newer version are judged by what they say (`fits`), and not refused for being unknown.
    migrator.set_ignore_missing(true);
    migrator
}

/// The table of applied migrations: named after us, for the database may be the application's own.
const TABLE: &str = "oncegate_migrations";

/// Where migrations say, in `oncegate_meta`, which one a program has to know.
const COMPATIBLE_FROM: &str = "schema_compatible_from";

/// Applies what is missing; on a newer schema that fits, nothing. Safe when several do it at once: a session lock lets one do
/// it, and the others find what it did. Waits for whoever holds a table, and lets those who queue behind it go on meanwhile;
/// dropping the future ends that.
///
/// # Errors
/// When the database cannot be reached, its schema is newer and does not fit, or a migration fails; a failed one is rolled
/// back.
pub async fn run(url: &str) -> Result<Migrated, OpenError> {
    let mut connection = connect(&super::options(url)?).await?;
    let migrated = loop {
        match apply(&mut connection).await {
            Err(error) if is_locked(&error) => {
                tracing::warn!("a migration waits for a lock that somebody else holds, and is tried again");
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            applied => break applied?,
        }
    };
    drop(connection.close().await);
    Ok(migrated)
}

async fn apply(connection: &mut PgConnection) -> Result<Migrated, SchemaError> {
    // Before anything is read, so that whoever waited finds what was done. A lock of the session, held until its end.
    connection.lock().await.map_err(SchemaError::Migrate)?;
    keeps_all_text(connection).await?;
    let from = version(connection).await?;
    if from > needed() {
        fits(connection, from).await?;
    }
    migrator().run_direct(None, connection, false).await.map_err(SchemaError::Migrate)?;
    Ok(Migrated { from, to: version(connection).await? })
}

/// Whether somebody else holds what a migration needs.
fn is_locked(error: &SchemaError) -> bool {
    let (SchemaError::Read(error)
    | SchemaError::Migrate(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _))) = error
    else {
        return false;
    };
    failure::classify(error) == Failure::Contended
}

/// Checks that this version can work on the schema.
pub(super) async fn check(options: &PgConnectOptions) -> Result<(), OpenError> {
    let mut connection = connect(options).await?;
    keeps_all_text(&mut connection).await?;
    let found = version(&mut connection).await?;
    fits(&mut connection, found).await?;
    drop(connection.close().await);
    Ok(())
}

async fn fits(connection: &mut PgConnection, found: i64) -> Result<(), SchemaError> {
    let known = needed();
    match found.cmp(&known) {
        Ordering::Less => Err(SchemaError::Behind { found, needed: known }),
        Ordering::Equal => Ok(()),
        Ordering::Greater => {
            let said: Option<String> = sqlx::query_scalar("select value from oncegate_meta where key = $1")
                .bind(COMPATIBLE_FROM)
                .fetch_optional(connection)
                .await
                .map_err(SchemaError::Read)?;
            // A migration that does not say counts as one that says no.
            let compatible_from = said.and_then(|said| said.parse().ok()).unwrap_or(found);
            if compatible_from > known {
                return Err(SchemaError::Ahead { found, known, compatible_from });
            }
            tracing::info!(found, known, "the schema is newer than this version, which it says it fits");
            Ok(())
        }
    }
}

/// Migrations take as long as they take, whatever the role or the database is set to. They do not wait for a table for so long
/// that those who queue behind them time out, as they would behind a dump that runs for an hour.
const SESSION: &str = "
    set statement_timeout = 0;
    set idle_in_transaction_session_timeout = 0;
    set lock_timeout = '300ms';
";
/// Between two tries to get a lock: those who waited behind the first have their turn.
const LOCK_PAUSE: Duration = Duration::from_secs(1);

async fn connect(options: &PgConnectOptions) -> Result<PgConnection, ConnectError> {
    let connected = async {
        // They are slow for good reason, and their text is in the repository.
        let options = options.clone().disable_statement_logging();
        let mut connection = PgConnection::connect_with(&options).await?;
        connection.execute(SESSION).await?;
        Ok(connection)
    };
    tokio::time::timeout(CONNECT_TIME_MAX, connected)
        .await
        .map_err(|_| ConnectError::TimedOut)?
        .map_err(ConnectError::Refused)
}

/// What an error means that came of reading the table of migrations, while none was being applied.
fn unread(error: MigrateError) -> SchemaError {
    match error {
        MigrateError::Execute(error) => SchemaError::Read(error),
        error => SchemaError::Migrate(error),
    }
}

/// Refuses a database that cannot keep all text: the completion of an effect that has happened would be refused for a single
/// word in it. SQL_ASCII keeps bytes as they come.
async fn keeps_all_text(connection: &mut PgConnection) -> Result<(), SchemaError> {
    let encoding: String = sqlx::query_scalar("select current_setting('server_encoding')")
        .fetch_one(connection)
        .await
        .map_err(SchemaError::Read)?;
    if matches!(&*encoding, "UTF8" | "SQL_ASCII") { Ok(()) } else { Err(SchemaError::Encoding(encoding)) }
}

/// The newest migration that was applied; 0: none.
async fn version(connection: &mut PgConnection) -> Result<i64, SchemaError> {
    let exists: bool = sqlx::query_scalar("select to_regclass($1) is not null")
        .bind(TABLE)
        .fetch_one(&mut *connection)
        .await
        .map_err(SchemaError::Read)?;
    if !exists {
        return Ok(0);
    }
    if let Some(version) = connection.dirty_version(TABLE).await.map_err(unread)? {
        return Err(SchemaError::Dirty(version));
    }
    let applied = connection.list_applied_migrations(TABLE).await.map_err(unread)?;
    Ok(applied.iter().map(|migration| migration.version).max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_says_who_can_work_on_what_it_makes() {
        for (version, name, sql) in MIGRATIONS.iter().filter(|(version, ..)| *version >= 3) {
            assert!(sql.contains(COMPATIBLE_FROM), "{version} {name}");
        }
    }
}
