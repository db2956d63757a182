//! Processing times, and the check that recounts them and the counts (L5).

use oncegate_sidecar::{
    event::{FailureKind, Micros, Resolve, Resolved},
    ledger::{check::Report, timings::Timings},
};

use super::{
    Fixture, claim, completion, conformance, key, resolution,
    stats::{everything, total},
};

conformance!(
    processing_times_are_those_of_the_rows,
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

    fixture.tamper("update payment_webhook_counts set completed = completed + 2, retries = retries - 1").await;
    let named = |report: &Report| -> Vec<String> { report.differences.iter().map(ToString::to_string).collect() };
    assert_eq!(
        named(&fixture.check().await),
        ["default/stripe completed: 7 kept, 5 recounted", "default/stripe retries: 1 kept, 2 recounted"]
    );
    fixture.tamper("update payment_webhook_counts set completed = completed - 2, retries = retries + 1").await;
    assert_eq!(fixture.check().await.differences, []);

    // Rows that took an hour longer than the histograms know.
    let hour = 3_600_000_000_i64;
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
        assert_eq!((counts.stuck, counts.states[1]), (1, 2));
    }
    fixture.ledger.maintain().await.unwrap();
    assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap()).stuck, 1);
}
