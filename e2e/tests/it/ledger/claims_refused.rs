//! CheckAndLock: what is not granted, and how it is counted.

use std::num::NonZeroU32;

use oncegate_sidecar::event::{Claim, Decision, FailureKind, Key, Mark, Micros, Outcome, Refusal, Resolved, State};

use super::{
    Fixture, assert_attempts_in_order, claim, completion, conformance, failure, key, latest, only,
    postgres_only::{UNTIL_ONE_WAITS_FOR_US, hold},
    refused, resolution, result,
    stats::{assert_equal_a_recount, everything},
};

conformance!(
    a_completed_event_is_answered_with_its_result,
    unknown_and_dead_events_are_refused,
    the_claim_of_an_attempt_that_ended_makes_no_ghost_lock,
    retryable_failures_at_the_cap_are_dead,
    an_expiry_at_the_cap_is_buried_by_the_next_claim,
    a_cap_that_was_lowered_buries_a_failed_event,
    without_a_cap_there_is_always_another_attempt,
    another_fingerprint_is_refused,
    the_fingerprint_is_fixed_by_the_first_grant_that_gives_one,
    another_payload_is_told_and_counted_but_never_refused,
    a_delivery_id_with_another_payload_is_refused_whatever_the_event,
    delivery_ids_belong_to_tenant_and_provider,
    duplicates_are_counted_once_each,
);

async fn a_completed_event_is_answered_with_its_result(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "first")).await;
    let done = fixture.mark(Mark { result: Some(result(200, b"ok")), ..completion(&key, &lock) }).await.event;
    for claim_id in ["second", "third"] {
        let claimed = fixture.claim(claim(&key, claim_id)).await;
        assert_eq!(claimed.decision, Decision::AlreadyCompleted);
        assert_eq!(super::comparable(&claimed.event), super::comparable(&done));
        assert_eq!(claimed.event.result, Some(result(200, b"ok")));
    }
}

async fn unknown_and_dead_events_are_refused(fixture: &Fixture) {
    for (kind, state) in [(FailureKind::Unknown, State::Unknown), (FailureKind::Terminal, State::Dead)] {
        let key = key(state.as_str());
        fixture.failed(&key, kind).await;
        let claimed = fixture.claim(claim(&key, "second")).await;
        assert_eq!((claimed.decision, claimed.event.state), (Decision::Refused, state));
    }
    let key = key("by hand");
    fixture.completed(&super::key("other")).await;
    fixture.failed(&key, FailureKind::Retryable).await;
    fixture.resolve(resolution(&key, Resolved::Dead)).await;
    assert_eq!(fixture.claim(claim(&key, "second")).await.decision, Decision::Refused);
}

async fn the_claim_of_an_attempt_that_ended_makes_no_ghost_lock(fixture: &Fixture) {
    let ended = async |key: &Key, claim_id: &str| {
        let refusal = refused(fixture.ledger.claim(claim(key, claim_id)).await);
        assert_eq!(refusal, Refusal::ClaimEnded, "{key:?} by {claim_id}");
    };
    for (name, kind) in [
        ("retryable", Some(FailureKind::Retryable)),
        ("terminal", Some(FailureKind::Terminal)),
        ("unknown", Some(FailureKind::Unknown)),
        ("completed", None),
    ] {
        let key = key(name);
        let lock = fixture.acquire(claim(&key, "first")).await;
        match kind {
            Some(kind) => fixture.mark(failure(&key, &lock, kind)).await,
            None => fixture.mark(completion(&key, &lock)).await,
        };
        ended(&key, "first").await;
    }
    // Also when it is no longer the latest attempt: granted again, taken over, resolved, completed.
    let key = key("retryable");
    fixture.expired(&key, "second").await;
    ended(&key, "first").await;
    let third = fixture.acquire(claim(&key, "third")).await;
    for claim_id in ["first", "second"] {
        ended(&key, claim_id).await;
    }
    fixture.mark(failure(&key, &third, FailureKind::Unknown)).await;
    fixture.resolve(resolution(&key, Resolved::Pending)).await;
    for claim_id in ["first", "second", "third"] {
        ended(&key, claim_id).await;
    }
    assert_eq!(fixture.history_of(&key).await.attempts.len(), 3);
    let fourth = fixture.acquire(claim(&key, "fourth")).await;
    fixture.mark(completion(&key, &fourth)).await;
    for claim_id in ["first", "second", "third", "fourth"] {
        ended(&key, claim_id).await;
    }
    // Each of them is a duplicate of an event that is there: 1 + 1 + 2 + 3 + 4.
    fixture.counted(&key, 11, 0).await;
}

async fn retryable_failures_at_the_cap_are_dead(fixture: &Fixture) {
    let key = key("evt_1");
    for attempt in 1..=3 {
        let lock = fixture
            .acquire(Claim { attempts_max: NonZeroU32::new(3), ..claim(&key, &format!("claim-{attempt}")) })
            .await;
        let failed = Mark { attempts_max: NonZeroU32::new(3), ..failure(&key, &lock, FailureKind::Retryable) };
        let event = fixture.mark(failed).await.event;
        let dead = attempt == 3;
        assert_eq!(event.state, if dead { State::Dead } else { State::Failed });
        assert_eq!(event.end_time, dead.then_some(event.update_time));
        assert_eq!(latest(&event).outcome, Outcome::FailedRetryable, "how the attempt ended is its holder's word");
    }
    let claimed = fixture.claim(Claim { attempts_max: NonZeroU32::new(3), ..claim(&key, "claim-4") }).await;
    assert_eq!((claimed.decision, claimed.event.attempt_count), (Decision::Refused, 3));
    // A higher cap does not raise the dead.
    let claimed = fixture.claim(Claim { attempts_max: None, ..claim(&key, "claim-5") }).await;
    assert_eq!(claimed.decision, Decision::Refused);
}

async fn an_expiry_at_the_cap_is_buried_by_the_next_claim(fixture: &Fixture) {
    let key = key("evt_1");
    fixture.expired(&key, "first").await;
    let second = fixture.expired(&key, "second").await;
    assert_eq!(fixture.event(&key).await.state, State::Processing, "nothing happens by itself");
    for (claim_id, duplicates) in [("third", 1), ("fourth", 2)] {
        let claimed = fixture.claim(Claim { attempts_max: NonZeroU32::new(2), ..claim(&key, claim_id) }).await;
        assert_eq!((claimed.decision, claimed.event.state), (Decision::Refused, State::Dead));
        assert_eq!((claimed.event.attempt_count, claimed.event.fencing_token), (2, second.fencing_token));
        assert_eq!(claimed.event.end_time, Some(claimed.event.update_time));
        assert_eq!(latest(&claimed.event).outcome, Outcome::LockExpired);
        fixture.counted(&key, duplicates, 0).await;
    }
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
    assert!(history.attempts.iter().all(|attempt| attempt.outcome == Outcome::LockExpired), "{history:?}");
    assert_eq!(history.attempts[1].end_time, history.event.end_time);
    // Its own claim is an ended one as well now.
    assert_eq!(refused(fixture.ledger.claim(claim(&key, "second")).await), Refusal::ClaimEnded);
}

async fn a_cap_that_was_lowered_buries_a_failed_event(fixture: &Fixture) {
    let key = key("evt_1");
    let first = Claim { payload_digest: Some([1; 32]), ..claim(&key, "first") };
    let lock = fixture.acquire(first.clone()).await;
    let failed = Mark { result: Some(result(502, b"no")), ..failure(&key, &lock, FailureKind::Retryable) };
    let failed = fixture.mark(failed).await.event;
    let ended = failed.latest_attempt().unwrap();
    assert_eq!(ended.end_time, Some(failed.update_time));
    fixture.passed(failed.update_time.plus(Micros(1_000))).await;

    let second = Claim { attempts_max: NonZeroU32::new(1), payload_digest: Some([2; 32]), ..claim(&key, "second") };
    let claimed = fixture.claim(second).await;
    let event = claimed.event;
    assert_eq!((claimed.decision, event.state), (Decision::Refused, State::Dead));
    assert_eq!((event.fencing_token, event.attempt_count), (lock.fencing_token, 1));
    assert_eq!((event.last_error.as_deref(), &event.result), (Some("refused"), &ended.result));
    assert_eq!(event.end_time, Some(event.update_time));
    assert!(event.update_time > failed.update_time, "it was buried later");
    // The payload is compared with the attempt's, which is archived by this very call.
    assert_eq!((&event.latest, claimed.payload_changed), (&None, true));
    fixture.counted(&key, 1, 1).await;
    // The attempt ended when it failed, and stands in the history once.
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
    assert_eq!(only(&history.attempts), &ended);

    // Its claim has ended, as before; and so it is when there is another attempt after all.
    assert_eq!(refused(fixture.ledger.claim(first.clone()).await), Refusal::ClaimEnded);
    fixture.resolve(resolution(&key, Resolved::Pending)).await;
    fixture.acquire(claim(&key, "third")).await;
    assert_eq!(refused(fixture.ledger.claim(first).await), Refusal::ClaimEnded);
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
    assert_eq!(history.attempts[0], ended);
    assert_equal_a_recount(fixture, &everything()).await;
}

// Where both come in one batch, the marks are answered from what the burial came to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn marks_that_come_with_the_burial_of_a_failure_meet_its_record() {
    let fixture = Fixture::postgres().await;
    let (key, busy) = (key("evt_1"), key("busy"));
    let lock = fixture.failed(&key, FailureKind::Retryable).await;
    let other = fixture.acquire(claim(&busy, "claim")).await;
    let mut outsider = fixture.connect().await;
    let mut held = hold(&mut outsider, "busy").await;
    let ledger = &fixture.ledger;
    let blocks = ledger.mark(completion(&busy, &other));
    let meanwhile = async {
        // What is asked now waits for the batch that waits for this row, and goes into the next one together.
        sqlx::query(UNTIL_ONE_WAITS_FOR_US).execute(&mut *held).await.unwrap();
        tokio::join!(
            ledger.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(&key, "second") }),
            ledger.mark(failure(&key, &lock, FailureKind::Retryable)),
            ledger.mark(completion(&key, &lock)),
            async { held.rollback().await.unwrap() },
        )
    };
    let (blocked, (claimed, repeated, conflict, ())) = tokio::join!(blocks, meanwhile);
    blocked.unwrap();
    assert_eq!(claimed.unwrap().event.state, State::Dead);
    assert!(repeated.unwrap().repeated);
    assert_eq!(refused(conflict), Refusal::OutcomeConflict { recorded: Outcome::FailedRetryable });
    fixture.close().await;
}

async fn without_a_cap_there_is_always_another_attempt(fixture: &Fixture) {
    let key = key("evt_1");
    for attempt in 1..=120 {
        assert_eq!(fixture.expired(&key, &format!("claim-{attempt}")).await.attempt, attempt);
    }
    assert_attempts_in_order(&fixture.history_of(&key).await);
}

async fn another_fingerprint_is_refused(fixture: &Fixture) {
    let key = key("evt_1");
    let with = |fingerprint: Option<u8>, claim_id| Claim {
        fingerprint: fingerprint.map(|byte| [byte; 32]),
        ..claim(&key, claim_id)
    };
    let lock = fixture.acquire(with(Some(1), "first")).await;
    let mismatch = async |claim_id| {
        let refusal = refused(fixture.ledger.claim(with(Some(2), claim_id)).await);
        assert_eq!(refusal, Refusal::FingerprintMismatch);
    };
    mismatch("second").await;
    // Before the claim id is looked at: the holder's own call does not mean this event either.
    mismatch("first").await;
    assert!(matches!(fixture.claim(with(Some(1), "second")).await.decision, Decision::InProgress { .. }));
    assert!(matches!(fixture.claim(with(None, "second")).await.decision, Decision::InProgress { .. }));
    fixture.mark(completion(&key, &lock)).await;
    mismatch("second").await;
    assert_eq!(fixture.claim(with(Some(1), "second")).await.decision, Decision::AlreadyCompleted);
    let event = fixture.counted(&key, 6, 3).await;
    assert_eq!(event.fingerprint, Some([1; 32]));
    let last = event.last_mismatch_time.unwrap();
    assert!(event.create_time <= last && last <= fixture.now().await);
}

async fn the_fingerprint_is_fixed_by_the_first_grant_that_gives_one(fixture: &Fixture) {
    let key = key("evt_1");
    fixture.expired(&key, "first").await;
    // Not by a call that is not granted.
    let with = |byte: u8, claim_id| Claim { fingerprint: Some([byte; 32]), ..claim(&key, claim_id) };
    let second = fixture.acquire(claim(&key, "second")).await;
    fixture.claim(with(1, "third")).await;
    assert_eq!(fixture.event(&key).await.fingerprint, None);
    fixture.mark(failure(&key, &second, FailureKind::Retryable)).await;
    let third = fixture.acquire(with(2, "third")).await;
    assert_eq!(fixture.event(&key).await.fingerprint, Some([2; 32]));
    assert_eq!(refused(fixture.ledger.claim(with(1, "fourth")).await), Refusal::FingerprintMismatch);
    // And it stays, whatever comes.
    fixture.mark(failure(&key, &third, FailureKind::Unknown)).await;
    fixture.resolve(resolution(&key, Resolved::Pending)).await;
    assert_eq!(refused(fixture.ledger.claim(with(1, "fifth")).await), Refusal::FingerprintMismatch);
    fixture.acquire(claim(&key, "fifth")).await;
    assert_eq!(fixture.event(&key).await.fingerprint, Some([2; 32]));
}

async fn another_payload_is_told_and_counted_but_never_refused(fixture: &Fixture) {
    let key = key("evt_1");
    let with =
        |digest: Option<u8>, claim_id| Claim { payload_digest: digest.map(|byte| [byte; 32]), ..claim(&key, claim_id) };
    let lock = fixture.acquire(with(Some(1), "first")).await;
    for (digest, claim_id, changed) in
        [(Some(1), "second", false), (None, "second", false), (Some(2), "second", true), (Some(2), "first", true)]
    {
        let claimed = fixture.claim(with(digest, claim_id)).await;
        assert_eq!(claimed.payload_changed, changed, "{digest:?} by {claim_id}");
    }
    fixture.mark(failure(&key, &lock, FailureKind::Retryable)).await;
    // Against the latest attempt before the call; then the new attempt's digest is the one that counts.
    let claimed = fixture.claim(with(Some(3), "third")).await;
    assert!(matches!(claimed.decision, Decision::Acquired(_)) && claimed.payload_changed, "{claimed:?}");
    assert_eq!(latest(&claimed.event).payload_digest, Some([3; 32]));
    assert!(!fixture.claim(with(Some(3), "fourth")).await.payload_changed);
    assert!(fixture.claim(with(Some(1), "fourth")).await.payload_changed);
    let event = fixture.counted(&key, 5, 4).await;
    assert!(event.last_mismatch_time.is_some());
    let history = fixture.history_of(&key).await;
    assert_eq!(
        history.attempts.iter().map(|attempt| attempt.payload_digest).collect::<Vec<_>>(),
        [Some([1; 32]), Some([3; 32])]
    );
}

async fn a_delivery_id_with_another_payload_is_refused_whatever_the_event(fixture: &Fixture) {
    let (first, second, absent, third) = (key("evt_1"), key("evt_2"), key("absent"), key("evt_3"));
    let with = |key: &Key, delivery: &str, digest: u8, claim_id| Claim {
        delivery_id: Some(delivery.into()),
        payload_digest: Some([digest; 32]),
        ..claim(key, claim_id)
    };
    fixture.acquire(with(&first, "d-1", 1, "first")).await;
    // The same delivery again, also where it is said to be about another event, as long as it is the same payload.
    assert!(matches!(fixture.claim(with(&first, "d-1", 1, "second")).await.decision, Decision::InProgress { .. }));
    fixture.acquire(with(&second, "d-1", 1, "first")).await;
    let mismatch = async |claim: Claim| {
        assert_eq!(refused(fixture.ledger.claim(claim).await), Refusal::DeliveryMismatch);
    };
    mismatch(with(&first, "d-1", 2, "first")).await;
    mismatch(with(&first, "d-1", 2, "second")).await;
    mismatch(with(&absent, "d-1", 2, "first")).await;
    assert_eq!(fixture.ledger.history_of(absent.clone()).await.unwrap(), None, "a refused call creates nothing");
    // A delivery is recorded by a call that is not granted as well.
    assert!(matches!(fixture.claim(with(&first, "d-2", 1, "third")).await.decision, Decision::InProgress { .. }));
    mismatch(with(&absent, "d-2", 3, "first")).await;
    // Without a digest there is nothing to compare, and nothing is recorded.
    let without = Claim { payload_digest: None, ..with(&third, "d-3", 0, "first") };
    fixture.acquire(without).await;
    assert!(matches!(fixture.claim(with(&third, "d-3", 9, "second")).await.decision, Decision::InProgress { .. }));
    fixture.counted(&first, 4, 2).await;
    fixture.counted(&second, 0, 0).await;
    fixture.counted(&third, 1, 0).await;
}

async fn delivery_ids_belong_to_tenant_and_provider(fixture: &Fixture) {
    let base = key("evt_1");
    for (digest, key) in (1..).zip([
        base.clone(),
        Key { tenant: "other".into(), ..base.clone() },
        Key { provider: "paypal".into(), ..base.clone() },
    ]) {
        fixture
            .acquire(Claim {
                delivery_id: Some("d-1".into()),
                payload_digest: Some([digest; 32]),
                ..claim(&key, "claim")
            })
            .await;
    }
}

async fn duplicates_are_counted_once_each(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "first")).await;
    for round in 0..3 {
        fixture.claim(claim(&key, &format!("running-{round}"))).await;
    }
    // A caller that waits on asks again: only its last answer counts.
    for _ in 0..5 {
        let waiting = Claim { waiting: true, payload_digest: Some([1; 32]), ..claim(&key, "waiting") };
        fixture.claim(waiting).await;
    }
    let done = fixture.mark(completion(&key, &lock)).await.event;
    for round in 0..4 {
        fixture.claim(Claim { waiting: true, ..claim(&key, &format!("done-{round}")) }).await;
    }
    let event = fixture.counted(&key, 7, 0).await;
    assert_eq!(event.update_time, done.update_time, "counting is no change of the event");
    // Two flushes later there is still nothing more to come.
    fixture.claim(claim(&key, "last")).await;
    fixture.counted(&key, 8, 0).await;
}
