//! Stats: the counts are those that a recount of the events gives (L5).

use std::{collections::BTreeMap, num::NonZeroU32};

use oncegate_e2e::chaos::seed::Seed;
use oncegate_sidecar::{
    event::{Claim, Decision, Ending, Event, FailureKind, Key, Mark, Outcome, Resolve, Resolved, State, Time},
    ledger::filter::{CleanupProgress, CleanupScope, Counts, HistoryFilter, StatsFilter, StatsReport},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{Fixture, HOUR, Micros, claim, completion, conformance, failure, key, resolution};

conformance!(
    an_empty_ledger_counts_nothing,
    every_state_is_counted,
    stuck_is_processing_past_the_expiry,
    tenants_providers_and_hours_are_told_apart,
    counts_of_a_bucket_are_those_of_its_hours,
    counts_equal_a_recount_after_anything,
);

pub(crate) fn everything() -> StatsFilter {
    StatsFilter {
        tenant: None,
        provider: None,
        start_time: None,
        end_time: None,
        bucket: None,
        buckets_max: 1_000,
        counts_max: 40_000,
        by_provider: true,
        timings: true,
    }
}

/// Counts the events one by one.
pub(crate) async fn recount(fixture: &Fixture, filter: &StatsFilter, now: Time) -> BTreeMap<(Time, String), Counts> {
    let mut counts: BTreeMap<(Time, String), Counts> = BTreeMap::new();
    for event in events(fixture).await {
        let hour = event.create_time.hour();
        let counted = filter.tenant.as_ref().is_none_or(|tenant| *tenant == event.key.tenant)
            && filter.provider.as_ref().is_none_or(|provider| *provider == event.key.provider)
            && filter.start_time.is_none_or(|start| start <= hour)
            && filter.end_time.is_none_or(|end| hour < end);
        if counted {
            let bucket = if filter.bucket.is_some() { hour } else { Time(0) };
            add(counts.entry((bucket, event.key.provider.clone())).or_default(), &event, now);
        }
    }
    counts
}

fn add(counts: &mut Counts, event: &Event, now: Time) {
    counts[event.state] += 1;
    counts.duplicates += event.duplicate_count;
    counts.retries += i64::from(event.attempt_count - 1).max(0);
    let expired = event.latest.as_ref().is_some_and(|latest| latest.lock_expire_time <= now);
    counts.stuck += i64::from(event.state == State::Processing && expired);
}

async fn events(fixture: &Fixture) -> Vec<Event> {
    let filter = HistoryFilter {
        tenant: None,
        provider: None,
        event_type: None,
        states: Vec::new(),
        start_time: None,
        end_time: None,
        page_size: 100_000,
        after: None,
    };
    fixture.ledger.history(filter).await.unwrap().events
}

/// The counts once they equal a recount: a flush between the two readings is no difference.
pub(crate) async fn assert_equal_a_recount(fixture: &Fixture, filter: &StatsFilter) -> StatsReport {
    let mut last = String::new();
    let found = oncegate_e2e::eventually::within(oncegate_e2e::DEADLINE, async || {
        let report = fixture.ledger.stats(filter.clone()).await.unwrap();
        let recounted = recount(fixture, filter, report.as_of).await;
        // Without buckets the time of the key means nothing.
        let counts: BTreeMap<_, _> = report
            .counts
            .iter()
            .map(|((time, provider), counts)| {
                ((if filter.bucket.is_some() { *time } else { Time(0) }, provider.clone()), *counts)
            })
            .collect();
        last = format!("counted {counts:?}\nrecounted {recounted:?}");
        (counts == recounted).then_some(report)
    })
    .await;
    found.unwrap_or_else(|| panic!("{filter:?}\n{last}"))
}

pub(crate) fn total(report: &StatsReport) -> Counts {
    report.counts.values().fold(Counts::default(), |mut total, counts| {
        total.add(counts);
        total
    })
}

async fn an_empty_ledger_counts_nothing(fixture: &Fixture) {
    let report = fixture.ledger.stats(everything()).await.unwrap();
    assert_eq!(total(&report), Counts::default());
    assert!(report.as_of <= fixture.now().await);
}

async fn every_state_is_counted(fixture: &Fixture) {
    fixture.acquire(claim(&key("processing"), "claim")).await;
    fixture.completed(&key("completed")).await;
    fixture.failed(&key("failed"), FailureKind::Retryable).await;
    fixture.failed(&key("unknown"), FailureKind::Unknown).await;
    fixture.failed(&key("dead"), FailureKind::Terminal).await;
    fixture.failed(&key("pending"), FailureKind::Unknown).await;
    fixture.resolve(resolution(&key("pending"), Resolved::Pending)).await;
    let report = assert_equal_a_recount(fixture, &everything()).await;
    let counts = total(&report);
    assert_eq!((counts.states, counts.total()), ([1; 6], 6));
    assert_eq!((counts.duplicates, counts.retries, counts.stuck), (0, 0, 0));
}

async fn stuck_is_processing_past_the_expiry(fixture: &Fixture) {
    fixture.acquire(claim(&key("live"), "claim")).await;
    fixture.expired(&key("stuck_1"), "claim").await;
    fixture.expired(&key("stuck_2"), "claim").await;
    let lock = fixture.expired(&key("late"), "claim").await;
    fixture.mark(completion(&key("late"), &lock)).await;
    fixture.expired(&key("buried"), "claim").await;
    fixture.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(&key("buried"), "second") }).await;
    assert_eq!(total(&assert_equal_a_recount(fixture, &everything()).await).stuck, 2);
    fixture.acquire(claim(&key("stuck_1"), "second")).await;
    let counts = total(&assert_equal_a_recount(fixture, &everything()).await);
    assert_eq!((counts.stuck, counts.retries), (1, 1));
}

async fn tenants_providers_and_hours_are_told_apart(fixture: &Fixture) {
    for (tenant, provider, events) in [("a", "stripe", 1), ("a", "paypal", 2), ("b", "stripe", 4), ("b", "paypal", 8)] {
        for number in 0..events {
            let key = Key { tenant: tenant.into(), provider: provider.into(), event_id: format!("evt_{number}") };
            fixture.acquire(claim(&key, "claim")).await;
        }
    }
    for (tenant, provider, expected) in [
        (None, None, 15),
        (Some("a"), None, 3),
        (Some("b"), Some("paypal"), 8),
        (None, Some("stripe"), 5),
        (Some("c"), None, 0),
    ] {
        let filter =
            StatsFilter { tenant: tenant.map(str::to_owned), provider: provider.map(str::to_owned), ..everything() };
        let report = assert_equal_a_recount(fixture, &filter).await;
        assert_eq!(total(&report).total(), expected, "{filter:?}");
        let bucketed = StatsFilter { bucket: Some(HOUR), ..filter };
        assert_eq!(total(&assert_equal_a_recount(fixture, &bucketed).await).total(), expected);
    }
    let hour = fixture.now().await.hour();
    let within = |start: i64, end: i64| StatsFilter {
        start_time: Some(Time(hour.0 + start * HOUR.0)),
        end_time: Some(Time(hour.0 + end * HOUR.0)),
        ..everything()
    };
    // The hour can have turned since the first event.
    assert_eq!(total(&assert_equal_a_recount(fixture, &within(-1, 1)).await).total(), 15);
    assert_eq!(total(&assert_equal_a_recount(fixture, &within(1, 5)).await).total(), 0);
    assert_eq!(total(&assert_equal_a_recount(fixture, &within(-9, -1)).await).total(), 0);
    // Buckets are counted from the bound.
    let days = StatsFilter { bucket: Some(Micros(24 * HOUR.0)), ..within(-30, 1) };
    let report = fixture.ledger.stats(days.clone()).await.unwrap();
    let start = days.start_time.unwrap();
    for (bucket, _) in report.counts.keys() {
        assert_eq!((bucket.0 - start.0).rem_euclid(24 * HOUR.0), 0, "{bucket:?} from {start:?}");
        assert!(*bucket >= start);
    }
    assert_eq!(total(&report).total(), 15);
}

/// Three days of counts: of each hour a row of either provider for each of two writers' slots, where the ledger has those.
async fn counts_of_a_bucket_are_those_of_its_hours(fixture: &Fixture) {
    fixture
        .tamper(match &fixture.store {
            super::Store::Sqlite { .. } => {
                "with recursive hours (h) as (select 0 union all select h + 1 from hours where h < 71)
                insert into payment_webhook_counts (tenant, provider, hour, completed, duplicates)
                select 'default', provider, 1728000000000000 + h * 3600000000, 2 * h + 2, 1
                from hours cross join (select 'paypal' as provider union all select 'stripe')"
            }
            super::Store::Postgres { .. } => {
                "insert into payment_webhook_counts (slot, tenant, provider, hour, completed, duplicates)
                select slot, 'default', provider, to_timestamp(1728000000 + h * 3600), h + slot, 2 - slot
                from generate_series(0, 71) h cross join unnest(array['paypal', 'stripe']) provider
                cross join generate_series(1, 2) slot
                union all select 3, 'default', provider, to_timestamp(1728000000 + h * 3600), -1, 0
                from generate_series(0, 71) h cross join unnest(array['paypal', 'stripe']) provider"
            }
        })
        .await;
    let time = |hour: i64| Time(1_728_000_000_000_000 + hour * HOUR.0);
    for (first, end, bucket) in [
        (0, 72, None),
        (-240, 960, None),
        (5, 6, None),
        (0, 72, Some(1)),
        (0, 72, Some(24)),
        (-24, 60, Some(24)),
        // Buckets begin at the bound, and the last one may end beyond the other.
        (1, 72, Some(24)),
        (-7, 71, Some(5)),
        (72, 90, Some(1)),
    ] {
        for (by_provider, provider) in [(true, None), (false, None), (true, Some("stripe")), (false, Some("stripe"))] {
            let filter = StatsFilter {
                provider: provider.map(str::to_owned),
                start_time: Some(time(first)),
                end_time: Some(time(end)),
                bucket: bucket.map(|hours| Micros(hours * HOUR.0)),
                by_provider,
                ..everything()
            };
            let mut expected: BTreeMap<(Time, String), Counts> = BTreeMap::new();
            for hour in first.max(0)..end.min(72) {
                let bucket = bucket.map_or(first, |hours| first + (hour - first).div_euclid(hours) * hours);
                for each in ["paypal", "stripe"].into_iter().filter(|each| provider.is_none_or(|one| one == *each)) {
                    let name = if by_provider { each.to_owned() } else { String::new() };
                    let counts = expected.entry((time(bucket), name)).or_default();
                    counts[State::Completed] += 2 * hour + 2;
                    counts.duplicates += 1;
                }
            }
            let found = fixture.ledger.stats(filter).await.unwrap().counts;
            assert_eq!(found, expected, "{first} {end} {bucket:?} {by_provider} {provider:?}");
        }
    }
}

/// Commands at random, as many as it takes to come through every transition with certainty.
async fn counts_equal_a_recount_after_anything(fixture: &Fixture) {
    let mut random = StdRng::seed_from_u64(Seed::from_environment().0);
    for round in 0..6 {
        for _ in 0..150 {
            at_random(fixture, &mut random).await;
        }
        for filter in [everything(), StatsFilter { bucket: Some(HOUR), ..everything() }] {
            assert_equal_a_recount(fixture, &filter).await;
        }
        if round % 2 == 1 {
            let scope = CleanupScope {
                tenant: None,
                provider: (random.random_range(0..2) == 0).then(|| "stripe".into()),
                before: fixture.now().await,
                states: State::ALL[random.random_range(0..6)..].to_vec(),
                dry_run: false,
                batch_size: random.random_range(1..20),
            };
            let mut progress = CleanupProgress::default();
            while !progress.done {
                fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
            }
            assert_equal_a_recount(fixture, &everything()).await;
        }
    }
}

async fn at_random(fixture: &Fixture, random: &mut StdRng) {
    let key = Key {
        tenant: "default".into(),
        provider: ["stripe", "paypal"][random.random_range(0..2)].into(),
        event_id: format!("evt_{}", random.random_range(0..30)),
    };
    let request = Claim {
        lock_duration: if random.random_range(0..3) == 0 { Micros::ZERO } else { HOUR },
        attempts_max: NonZeroU32::new(random.random_range(0..5)),
        ..claim(&key, &format!("claim-{}", random.random::<u64>()))
    };
    // Whatever the answer is: refusals count as well.
    let Ok(claimed) = fixture.ledger.claim(request).await else { return };
    match (claimed.decision, random.random_range(0..8)) {
        (Decision::Acquired(lock), 0..3) => drop(fixture.ledger.mark(completion(&key, &lock)).await),
        (Decision::Acquired(lock), 3) => {
            drop(fixture.ledger.mark(failure(&key, &lock, FailureKind::Retryable)).await);
        }
        (Decision::Acquired(lock), 4) => drop(fixture.ledger.mark(failure(&key, &lock, FailureKind::Unknown)).await),
        (Decision::Acquired(lock), 5) => drop(fixture.ledger.mark(failure(&key, &lock, FailureKind::Terminal)).await),
        (Decision::Acquired(_), _) => {}
        (_, choice) => {
            // A lock that somebody let lie is given up now and then, and a held event decided on.
            let to = [Resolved::Pending, Resolved::Completed, Resolved::Dead][choice % 3];
            let resolve = Resolve { force: choice > 5, ..resolution(&key, to) };
            drop(fixture.ledger.resolve(resolve).await);
            let event = claimed.event;
            if event.latest.is_some_and(|latest| latest.outcome == Outcome::Running) {
                let mark = Mark {
                    key,
                    fencing_token: event.fencing_token,
                    claim_id: None,
                    ending: Ending::Completed { metadata: None },
                    result: None,
                    attempts_max: None,
                };
                drop(fixture.ledger.mark(mark).await);
            }
        }
    }
}
