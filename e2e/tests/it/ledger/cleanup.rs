//! Cleanup: bounded steps, only what the scope covers, and the counts kept.

use oncegate_sidecar::{
    event::{Claim, Decision, FailureKind, Key, Refusal, Resolved, State, Time},
    ledger::filter::{CleanupProgress, CleanupScope, CleanupTotals},
};

use super::{
    Fixture, claim, completion, conformance, failure, key, refused, resolution,
    stats::{assert_equal_a_recount, everything, total},
};

conformance!(
    a_dry_run_counts_what_a_real_one_deletes,
    only_states_in_the_scope_go_and_open_events_never,
    only_what_ended_before_the_moment_goes,
    tenant_and_provider_bound_it,
    each_step_is_bounded,
    a_deleted_event_is_new_again,
    delivery_ids_go_with_age,
    delivery_ids_outside_the_scope_count_towards_a_step,
    an_empty_ledger_is_done_at_once,
);

pub(super) async fn scope(fixture: &Fixture, states: &[State]) -> CleanupScope {
    CleanupScope {
        tenant: None,
        provider: None,
        before: fixture.now().await,
        states: states.to_vec(),
        dry_run: false,
        batch_size: 1_000,
    }
}

pub(super) async fn run(fixture: &Fixture, scope: &CleanupScope) -> CleanupProgress {
    let mut progress = CleanupProgress::default();
    while !progress.done {
        fixture.ledger.cleanup_step(scope, &mut progress).await.unwrap();
    }
    progress
}

async fn exists(fixture: &Fixture, key: &Key) -> bool {
    fixture.ledger.history_of(key.clone()).await.unwrap().is_some()
}

/// One event in each state, with the state's name.
async fn one_of_each(fixture: &Fixture) {
    fixture.acquire(claim(&key("processing"), "claim")).await;
    fixture.expired(&key("stuck"), "claim").await;
    fixture.completed(&key("completed")).await;
    fixture.failed(&key("failed"), FailureKind::Retryable).await;
    fixture.failed(&key("unknown"), FailureKind::Unknown).await;
    fixture.failed(&key("dead"), FailureKind::Terminal).await;
    fixture.failed(&key("pending"), FailureKind::Unknown).await;
    fixture.resolve(resolution(&key("pending"), Resolved::Pending)).await;
}

// T29
async fn a_dry_run_counts_what_a_real_one_deletes(fixture: &Fixture) {
    one_of_each(fixture).await;
    for number in 0..25 {
        let key = Key { provider: "paypal".into(), ..key(&format!("evt_{number}")) };
        fixture.completed(&key).await;
        fixture.ledger.claim(claim(&key, "second")).await.unwrap();
    }
    let states = [State::Completed, State::Failed, State::Dead];
    let real = CleanupScope { batch_size: 4, ..scope(fixture, &states).await };
    let before = fixture.ledger.stats(everything()).await.unwrap();
    let dry = run(fixture, &CleanupScope { dry_run: true, ..real.clone() }).await;
    let after = fixture.ledger.stats(everything()).await.unwrap();
    assert_eq!(total(&before).states, total(&after).states, "a dry run deletes nothing");
    let done = run(fixture, &real).await;
    assert_eq!(dry.providers.keys().collect::<Vec<_>>(), done.providers.keys().collect::<Vec<_>>());
    for (provider, totals) in &done.providers {
        let counted = dry.providers[provider];
        assert_eq!((totals.matched, totals.deleted), (totals.deleted, counted.matched), "{provider}");
        assert_eq!((counted.deleted, counted.oldest_end_time), (0, totals.oldest_end_time), "{provider}");
    }
    assert_eq!((done.providers["stripe"].deleted, done.providers["paypal"].deleted), (3, 25));
    let report = assert_equal_a_recount(fixture, &everything()).await;
    assert_eq!(total(&report).states, [1, 2, 0, 0, 1, 0]);
    // Nothing is left for another one.
    assert!(run(fixture, &real).await.providers.values().all(|totals| *totals == CleanupTotals::default()));
}

async fn only_states_in_the_scope_go_and_open_events_never(fixture: &Fixture) {
    one_of_each(fixture).await;
    for (states, gone) in [
        (&[State::Pending, State::Processing][..], None),
        (&[State::Unknown], Some("unknown")),
        (&[State::Completed], Some("completed")),
        (&[State::Dead], Some("dead")),
        (&[State::Failed], Some("failed")),
        (&State::ALL, None),
    ] {
        let progress = run(fixture, &scope(fixture, states).await).await;
        let deleted: i64 = progress.providers.values().map(|totals| totals.deleted).sum();
        assert_eq!(deleted, i64::from(gone.is_some()), "{states:?}");
        if let Some(gone) = gone {
            assert!(!exists(fixture, &key(gone)).await, "{gone}");
        }
        assert_equal_a_recount(fixture, &everything()).await;
    }
    for open in ["processing", "stuck", "pending"] {
        assert!(exists(fixture, &key(open)).await, "{open}");
    }
}

async fn only_what_ended_before_the_moment_goes(fixture: &Fixture) {
    let (early, late) = (key("early"), key("late"));
    let late_lock = fixture.acquire(claim(&late, "claim")).await;
    fixture.completed(&early).await;
    let failing = key("failing");
    let lock = fixture.acquire(claim(&failing, "claim")).await;
    let failed = fixture.mark(failure(&failing, &lock, FailureKind::Retryable)).await.event;
    // Created before the moment, ended after it: stays. Exactly at it: stays.
    let before = fixture.now().await;
    fixture.passed(Time(before.0 + 1)).await;
    fixture.mark(completion(&late, &late_lock)).await;
    let states = [State::Completed, State::Failed];
    let done = run(fixture, &CleanupScope { before, ..scope(fixture, &states).await }).await;
    assert_eq!(done.providers["stripe"].deleted, 2);
    assert!(!exists(fixture, &early).await && exists(fixture, &late).await);
    assert!(!exists(fixture, &failing).await, "a failed one counts from its last change, {:?}", failed.update_time);
    let end = fixture.event(&late).await.end_time.unwrap();
    run(fixture, &CleanupScope { before: end, ..scope(fixture, &states).await }).await;
    assert!(exists(fixture, &late).await, "the bound is open");
    let done = run(fixture, &CleanupScope { before: Time(end.0 + 1), ..scope(fixture, &states).await }).await;
    assert_eq!(done.providers["stripe"], CleanupTotals { matched: 1, deleted: 1, oldest_end_time: Some(end) });
}

async fn tenant_and_provider_bound_it(fixture: &Fixture) {
    let key = |tenant: &str, provider: &str| Key {
        tenant: tenant.into(),
        provider: provider.into(),
        event_id: "evt_1".into(),
    };
    let all = [key("a", "stripe"), key("a", "paypal"), key("b", "stripe"), key("b", "paypal")];
    for key in &all {
        fixture.completed(key).await;
    }
    let base = scope(fixture, &[State::Completed]).await;
    let mut gone = 0;
    for (tenant, provider, total) in
        [(Some("b"), Some("paypal"), 1), (Some("a"), None, 2), (None, Some("paypal"), 0), (None, None, 1)]
    {
        let scope =
            CleanupScope { tenant: tenant.map(str::to_owned), provider: provider.map(str::to_owned), ..base.clone() };
        let done = run(fixture, &scope).await;
        assert_eq!(done.providers.values().map(|totals| totals.deleted).sum::<i64>(), total, "{scope:?}");
        gone += total;
        let mut left = 0;
        for key in &all {
            left += i64::from(exists(fixture, key).await);
        }
        assert_eq!(left, 4 - gone, "{scope:?}");
        assert_equal_a_recount(fixture, &everything()).await;
    }
}

async fn each_step_is_bounded(fixture: &Fixture) {
    for number in 0..23 {
        let key = key(&format!("evt_{number:02}"));
        let lock = fixture.acquire(claim(&key, "claim")).await;
        if number % 3 != 0 {
            fixture.mark(completion(&key, &lock)).await;
        }
    }
    let scope = CleanupScope { batch_size: 5, ..scope(fixture, &[State::Completed]).await };
    let mut progress = CleanupProgress::default();
    let (mut steps, mut deleted) = (0, 0);
    while !progress.done {
        let cursor = progress.cursor;
        fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        steps += 1;
        assert!(progress.cursor >= cursor, "it only goes on");
        let total: i64 = progress.providers.values().map(|totals| totals.deleted).sum();
        assert!(total - deleted <= 5, "rows looked at bound the rows that go");
        deleted = total;
        assert_equal_a_recount(fixture, &everything()).await;
    }
    assert_eq!(deleted, 15);
    assert!((5..=6).contains(&steps), "23 rows in steps of 5: {steps}");
}

async fn a_deleted_event_is_new_again(fixture: &Fixture) {
    let key = key("evt_1");
    fixture.expired(&key, "first").await;
    let lock = fixture.acquire(Claim { fingerprint: Some([1; 32]), ..claim(&key, "second") }).await;
    fixture.mark(failure(&key, &lock, FailureKind::Unknown)).await;
    let old = fixture.resolve(resolution(&key, Resolved::Completed)).await;
    fixture.ledger.claim(claim(&key, "third")).await.unwrap();
    fixture.counted(&key, 1, 0).await;
    run(fixture, &scope(fixture, &[State::Completed]).await).await;
    assert!(!exists(fixture, &key).await);
    assert_eq!(refused(fixture.ledger.mark(completion(&key, &lock)).await), Refusal::NotFound);
    assert_eq!(total(&assert_equal_a_recount(fixture, &everything()).await).total(), 0);

    // S2: a holder from before does not pass for a later one. Nothing of the old event is left on the new one.
    let request = Claim { fingerprint: Some([2; 32]), ..claim(&key, "first") };
    let again = fixture.acquire(request).await;
    assert_eq!(again.attempt, 1);
    assert!(again.fencing_token > old.fencing_token);
    assert!(refused(fixture.ledger.mark(completion(&key, &lock)).await) != Refusal::NotFound);
    let history = fixture.history_of(&key).await;
    assert_eq!((history.attempts.len(), history.resolutions.len()), (1, 0));
    assert_ne!(history.event.row, old.row);
    assert!(history.event.create_time > old.create_time);
    assert_eq!((history.event.duplicate_count, history.event.attempts_forgiven), (0, 0));
}

async fn delivery_ids_go_with_age(fixture: &Fixture) {
    let with = |event: &str, delivery: String, digest| Claim {
        delivery_id: Some(delivery),
        payload_digest: Some([digest; 32]),
        ..claim(&key(event), "claim")
    };
    for number in 0..7 {
        fixture.acquire(with(&format!("old_{number}"), format!("old-{number}"), 1)).await;
    }
    let before = fixture.now().await;
    fixture.passed(Time(before.0 + 1)).await;
    fixture.acquire(with("new", "new".into(), 1)).await;
    let mismatch = async |delivery: &str| {
        let answer = fixture.ledger.claim(with("other", delivery.to_owned(), 2)).await;
        assert_eq!(refused(answer), Refusal::DeliveryMismatch, "{delivery}");
    };
    let scope = CleanupScope { before, batch_size: 3, ..scope(fixture, &[State::Completed]).await };
    run(fixture, &CleanupScope { dry_run: true, ..scope.clone() }).await;
    mismatch("old-0").await;
    run(fixture, &CleanupScope { provider: Some("paypal".into()), ..scope.clone() }).await;
    mismatch("old-0").await;
    let mut progress = CleanupProgress::default();
    let mut steps = 0;
    while !progress.done {
        fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        steps += 1;
    }
    assert_eq!(steps, 5, "three for the events, and as many ids with the last of them and with each that follows");
    mismatch("new").await;
    for number in 0..7 {
        fixture.acquire(with(&format!("again_{number}"), format!("old-{number}"), 2)).await;
    }
}

/// A step that had to find so many would read all that another provider keeps.
async fn delivery_ids_outside_the_scope_count_towards_a_step(fixture: &Fixture) {
    let with = |number: usize, digest| Claim {
        delivery_id: Some(format!("delivery-{number}")),
        payload_digest: Some([digest; 32]),
        ..claim(
            &Key {
                provider: if number.is_multiple_of(4) { "paypal" } else { "stripe" }.into(),
                ..key(&format!("evt_{number}_{digest}"))
            },
            "claim",
        )
    };
    for number in 0..7 {
        fixture.acquire(with(number, 1)).await;
    }
    let base = scope(fixture, &[State::Completed]).await;
    fixture.passed(Time(base.before.0 + 1)).await;
    let scope = CleanupScope { provider: Some("paypal".into()), batch_size: 3, ..base };
    let mut progress = CleanupProgress::default();
    let mut steps = 0;
    while !progress.done {
        let until = progress.deliveries_until;
        fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        assert!(progress.deliveries_until >= until, "it only goes on");
        steps += 1;
    }
    assert_eq!(steps, 5, "three for the events, and as many ids with the last of them and with each that follows");
    for number in 0..7 {
        let answer = fixture.ledger.claim(with(number, 2)).await;
        if number % 4 == 0 {
            assert!(matches!(answer.unwrap().decision, Decision::Acquired(_)), "{number} was forgotten");
        } else {
            assert_eq!(refused(answer), Refusal::DeliveryMismatch, "{number}");
        }
    }
}

async fn an_empty_ledger_is_done_at_once(fixture: &Fixture) {
    let mut progress = CleanupProgress::default();
    fixture.ledger.cleanup_step(&scope(fixture, &State::ALL).await, &mut progress).await.unwrap();
    assert!(progress.done && progress.providers.is_empty(), "{progress:?}");
}
