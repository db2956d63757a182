//! Stats: counts, processing times, and what is stuck, from one snapshot.

use std::collections::{BTreeMap, BTreeSet};

use futures::TryStreamExt as _;
use sqlx::{Connection as _, PgConnection, Row as _, postgres::PgBindIterExt as _};

use super::read::Reader;
use crate::{
    event::{RowId, State, Time},
    ledger::{
        Error,
        filter::{Counts, StatsFilter, StatsReport},
        timings::Folding,
    },
};

/// How many events one sweep looks at: some tens of milliseconds' worth, four times what the writer makes in a second.
const SWEEP_MAX: i32 = 100_000;
/// How many of them it writes down as open: some tens of milliseconds' worth. Those that the sweep has not come to yet are read by
/// Stats one by one, in a third of the time that writing one down takes.
const SWEEP_OPEN_MAX: i32 = 20_000;
/// Begins what one report is read from.
const SNAPSHOT: &str = "begin isolation level repeatable read read only; set local enable_sort = off";
/// How many entries of what is open are looked at again in one statement.
const PRUNE_MAX: i32 = 2_000;
/// How many such statements follow one another while most of those entries are no longer open: twice what a sweep writes down, or
/// where events take longer than two seconds the table would grow, and Stats reads all of it.
const PRUNES_MAX: i32 = 2 * SWEEP_OPEN_MAX / PRUNE_MAX;

impl Reader {
    pub(super) async fn stats(&self, filter: StatsFilter) -> Result<StatsReport, Error> {
        let (report, missing) =
            self.run(move |connection| Box::pin(async move { Ok(snapshot(connection, &filter).await?) })).await?;
        if !missing.is_empty() {
            // So that the next one need not walk these hours. Best effort: it would notice what is missing.
            let healed = self
                .run(move |connection| {
                    Box::pin(async move {
                        sqlx::query(include_str!("open_heal.sql"))
                            .bind(missing.into_iter().bind_iter())
                            .execute(&mut *connection)
                            .await?;
                        Ok(())
                    })
                })
                .await;
            drop(healed);
        }
        Ok(report)
    }

    /// Looks at the events that have become old enough since the last time, and forgets a part of what is no longer open.
    /// Gives where to go on forgetting.
    pub(super) async fn sweep(&self, forget_after: RowId) -> Result<RowId, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                let sweep = sqlx::query(include_str!("sweep.sql")).bind(SWEEP_MAX).bind(SWEEP_OPEN_MAX);
                sweep.fetch_optional(&mut *connection).await?;
                let mut last = forget_after;
                for _ in 0..PRUNES_MAX {
                    let prune = sqlx::query(include_str!("open_prune.sql")).bind(last).bind(PRUNE_MAX);
                    let row = prune.fetch_one(&mut *connection).await?;
                    let (looked_at, removed): (i64, i64) = (row.try_get("looked_at")?, row.try_get("removed")?);
                    last = row.try_get::<Option<RowId>, _>("last_row")?.unwrap_or(last);
                    if looked_at < i64::from(PRUNE_MAX) {
                        return Ok(RowId(i64::MIN));
                    }
                    // Where most are still open, the next time is soon enough.
                    if removed < looked_at / 2 {
                        break;
                    }
                }
                Ok(last)
            })
        })
        .await
    }
}

/// The report, and the hours that had to be walked because something open was not known.
async fn snapshot(
    connection: &mut PgConnection,
    filter: &StatsFilter,
) -> Result<(StatsReport, Vec<Time>), sqlx::Error> {
    // One snapshot for all: what is open is compared with what is counted. Sorting does not pay: groups are few and have many
    // rows.
    let mut snapshot = connection.begin_with(SNAPSHOT).await?;
    let (start, end) = filter.bounds();
    let as_of: Time = sqlx::query_scalar("select clock_timestamp()").fetch_one(&mut *snapshot).await?;
    let mut counts: BTreeMap<(Time, String), Counts> = BTreeMap::new();
    let counted = sqlx::query(include_str!("stats.sql")).bind(&filter.tenant).bind(&filter.provider);
    let counted = counted.bind(start).bind(end).bind(filter.bucket.map(|bucket| bucket.0)).bind(filter.by_provider);
    let mut rows = counted.fetch(&mut *snapshot);
    let mut processing = 0;
    while let Some(row) = rows.try_next().await? {
        let mut found =
            Counts { duplicates: row.try_get("duplicates")?, retries: row.try_get("retries")?, ..Counts::default() };
        for state in State::ALL {
            found[state] = row.try_get(state.as_str())?;
        }
        processing += found[State::Processing];
        if !filter.add(&mut counts, row.try_get("bucket")?, row.try_get("provider")?, &found) {
            break;
        }
    }
    drop(rows);
    counts.retain(|_, found| *found != Counts::default());
    if filter.is_exceeded_by(&counts) {
        snapshot.commit().await?;
        return Ok((StatsReport::of(counts, as_of), Vec::new()));
    }
    let mut times = Folding::default();
    if filter.timings {
        read_timings(&mut snapshot, filter, &counts, &mut times).await?;
    }
    let (percentiles, timings) = times.end();
    // Only where something is processing can anything be stuck.
    let (stuck, missing) =
        if processing > 0 { find_stuck(&mut snapshot, filter, processing).await? } else { Default::default() };
    for (hour, provider, count) in stuck {
        counts.entry(filter.place_of(hour, provider)).or_default().stuck += count;
    }
    counts.retain(|_, found| *found != Counts::default());
    snapshot.commit().await?;
    Ok((StatsReport { counts, percentiles, timings, as_of }, missing))
}

/// What is stuck by hour of creation and provider, of so many that are processing; and the hours that had to be walked.
async fn find_stuck(
    snapshot: &mut PgConnection,
    filter: &StatsFilter,
    processing: i64,
) -> Result<(Vec<(Time, String, i64)>, Vec<Time>), sqlx::Error> {
    let (start, end) = filter.bounds();
    let mut known: BTreeMap<Time, i64> = BTreeMap::new();
    let mut stuck: Vec<(Time, String, i64)> = Vec::new();
    let open = sqlx::query(include_str!("stats_open.sql")).bind(&filter.tenant).bind(&filter.provider);
    for row in open.bind(start).bind(end).fetch_all(&mut *snapshot).await? {
        let hour: Time = row.try_get("hour")?;
        *known.entry(hour).or_default() += row.try_get::<i64, _>("processing")?;
        stuck.push((hour, row.try_get("provider")?, row.try_get("stuck")?));
    }
    if known.values().sum::<i64>() >= processing {
        return Ok((stuck, Vec::new()));
    }
    let mut missing = BTreeSet::new();
    let counted = sqlx::query(include_str!("stats_processing.sql")).bind(&filter.tenant).bind(&filter.provider);
    for row in counted.bind(start).bind(end).fetch_all(&mut *snapshot).await? {
        let hour: Time = row.try_get("hour")?;
        if known.get(&hour).copied().unwrap_or(0) < row.try_get("processing")? {
            missing.insert(hour);
        }
    }
    stuck.retain(|(hour, ..)| !missing.contains(hour));
    let walked = sqlx::query(include_str!("stats_stuck.sql")).bind(&filter.tenant).bind(&filter.provider);
    for row in walked.bind(missing.iter().copied().bind_iter()).fetch_all(&mut *snapshot).await? {
        stuck.push((row.try_get("hour")?, row.try_get("provider")?, row.try_get("stuck")?));
    }
    Ok((stuck, missing.into_iter().collect()))
}

/// In order, so that a bucket is complete when the next one begins: each hour or day, tenant and writer's slot has its row.
async fn read_timings(
    snapshot: &mut PgConnection,
    filter: &StatsFilter,
    counts: &BTreeMap<(Time, String), Counts>,
    times: &mut Folding,
) -> Result<(), sqlx::Error> {
    let (start, end) = filter.bounds();
    let (first_day, last_day) = filter.whole_days();
    for (sql, from, until) in [
        (include_str!("stats_timings.sql"), start, first_day),
        (include_str!("stats_timing_days.sql"), first_day, last_day),
        (include_str!("stats_timings.sql"), last_day, end),
    ] {
        if from >= until {
            continue;
        }
        let timed = sqlx::query(sql).bind(&filter.tenant).bind(&filter.provider).bind(from).bind(until);
        let mut rows = timed.fetch(&mut *snapshot);
        while let Some(row) = rows.try_next().await? {
            let place = filter.place_of(row.try_get(0)?, row.try_get(1)?);
            times.close_before(place.0);
            // Times may outlive what is counted, and are then nobody's.
            if times.len() >= filter.counts_max && !counts.contains_key(&place) {
                continue;
            }
            let of = times.at(place.0, place.1);
            let (buckets, counts): (Vec<i16>, Vec<i64>) = (row.try_get(2)?, row.try_get(3)?);
            for (bucket, count) in buckets.into_iter().zip(counts) {
                of.add(bucket, count);
            }
        }
    }
    Ok(())
}
