//! Migrations of the Postgres schema: applied by `oncegate migrate`, or at start when told to; otherwise a schema that
//! does not fit is a refusal to start (L8).

use sqlx::{
    Connection as _, PgConnection, SqlSafeStr as _,
    migrate::{Migrate as _, MigrateError, Migration, MigrationType, Migrator},
    postgres::PgConnectOptions,
};

use super::{
    OpenError,
    connect::{CONNECT_TIME_MAX, ConnectError},
};

/// Every migration, oldest first. Never edited after a release; numbers never reused.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "events", include_str!("../../../../migrations/postgres/0001_events.sql")),
    (2, "stats", include_str!("../../../../migrations/postgres/0002_stats.sql")),
    (3, "replays", include_str!("../../../../migrations/postgres/0003_replays.sql")),
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
    /// It is newer than this version knows.
    #[error("the database's schema is at version {found}, newer than the {known} that this version of oncegate knows")]
    Ahead {
        /// The newest migration that was applied.
        found: i64,
        /// The newest migration of this version.
        known: i64,
    },
    /// A migration failed half-way or was changed after it had been applied.
    #[error("a migration failed, or differs from the one that was applied")]
    Migrate(#[source] MigrateError),
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
    migrator
}

/// The table of applied migrations: named after us, for the database may be the application's own.
const TABLE: &str = "oncegate_migrations";

/// Applies what is missing. Safe when several do it at once: a session lock lets one do it.
///
/// # Errors
/// When the database cannot be reached or a migration fails; a failed one is rolled back.
pub async fn run(url: &str) -> Result<Migrated, OpenError> {
    let mut connection = connect(&super::options(url)?).await?;
    let from = version(&mut connection).await?;
    migrator().run_direct(None, &mut connection, false).await.map_err(SchemaError::Migrate)?;
    let to = version(&mut connection).await?;
    drop(connection.close().await);
    Ok(Migrated { from, to })
}

/// Checks that the schema is the one that this version needs.
pub(super) async fn check(options: &PgConnectOptions) -> Result<(), OpenError> {
    let mut connection = connect(options).await?;
    let (found, needed) = (version(&mut connection).await?, needed());
    drop(connection.close().await);
    match found.cmp(&needed) {
        std::cmp::Ordering::Less => Err(SchemaError::Behind { found, needed }.into()),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(SchemaError::Ahead { found, known: needed }.into()),
    }
}

/// A plain session: migrations take as long as they take.
async fn connect(options: &PgConnectOptions) -> Result<PgConnection, ConnectError> {
    tokio::time::timeout(CONNECT_TIME_MAX, PgConnection::connect_with(options))
        .await
        .map_err(|_| ConnectError::TimedOut)?
        .map_err(ConnectError::Refused)
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
    if let Some(version) = connection.dirty_version(TABLE).await.map_err(SchemaError::Migrate)? {
        return Err(SchemaError::Migrate(MigrateError::Dirty(version)));
    }
    let applied = connection.list_applied_migrations(TABLE).await.map_err(SchemaError::Migrate)?;
    Ok(applied.iter().map(|migration| migration.version).max().unwrap_or(0))
}
