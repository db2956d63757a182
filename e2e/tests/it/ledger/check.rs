//! Processing times, and the check that recounts them and the counts (L5).

use std::collections::BTreeMap;

use oncegate_sidecar::{
    event::{FailureKind, Micros, Resolve, Resolved, State, Time},
    ledger::{check::Report, filter::StatsFilter, timings::Timings},
};

use super::{
    Fixture, HOUR, claim, completion, conformance, key, resolution,
    stats::{everything, total},
};

conformance!(
    processing_times_are_those_of_the_rows,
    times_of_days_are_those_of_their_hours,
    times_are_read_where_they_are_wanted_and_there_are_not_too_many_buckets,
    the_check_passes_and_finds_what_was_planted,
    a_stuck_event_that_nobody_noted_is_found,
);

/// All times once there are so many: Postgres has them within a second.
async fn times(fixture: &Fixture, count: u64) -> Timings {
    oncegate_e2e::eventually(&format!("{count} processing times"), async || {
        let report = fixture.ledger.stats(everything()).await.unwrap();
        let mut all = Timings::default();
        for timings in report.timings.values() {
            all.merge(timings);
        }
        assert!(all.count() <= count, "{} times, not {count}", all.count());
        (all.count() == count).then_some(all)
    })
    .await
}

async fn processing_times_are_those_of_the_rows(fixture: &Fixture) {
    let mut exact = Timings::default();
    for number in 0..12 {
        let key = key(&format!("evt_{number}"));
        let lock = fixture.acquire(claim(&key, "claim")).await;
        let event = fixture.mark(completion(&key, &lock)).await.event;
        exact.record(event.end_time.unwrap().since(event.latest.unwrap().start_time));
    }
    // What failed, died, or was completed by hand took no time from lock to completion.
    fixture.failed(&key("failed"), FailureKind::Retryable).await;
    fixture.failed(&key("unknown"), FailureKind::Unknown).await;
    fixture.resolve(resolution(&key("unknown"), Resolved::Completed)).await;
    // What was completed in its second attempt took that attempt's.
    fixture.expired(&key("again"), "first").await;
    let lock = fixture.acquire(claim(&key("again"), "second")).await;
    let event = fixture.mark(completion(&key("again"), &lock)).await.event;
    exact.record(event.end_time.unwrap().since(event.latest.unwrap().start_time));
    // A completion that is repeated is one.
    fixture.ledger.mark(completion(&key("again"), &lock)).await.unwrap();
    assert_eq!(times(fixture, 13).await, exact);
}

/// Where the three days of [`times_of_days_are_those_of_their_hours`] begin: a day of 2024.
const FIRST_DAY: i64 = 1_728_000_000_000_000;

/// Stats reads whole days where it may. Hour by hour of three days `times[hour]` times, all in the bucket `hour % 3`.
async fn assert_times(fixture: &Fixture, times: &[i64; 72]) {
    for (first, end, bucket) in [
        (0, 72, None),
        (-240, 960, None),
        (0, 24, None),
        (1, 72, None),
        (0, 71, None),
        (23, 49, None),
        (5, 6, None),
        (0, 72, Some(24)),
        (0, 72, Some(48)),
        (-24, 60, Some(24)),
        (1, 72, Some(24)),
        (0, 72, Some(1)),
        (0, 72, Some(36)),
    ] {
        let time = |hour: i64| Time(FIRST_DAY + hour * HOUR.0);
        let filter = StatsFilter {
            provider: Some("stripe".into()),
            start_time: Some(time(first)),
            end_time: Some(time(end)),
            bucket: bucket.map(|hours| Micros(hours * HOUR.0)),
            ..everything()
        };
        let mut expected: BTreeMap<(Time, String), Timings> = BTreeMap::new();
        for (hour, count) in (0..).zip(times).filter(|(hour, count)| (first..end).contains(hour) && **count > 0) {
            let bucket = bucket.map_or(first, |hours| first + (hour - first).div_euclid(hours) * hours);
            let of = expected.entry((time(bucket), "stripe".into())).or_default();
            of.add(i16::try_from(hour % 3).unwrap(), *count);
        }
        let mut all = Timings::default();
        expected.values().for_each(|timings| all.merge(timings));
        let report = fixture.ledger.stats(filter).await.unwrap();
        let told: BTreeMap<_, _> =
            expected.into_iter().map(|(place, timings)| (place, timings.percentiles().unwrap())).collect();
        assert_eq!(report.percentiles, told, "{first} {end} {bucket:?}");
        let all: BTreeMap<_, _> = (all.count() > 0).then(|| ("stripe".to_owned(), all)).into_iter().collect();
        assert_eq!(report.timings, all, "{first} {end} {bucket:?}");
    }
    assert_eq!(fixture.check().await.differences, []);
}

async fn times_of_days_are_those_of_their_hours(fixture: &Fixture) {
    let (fill, add, remove) = match &fixture.store {
        super::Store::Sqlite { .. } => (
            "with recursive hours (h) as (select 0 union all select h + 1 from hours where h < 71)
            insert into payment_webhook_timings
            select 'default', 'stripe', 1728000000000000 + h * 3600000000, h % 3, h + 1 from hours",
            "insert into payment_webhook_timings
            values ('default', 'stripe', 1728000000000000 + 30 * 3600000000, 0, 1000),
                ('other', 'stripe', 1728000000000000 + 30 * 3600000000, 0, 4000)
            on conflict do update set count = count + excluded.count",
            "delete from payment_webhook_timings where hour < 1728000000000000 + 26 * 3600000000",
        ),
        super::Store::Postgres { .. } => (
            "insert into payment_webhook_timings
            select 1 + h % 2, 'default', 'stripe', to_timestamp(1728000000 + h * 3600), array[h % 3], array[h + 1]
            from generate_series(0, 71) h",
            "insert into payment_webhook_timings
            values (1, 'default', 'stripe', to_timestamp(1728000000 + 30 * 3600), '{0}', '{1031}'),
                (1, 'other', 'stripe', to_timestamp(1728000000 + 30 * 3600), '{0}', '{4000}')
            on conflict (slot, tenant, provider, hour) do update set buckets = excluded.buckets, counts = excluded.counts",
            "delete from payment_webhook_timings where hour < to_timestamp(1728000000 + 26 * 3600)",
        ),
    };
    let mut times: [i64; 72] = std::array::from_fn(|hour| i64::try_from(hour).unwrap() + 1);
    fixture.tamper(fill).await;
    assert_times(fixture, &times).await;
    // As a flush does it: some are added to what there is, some are new.
    fixture.tamper(add).await;
    times[30] += 5_000;
    assert_times(fixture, &times).await;
    // As a Cleanup does it: the first day goes, and a part of the second.
    fixture.tamper(remove).await;
    times[..26].fill(0);
    assert_times(fixture, &times).await;
    fixture.tamper("delete from payment_webhook_timings").await;
    assert_times(fixture, &[0; 72]).await;
}

async fn times_are_read_where_they_are_wanted_and_there_are_not_too_many_buckets(fixture: &Fixture) {
    fixture.completed(&key("evt_1")).await;
    fixture.expired(&key("evt_2"), "claim").await;
    times(fixture, 1).await;
    let told = async |filter: StatsFilter| {
        let report = fixture.ledger.stats(filter).await.unwrap();
        let counts = total(&report);
        let times: u64 = report.timings.values().map(Timings::count).sum();
        assert_eq!(report.percentiles.len() as u64, times, "a bucket and provider for each");
        (counts.total(), counts.stuck, times)
    };
    let hourly = StatsFilter { bucket: Some(HOUR), ..everything() };
    assert_eq!(told(hourly.clone()).await, (2, 1, 1));
    assert_eq!(told(StatsFilter { timings: false, ..everything() }).await, (2, 1, 0));
    assert_eq!(told(StatsFilter { timings: false, ..hourly.clone() }).await, (2, 1, 0));
    // Without buckets there are not too many.
    assert_eq!(told(StatsFilter { buckets_max: 0, ..everything() }).await, (2, 1, 1));
    // What is counted tells how many there are, and is all that is read.
    assert_eq!(told(StatsFilter { buckets_max: 0, ..hourly }).await, (2, 0, 0));
}

/// The check once the second's times are written.
async fn checked(fixture: &Fixture) -> Report {
    oncegate_e2e::eventually("every completion has its time", async || {
        let report = fixture.check().await;
        (report.completions == report.times).then_some(report)
    })
    .await
}

async fn the_check_passes_and_finds_what_was_planted(fixture: &Fixture) {
    assert_eq!(fixture.check().await, Report::default());
    for number in 0..5 {
        fixture.completed(&key(&format!("evt_{number}"))).await;
    }
    fixture.expired(&key("again"), "first").await;
    fixture.acquire(claim(&key("again"), "second")).await;
    // Completed, replayed, and completed again: two completions, one of them in the archive.
    fixture.resolve(Resolve { force: true, ..resolution(&key("evt_0"), Resolved::Pending) }).await;
    let lock = fixture.acquire(claim(&key("evt_0"), "replay")).await;
    fixture.mark(completion(&key("evt_0"), &lock)).await;
    let report = checked(fixture).await;
    assert_eq!((report.differences.as_slice(), report.events, report.completions), (&[][..], 6, 6));

    // Once, however many sidecars count: the one that grants counts the retries.
    fixture
        .tamper("update payment_webhook_counts set completed = completed + 2, retries = retries - 1 where retries > 0")
        .await;
    let named = |report: &Report| -> Vec<String> { report.differences.iter().map(ToString::to_string).collect() };
    assert_eq!(
        named(&fixture.check().await),
        ["default/stripe completed: 7 kept, 5 recounted", "default/stripe retries: 1 kept, 2 recounted"]
    );
    fixture
        .tamper("update payment_webhook_counts set completed = completed - 2, retries = retries + 1 where retries > 0")
        .await;
    assert_eq!(fixture.check().await.differences, []);

    // A day whose sum is not that of its hours.
    let (plant, remove) = match &fixture.store {
        super::Store::Sqlite { .. } => (
            "insert into payment_webhook_timing_days values ('default', 'stripe', 0, 7, 3)",
            "delete from payment_webhook_timing_days where day = 0",
        ),
        super::Store::Postgres { .. } => (
            "insert into payment_webhook_timing_days values (1, 'default', 'stripe', '1970-01-01Z', '{7}', '{3}')",
            "delete from payment_webhook_timing_days where day = '1970-01-01Z'",
        ),
    };
    fixture.tamper(plant).await;
    assert_eq!(named(&fixture.check().await), ["default/stripe times of the day in bucket 7: 3 kept, 0 recounted"]);
    fixture.tamper(remove).await;
    assert_eq!(fixture.check().await.differences, []);

    // Rows that took an hour longer than the histograms know.
    let hour = Micros::HOUR.0;
    match &fixture.store {
        super::Store::Sqlite { .. } => {
            fixture.tamper("update payment_webhook_events set start_time = start_time - 3600000000").await;
        }
        super::Store::Postgres { .. } => {
            fixture.tamper("update payment_webhook_events set start_time = start_time - interval '1 hour'").await;
        }
    }
    let report = fixture.check().await;
    let what: Vec<&str> = report.differences.iter().map(|difference| difference.what.as_str()).collect();
    assert_eq!(what, ["p50", "p95", "p99"]);
    assert!(report.differences.iter().all(|difference| difference.recounted >= hour && difference.hour.is_none()));
}

/// Stats is right whatever the sweep and the cold path have noted, for the counts tell it what is missing.
async fn a_stuck_event_that_nobody_noted_is_found(fixture: &Fixture) {
    fixture.expired(&key("new"), "first").await;
    fixture.expired(&key("again"), "first").await;
    let lock = fixture.acquire(claim(&key("again"), "second")).await;
    let past = Micros(-1);
    assert!(lock.remaining > past);
    if let super::Store::Postgres { .. } = &fixture.store {
        fixture
            .tamper(
                "delete from payment_webhook_open;
                update payment_webhook_sweep set swept_until = clock_timestamp() + interval '1 hour'",
            )
            .await;
    }
    for _ in 0..2 {
        let counts = total(&fixture.ledger.stats(everything()).await.unwrap());
        assert_eq!((counts.stuck, counts[State::Processing]), (1, 2));
    }
    fixture.ledger.maintain().await.unwrap();
    assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap()).stuck, 1);
}
