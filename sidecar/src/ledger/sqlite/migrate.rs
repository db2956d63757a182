//! The schema of the SQLite ledger, by steps that are numbered in `PRAGMA user_version` (L8). A newer schema fits if its
//! migrations say so, as in Postgres.

use std::{cmp::Ordering, path::Path};

use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, types::FromSql};

use super::OpenError;

/// In order; never edited after a release.
const MIGRATIONS: &[&str] = &[
    include_str!("../../../../migrations/sqlite/0001_events.sql"),
    include_str!("../../../../migrations/sqlite/0002_stats.sql"),
    include_str!("../../../../migrations/sqlite/0003_compatible_from.sql"),
    include_str!("../../../../migrations/sqlite/0004_timing_days.sql"),
    include_str!("../../../../migrations/sqlite/0005_replays.sql"),
];

/// Tells a database of oncegate from another application's file.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"1gat");

/// What a migration run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// The version before; 0: an empty database.
    pub from: i64,
    /// The version after.
    pub to: i64,
}

/// The version of the schema that this build works on.
pub(super) fn needed() -> i64 {
    i64::try_from(MIGRATIONS.len()).expect("there are a few migrations")
}

/// The newest migration that was applied; 0: none. Refuses another application's file.
pub(super) fn version(conn: &Connection, path: &Path) -> Result<i64, OpenError> {
    let open = |source| OpenError::Open { path: path.to_owned(), source };
    if is_foreign(conn).map_err(open)? {
        return Err(OpenError::Foreign { path: path.to_owned() });
    }
    pragma(conn, "user_version").map_err(open)
}

/// Whether the file is another application's.
fn is_foreign(conn: &Connection) -> rusqlite::Result<bool> {
    let (found, application_id): (i64, i32) = (pragma(conn, "user_version")?, pragma(conn, "application_id")?);
    let tables: i64 = conn.query_row("select count(*) from sqlite_schema", [], |row| row.get(0))?;
    let empty = application_id == 0 && found == 0 && tables == 0;
    Ok(!empty && application_id != APPLICATION_ID)
}

/// Brings the schema up to date if `migrate` permits it, and refuses what does not fit.
pub(super) fn ensure(conn: &mut Connection, path: &Path, migrate: bool) -> Result<Migrated, OpenError> {
    let open = |source| OpenError::Open { path: path.to_owned(), source };
    // All of it or nothing; another program that has the file in hand is waited for here and not half-way.
    let transaction = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(open)?;
    let found = version(&transaction, path)?;
    if !migrate || found > needed() {
        fits(&transaction, path, found)?;
    }
    let needed = needed();
    for (number, migration) in (1..).zip(MIGRATIONS).filter(|(number, _)| *number > found) {
        transaction.execute_batch(migration).map_err(|source| OpenError::Migrate {
            path: path.to_owned(),
            number,
            source,
        })?;
    }
    if found < needed {
        transaction.pragma_update(None, "application_id", APPLICATION_ID).map_err(open)?;
        transaction.pragma_update(None, "user_version", needed).map_err(open)?;
    }
    if migrate && found <= needed {
        transaction.execute(include_str!("times_since.sql"), [found == 0]).map_err(open)?;
    }
    transaction.commit().map_err(open)?;
    Ok(Migrated { from: found, to: found.max(needed) })
}

/// Checks that this version can work on the schema, which is at `found`.
pub(super) fn fits(conn: &Connection, path: &Path, found: i64) -> Result<(), OpenError> {
    let known = needed();
    match found.cmp(&known) {
        Ordering::Less => Err(OpenError::Behind { path: path.to_owned(), found, needed: known }),
        Ordering::Equal => Ok(()),
        Ordering::Greater => {
            let query = "select value from oncegate_meta where key = 'schema_compatible_from'";
            let said = conn.query_row(query, [], |row| row.get::<_, String>(0)).optional();
            let said = said.map_err(|source| OpenError::Open { path: path.to_owned(), source })?;
            // A migration that does not say counts as one that says no.
            let compatible_from = said.and_then(|said| said.parse().ok()).unwrap_or(found);
            if compatible_from > known {
                return Err(OpenError::Ahead { path: path.to_owned(), found, known, compatible_from });
            }
            tracing::info!(found, known, "the schema is newer than this version, which it says it fits");
            Ok(())
        }
    }
}

fn pragma<T: FromSql>(conn: &Connection, name: &str) -> rusqlite::Result<T> {
    conn.pragma_query_value(None, name, |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_says_who_can_work_on_what_it_makes() {
        for (number, migration) in (1..).zip(MIGRATIONS).skip(2) {
            assert!(migration.contains("schema_compatible_from"), "{number}");
        }
    }
}
