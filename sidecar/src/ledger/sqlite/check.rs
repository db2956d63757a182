//! The check of what Stats answers from: a connection of its own that only reads, beside a running service.

use std::{collections::BTreeMap, path::Path, time::Duration};

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row};

use super::{OpenError, canonical, migrate};
use crate::{
    event::{Micros, State, Time},
    ledger::{
        check::{self, Provider, Report, SHARES, Snapshot},
        filter::Counts,
        place::Place,
        timings::Timings,
    },
};

const BUSY_TIME_MAX: Duration = Duration::from_secs(5);

/// Checks the counts and percentiles of a file, beside a running service. Blocks for as long as reading all of it takes.
///
/// # Errors
/// When the file cannot be read or its schema does not fit.
pub fn check(path: &Path) -> Result<Report, OpenError> {
    let path = canonical(path);
    let open = |source| OpenError::Open { path: path.clone(), source };
    // Not the read-only flag: a reader of a write-ahead log has its part in the log's index.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(&path, flags).map_err(open)?;
    conn.busy_timeout(BUSY_TIME_MAX).map_err(open)?;
    conn.pragma_update(None, "query_only", true).map_err(open)?;
    let found = migrate::version(&conn, &path)?;
    migrate::fits(&conn, &path, found)?;
    run(&conn).map_err(open)
}

fn run(conn: &Connection) -> rusqlite::Result<Report> {
    // One snapshot for all.
    let snapshot = conn.unchecked_transaction()?;
    let mut found = Snapshot {
        kept: counted(&snapshot, include_str!("check_counts.sql"))?,
        recounted: counted(&snapshot, include_str!("check_rows.sql"))?,
        passed_until: Some(noted(&snapshot, "times_passed_until")?),
        ..Snapshot::default()
    };
    let since = noted(&snapshot, "times_since")?;
    let mut times: BTreeMap<Provider, Vec<i64>> = BTreeMap::new();
    let mut statement = snapshot.prepare(include_str!("check_times.sql"))?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (of, hour, end_time): (_, Time, Time) = (provider(row)?, row.get(3)?, row.get(4)?);
        let place = Place { tenant: of.tenant.clone(), provider: of.name.clone(), hour };
        let completions = found.completions.entry(place).or_default();
        completions.all += 1;
        completions.latest += row.get::<_, i64>(5)?;
        // Written with the event, so that none may be missing (L5), but for those from before there were histograms.
        if end_time < since {
            *found.missing_max.entry(of.clone()).or_default() += 1;
        }
        if !found.is_passed(hour) {
            times.entry(of).or_default().push(row.get(2)?);
        }
    }
    let mut statement =
        snapshot.prepare("select tenant, provider, hour, bucket, count from payment_webhook_timings")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let of = provider(row)?;
        found
            .add_times(Place { tenant: of.tenant, provider: of.name, hour: row.get(2)? }, [(row.get(3)?, row.get(4)?)]);
    }
    let mut report = check::counts(&found);
    check::times(&mut report, &found);
    for of in found.timings.keys() {
        times.entry(of.clone()).or_default();
    }
    for (of, times) in times {
        let none = Timings::default();
        let timings = found.timings.get(&of).unwrap_or(&none);
        let completions = i64::try_from(times.len()).unwrap_or(i64::MAX);
        let at = |rank: i64| {
            let place = usize::try_from(rank - 1).unwrap_or_default();
            Micros(times.get(place).copied().unwrap_or_default())
        };
        let exact = SHARES.map(|share| {
            let (low, high) = check::ranks(share, completions, i64::try_from(timings.count()).unwrap_or(i64::MAX));
            (at(low), at(high))
        });
        check::percentiles(&mut report, &of, timings, completions, &exact);
    }
    let mut statement = snapshot.prepare(include_str!("check_days.sql"))?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        report.differences.push(check::day(provider(row)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?));
    }
    Ok(report)
}

/// A time that is noted about the histograms; the end of time where this version has not yet opened the file to write to it.
fn noted(conn: &Connection, key: &str) -> rusqlite::Result<Time> {
    let query = "select cast(value as integer) from oncegate_meta where key = ?1";
    let noted = conn.query_row(query, [key], |row| row.get(0)).optional()?;
    Ok(noted.unwrap_or(Time(i64::MAX)))
}

fn counted(conn: &Connection, sql: &str) -> rusqlite::Result<BTreeMap<Place, Counts>> {
    conn.prepare(sql)?.query_map([], place)?.collect()
}

fn provider(row: &Row<'_>) -> rusqlite::Result<Provider> {
    Ok(Provider { tenant: row.get(0)?, name: row.get(1)? })
}

fn place(row: &Row<'_>) -> rusqlite::Result<(Place, Counts)> {
    let mut counts = Counts { duplicates: row.get(9)?, retries: row.get(10)?, ..Counts::default() };
    for (column, state) in (3..).zip(State::ALL) {
        counts[state] = row.get(column)?;
    }
    Ok((Place { tenant: row.get(0)?, provider: row.get(1)?, hour: row.get(2)? }, counts))
}
