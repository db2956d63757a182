//! The check of what Stats answers from, over a connection of its own: it reads every event, with the planner and the
//! time that this takes.

use std::collections::BTreeMap;

use sqlx::{ConnectOptions as _, Connection as _, PgConnection, Row as _, postgres::PgRow};

use super::{OpenError, cleanup::CLEANUP_SLOT, connect::ConnectError, migrate, options};
use crate::{
    event::{Micros, State},
    ledger::{
        check::{self, Completions, Provider, Report, SHARES, Snapshot},
        filter::Counts,
        place::Place,
        timings::Timings,
    },
};

/// Settings of the session. Sorting millions of times takes memory or files.
const SESSION: &str = "
    set timezone = 'UTC';
    set statement_timeout = 0;
    set work_mem = '256MB';
";

/// Checks the counts and percentiles of a database, beside a running service.
///
/// # Errors
/// When the database cannot be reached, its schema does not fit, or reading fails.
pub async fn check(url: &str) -> Result<Report, OpenError> {
    // Its statements take long, and need no line in the log for that.
    let options = options(url)?.disable_statement_logging();
    migrate::check(&options).await?;
    let refused = |error| OpenError::Connect(ConnectError::Refused(error));
    let mut connection = PgConnection::connect_with(&options).await.map_err(refused)?;
    let report = run(&mut connection).await.map_err(refused)?;
    drop(connection.close().await);
    Ok(report)
}

async fn run(connection: &mut PgConnection) -> Result<Report, sqlx::Error> {
    sqlx::raw_sql(SESSION).execute(&mut *connection).await?;
    // Not read only: the times are sorted into a table of the session.
    let mut snapshot = connection.begin_with("begin isolation level repeatable read").await?;
    let mut found = Snapshot::default();
    for row in sqlx::query(include_str!("check_counts.sql")).fetch_all(&mut *snapshot).await? {
        let (place, counts) = counted(&row)?;
        found.kept.insert(place, counts);
    }
    for row in sqlx::query(include_str!("check_rows.sql")).fetch_all(&mut *snapshot).await? {
        let (place, counts) = counted(&row)?;
        found.recounted.insert(place, counts);
    }
    found.passed_until = sqlx::query_scalar("select max(hour) from payment_webhook_counts where slot = $1")
        .bind(CLEANUP_SLOT)
        .fetch_one(&mut *snapshot)
        .await?;
    sqlx::raw_sql(include_str!("check_completions.sql")).execute(&mut *snapshot).await?;
    sqlx::raw_sql("create index on oncegate_check (tenant, provider, compared, rank)").execute(&mut *snapshot).await?;
    for row in sqlx::query(
        "select tenant, provider, hour, count(*) as all, count(*) filter (where latest) as latest
        from oncegate_check group by 1, 2, 3",
    )
    .fetch_all(&mut *snapshot)
    .await?
    {
        let completions = Completions { all: row.try_get("all")?, latest: row.try_get("latest")?, times: 0 };
        found.completions.insert(place(&row)?, completions);
    }
    for row in sqlx::query("select tenant, provider, hour, buckets, counts from payment_webhook_timings")
        .fetch_all(&mut *snapshot)
        .await?
    {
        let (buckets, counts): (Vec<i16>, Vec<i64>) = (row.try_get("buckets")?, row.try_get("counts")?);
        found.add_times(place(&row)?, buckets.into_iter().zip(counts));
    }
    for row in sqlx::query(include_str!("check_missing_max.sql")).fetch_all(&mut *snapshot).await? {
        found.missing_max.insert(provider(&row)?, row.try_get("missing_max")?);
    }
    let mut report = check::counts(&found);
    check::times(&mut report, &found);
    let mut completions: BTreeMap<Provider, i64> = found.timings.keys().map(|of| (of.clone(), 0)).collect();
    for row in sqlx::query("select tenant, provider, count(*) from oncegate_check where compared group by 1, 2")
        .fetch_all(&mut *snapshot)
        .await?
    {
        completions.insert(provider(&row)?, row.try_get(2)?);
    }
    for (of, completions) in completions {
        let none = Timings::default();
        let timings = found.timings.get(&of).unwrap_or(&none);
        let times = i64::try_from(timings.count()).unwrap_or(i64::MAX);
        let mut exact = [(Micros::ZERO, Micros::ZERO); SHARES.len()];
        for ((lowest, highest), share) in exact.iter_mut().zip(SHARES) {
            let (first, last) = check::ranks(share, completions, times);
            for (time, rank) in [(lowest, first), (highest, last)] {
                let micros: Option<i64> = sqlx::query_scalar(
                    "select micros from oncegate_check where tenant = $1 and provider = $2 and compared and rank = $3",
                )
                .bind(&of.tenant)
                .bind(&of.name)
                .bind(rank)
                .fetch_optional(&mut *snapshot)
                .await?;
                *time = Micros(micros.unwrap_or_default());
            }
        }
        check::percentiles(&mut report, &of, timings, completions, &exact);
    }
    for row in sqlx::query(include_str!("check_days.sql")).fetch_all(&mut *snapshot).await? {
        report.differences.push(check::day(
            provider(&row)?,
            row.try_get(2)?,
            row.try_get(3)?,
            row.try_get(4)?,
            row.try_get(5)?,
        ));
    }
    snapshot.rollback().await?;
    Ok(report)
}

fn provider(row: &PgRow) -> Result<Provider, sqlx::Error> {
    Ok(Provider { tenant: row.try_get(0)?, name: row.try_get(1)? })
}

fn place(row: &PgRow) -> Result<Place, sqlx::Error> {
    Ok(Place { tenant: row.try_get("tenant")?, provider: row.try_get("provider")?, hour: row.try_get("hour")? })
}

fn counted(row: &PgRow) -> Result<(Place, Counts), sqlx::Error> {
    let mut counts =
        Counts { duplicates: row.try_get("duplicates")?, retries: row.try_get("retries")?, ..Counts::default() };
    for state in State::ALL {
        counts[state] = row.try_get(state.as_str())?;
    }
    Ok((place(row)?, counts))
}
