//! Processing times, and the check that recounts them and the counts (L5).

use std::collections::BTreeMap;

use oncegate_sidecar::{
    event::{Decision, FailureKind, Micros, Resolve, Resolved, State, Time},
    ledger::{
        Ledger as _,
        check::Report,
        filter::StatsFilter,
        sqlite::{self, SqliteLedger, SqliteSettings},
        timings::Timings,
    },
};

use super::{
    Fixture, HOUR, claim, cleanup, completion, conformance, key, resolution,
    stats::{everything, total},
};

conformance!(
    processing_times_are_those_of_the_rows,
    times_of_days_are_those_of_their_hours,
    times_are_read_where_they_are_wanted_and_there_are_not_too_many_buckets,
    the_check_passes_and_finds_what_was_planted,
    times_that_are_missing_or_too_many_are_found,
    times_of_events_that_a_cleanup_took_are_not_too_many,
    a_stuck_event_that_nobody_noted_is_found,
);

/// All times once there are so many: Postgres has them within a second.
async fn times(fixture: &Fixture, count: u64) -> Timings {
    oncegate_e2e::eventually(&format!("{count} processing times"), async || {
        let report = fixture.ledger.stats(everything()).await.unwrap();
        let mut all = Timings::default();
        for timings in report.timings.values() {
            all.add_all(timings);
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
        let found: BTreeMap<_, _> =
            report.timings.iter().map(|(provider, times)| (provider.clone(), Timings::from(times))).collect();
        assert_eq!(found, all, "{first} {end} {bucket:?}");
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
        let times: u64 = report.timings.values().map(|times| Timings::from(times).count()).sum();
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

/// Does one thing to the rows of Postgres, or the same to those of SQLite.
async fn tamper(fixture: &Fixture, postgres: &'static str, sqlite: &'static str) {
    fixture
        .tamper(match &fixture.store {
            super::Store::Postgres { .. } => postgres,
            super::Store::Sqlite { .. } => sqlite,
        })
        .await;
}

/// How many times are missing (less than none: too many), over all hours that are complained about.
async fn missing(fixture: &Fixture) -> i64 {
    let report = fixture.check().await;
    let hours = report.differences.iter().filter(|difference| difference.what == "times");
    hours.map(|difference| difference.recounted - difference.kept).sum()
}

/// Makes all that was completed have ended an hour ago in the same second, or each in a minute of its own before.
async fn age(fixture: &Fixture, together: bool) {
    tamper(
        fixture,
        if together {
            "update payment_webhook_events set start_time = ended - (end_time - start_time), end_time = ended
            from (select date_trunc('hour', now()) - interval '1 hour' as ended) t"
        } else {
            "update payment_webhook_events
            set start_time = start_time - id * interval '1 minute', end_time = end_time - id * interval '1 minute'"
        },
        "",
    )
    .await;
}

async fn times_that_are_missing_or_too_many_are_found(fixture: &Fixture) {
    for number in 0..12 {
        fixture.completed(&key(&format!("evt_{number}"))).await;
    }
    checked(fixture).await;
    age(fixture, false).await;
    assert_eq!(fixture.check().await.differences, []);
    let postgres = matches!(fixture.store, super::Store::Postgres { .. });
    for (change, back, expected) in [
        (
            (
                "update payment_webhook_timings set counts[1] = counts[1] + 100000",
                "update payment_webhook_timings set count = count + 100000 where (hour, bucket) in
                (select hour, min(bucket) from payment_webhook_timings group by hour)",
            ),
            (
                "update payment_webhook_timings set counts[1] = counts[1] - 100000",
                "update payment_webhook_timings set count = count - 100000 where count > 100000",
            ),
            -100_000,
        ),
        (
            (
                "update payment_webhook_timings set counts[1] = counts[1] - 1",
                "update payment_webhook_timings set count = count - 1 where (hour, bucket) in
                (select hour, min(bucket) from payment_webhook_timings group by hour)",
            ),
            (
                "update payment_webhook_timings set counts[1] = counts[1] + 1",
                "update payment_webhook_timings set count = count + 1 where (hour, bucket) in
                (select hour, min(bucket) from payment_webhook_timings group by hour)",
            ),
            // On Postgres one of them may have been lost with a process. On SQLite none.
            if postgres { 0 } else { 1 },
        ),
    ] {
        tamper(fixture, change.0, change.1).await;
        let found = missing(fixture).await;
        // Once an hour, of which there may be two.
        assert!([expected, 2 * expected].contains(&found), "{found}, not {expected}");
        tamper(fixture, back.0, back.1).await;
        assert_eq!(fixture.check().await.differences, []);
    }
    fixture.tamper("delete from payment_webhook_timings").await;
    assert_eq!(missing(fixture).await, 12);
    // A process that was killed may have had them all.
    age(fixture, true).await;
    assert_eq!(missing(fixture).await, if postgres { 0 } else { 12 });
    // From before there were histograms.
    age(fixture, false).await;
    assert_eq!(missing(fixture).await, 12);
    tamper(
        fixture,
        "update oncegate_migrations set installed_on = installed_on - interval '1 day' where version = 1",
        "update oncegate_meta set value = (select max(end_time) + 1 from payment_webhook_events)
        where key = 'times_since'",
    )
    .await;
    assert_eq!(fixture.check().await.differences, []);
}

async fn times_of_events_that_a_cleanup_took_are_not_too_many(fixture: &Fixture) {
    for number in 0..4 {
        fixture.completed(&key(&format!("evt_{number}"))).await;
    }
    // What is completed by hand after its completion was taken back leaves one in the archive alone.
    fixture.resolve(Resolve { force: true, ..resolution(&key("evt_3"), Resolved::Pending) }).await;
    let scope = cleanup::scope(fixture, &[State::Completed]).await;
    for number in 4..6 {
        fixture.completed(&key(&format!("evt_{number}"))).await;
    }
    checked(fixture).await;
    cleanup::run(fixture, &scope).await;
    let report = fixture.check().await;
    assert_eq!((report.differences.as_slice(), report.events, report.completions), (&[][..], 3, 3));
    // The next one takes the rest, and the times of the hour with it, except for the event that is open.
    let scope = cleanup::scope(fixture, &[State::Completed]).await;
    cleanup::run(fixture, &scope).await;
    let report = fixture.check().await;
    assert_eq!((report.differences.as_slice(), report.events, report.completions), (&[][..], 1, 1));
    let lock = fixture.acquire(claim(&key("evt_3"), "replay")).await;
    fixture.mark(completion(&key("evt_3"), &lock)).await;
    oncegate_e2e::eventually("the new time is written", async || {
        let report = fixture.check().await;
        assert_eq!(report.differences, []);
        (report.completions == 2 && report.times > 0).then_some(())
    })
    .await;
}

/// A file of the version that had no histograms, with one completed event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_missing_of_what_was_completed_before_there_were_histograms() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("oncegate.db");
    let conn = rusqlite::Connection::open(&path).unwrap();
    conn.execute_batch(include_str!("../../../../migrations/sqlite/0001_events.sql")).unwrap();
    conn.execute_batch(
        "insert into payment_webhook_events
            (id, tenant, provider, event_id, event_type, state, attempt_count, fencing_token, create_time, update_time, end_time,
            claim_id, holder, start_time, lock_expire_time, outcome)
        values (1, 'default', 'stripe', 'evt_old', 'a', 'completed', 1, 1, 3600000000, 3600000001, 3600000001, 'a', 'a',
            3600000000, 3600000005, 'completed');
        insert into payment_webhook_counts (tenant, provider, hour, completed) values ('default', 'stripe', 3600000000, 1);
        pragma user_version = 1; pragma application_id = 828858740",
    )
    .unwrap();
    let settings = SqliteSettings { migrate: true, ..SqliteSettings::default() };
    let ledger = SqliteLedger::open(&path, &settings).unwrap();
    let Decision::Acquired(lock) = ledger.claim(claim(&key("evt_new"), "a")).await.unwrap().decision else {
        panic!("held");
    };
    ledger.mark(completion(&key("evt_new"), &lock)).await.unwrap();
    let report = sqlite::check(&path).unwrap();
    assert_eq!((report.differences.as_slice(), report.completions, report.times), (&[][..], 2, 1));
    conn.execute_batch("delete from payment_webhook_timings").unwrap();
    let report = sqlite::check(&path).unwrap();
    assert!(report.differences.iter().any(|difference| difference.what == "times"), "{report:?}");
    ledger.close().await;
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
