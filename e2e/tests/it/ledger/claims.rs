//! CheckAndLock: what is granted, to whom, and what is kept of it.

use std::num::NonZeroU32;

use oncegate_sidecar::event::{
    Claim, Decision, Ending, Event, FailureKind, FencingToken, Key, Latest, Lock, Mark, Micros, Outcome, Resolve,
    Resolved, State, StoredResult,
};

use super::{
    Fixture, HOUR, MINUTE, assert_attempts_in_order, assert_holds, claim, completion, conformance, extension, failure,
    key, latest, mark, only, resolution, result,
};

conformance!(
    a_new_event_is_granted_with_all_that_the_claim_gave,
    the_largest_values_are_kept_whole,
    keys_differ_in_every_part,
    somebody_elses_lock_is_waited_for,
    the_same_claim_gets_the_same_lock_again,
    an_expired_lock_is_granted_to_its_own_claim_anew,
    an_expired_lock_is_taken_over,
    a_failed_event_is_granted_again,
    a_pause_is_waited_for,
    tokens_grow_over_all_events,
    peek_tells_where_events_are,
);

async fn a_new_event_is_granted_with_all_that_the_claim_gave(fixture: &Fixture) {
    let request = Claim {
        fingerprint: Some([1; 32]),
        payload_digest: Some([2; 32]),
        metadata: Some(r#"{"order":"A-1"}"#.into()),
        delivery_id: Some("delivery-1".into()),
        attempts_max: NonZeroU32::new(3),
        ..claim(&key("evt_1"), "claim-1")
    };
    let before = fixture.now().await;
    let claimed = fixture.claim(request.clone()).await;
    let after = fixture.now().await;
    let event = claimed.event;
    let Decision::Acquired(lock) = claimed.decision else { panic!("{:?}", claimed.decision) };
    assert!(!claimed.payload_changed);
    assert_holds(&event, &lock, &request);
    assert!(before <= event.create_time && event.create_time <= after, "the database's clock");
    let expected = Event {
        row: event.row,
        key: request.key.clone(),
        event_type: request.event_type.clone(),
        state: State::Processing,
        attempt_count: 1,
        attempts_forgiven: 0,
        duplicate_count: 0,
        mismatch_count: 0,
        last_mismatch_time: None,
        fencing_token: lock.fencing_token,
        create_time: event.create_time,
        update_time: event.create_time,
        end_time: None,
        retry_time: None,
        fingerprint: request.fingerprint,
        metadata: request.metadata.clone(),
        completion_metadata: None,
        result: None,
        last_error: None,
        latest: Some(Latest {
            claim_id: "claim-1".into(),
            holder: "pod-1".into(),
            start_time: event.create_time,
            lock_expire_time: event.create_time.plus(HOUR),
            outcome: Outcome::Running,
            payload_digest: request.payload_digest,
        }),
    };
    assert_eq!(super::comparable(&event), super::comparable(&expected));
    let history = fixture.history_of(&request.key).await;
    let attempt = only(&history.attempts);
    assert_eq!((attempt.attempt, attempt.fencing_token), (1, lock.fencing_token));
    assert_eq!((attempt.claim_id.as_str(), attempt.holder.as_str()), ("claim-1", "pod-1"));
    assert_eq!((attempt.outcome, attempt.end_time), (Outcome::Running, None));
    assert_eq!(attempt.payload_digest, request.payload_digest);
    assert!(history.resolutions.is_empty());
}

async fn the_largest_values_are_kept_whole(fixture: &Fixture) {
    let key = Key { tenant: "t".repeat(64), provider: "p".repeat(64), event_id: "~".repeat(255) };
    let request = Claim {
        event_type: "!".repeat(128),
        claim_id: "c".repeat(64),
        // 128 bytes that are not one each.
        holder: "\u{e4}".repeat(64),
        lock_duration: Micros(24 * HOUR.0),
        fingerprint: Some([0xff; 32]),
        payload_digest: Some([0; 32]),
        metadata: Some(format!(r#"{{"k":"{}"}}"#, "\u{2603}".repeat(2_728))),
        delivery_id: Some("d".repeat(128)),
        attempts_max: Some(NonZeroU32::MAX),
        ..claim(&key, "")
    };
    let claimed = fixture.claim(request.clone()).await;
    let Decision::Acquired(lock) = claimed.decision else { panic!("{:?}", claimed.decision) };
    assert_holds(&claimed.event, &lock, &request);
    let event = claimed.event;
    assert_eq!((&event.key, &event.event_type), (&key, &request.event_type));
    assert_eq!((&latest(&event).claim_id, &latest(&event).holder), (&request.claim_id, &request.holder));

    let largest = |code| StoredResult {
        code,
        body: (0..64 * 1024).map(|byte: u32| byte.to_le_bytes()[0]).collect::<Vec<_>>().into(),
        content_type: "x".repeat(128),
    };
    let error = "\u{1f4b8}".repeat(512);
    let ending = Ending::Failed {
        kind: FailureKind::Retryable,
        error: Some(error.clone()),
        retry_after: Some(Micros(7 * 24 * HOUR.0)),
    };
    let failed = Mark {
        result: Some(largest(i32::MIN)),
        claim_id: Some(request.claim_id.clone()),
        attempts_max: Some(NonZeroU32::MAX),
        ..mark(&key, &lock, ending)
    };
    let event = fixture.mark(failed).await.event;
    assert_eq!(event.retry_time, Some(event.update_time.plus(Micros(7 * 24 * HOUR.0))));
    assert_eq!((&event.last_error, &event.result), (&Some(error), &Some(largest(i32::MIN))));

    let resolve = Resolve {
        reason: "\u{e4}".repeat(256),
        actor: "a".repeat(128),
        result: Some(largest(i32::MAX)),
        ..resolution(&key, Resolved::Completed)
    };
    let event = fixture.resolve(resolve.clone()).await;
    assert_eq!(event.result, Some(largest(i32::MAX)));
    let history = fixture.history_of(&key).await;
    assert_eq!(only(&history.attempts).result, Some(largest(i32::MIN)), "the attempt keeps its own");
    assert_eq!((&history.resolutions[0].reason, &history.resolutions[0].actor), (&resolve.reason, &resolve.actor));
}

// T43
async fn keys_differ_in_every_part(fixture: &Fixture) {
    let base = key("evt_a");
    for other in [
        base.clone(),
        key("evt_A"),
        key("evt_"),
        Key { tenant: "Default".into(), ..base.clone() },
        Key { provider: "stripe-eu".into(), ..base.clone() },
        Key { tenant: "default.s".into(), provider: "tripe".into(), ..base.clone() },
    ] {
        // The same claim id on each: it belongs to the event.
        assert_eq!(fixture.acquire(claim(&other, "claim")).await.attempt, 1, "{other:?}");
    }
}

async fn somebody_elses_lock_is_waited_for(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "first")).await;
    let claimed = fixture.claim(claim(&key, "second")).await;
    let Decision::InProgress { retry_after } = claimed.decision else { panic!("{:?}", claimed.decision) };
    assert!(retry_after > MINUTE && retry_after <= HOUR, "{retry_after:?}");
    assert_eq!((claimed.event.fencing_token, claimed.event.attempt_count), (lock.fencing_token, 1));
    assert_eq!(latest(&claimed.event).claim_id, "first");
    assert!(!claimed.payload_changed);
}

// T07
async fn the_same_claim_gets_the_same_lock_again(fixture: &Fixture) {
    let key = key("evt_1");
    let first = fixture.acquire(claim(&key, "claim")).await;
    // S4: whatever else the repeated call says, it changes nothing.
    let again = Claim { lock_duration: Micros(2 * HOUR.0), holder: "pod-2".into(), ..claim(&key, "claim") };
    let second = fixture.acquire(again).await;
    assert!(second.remaining <= first.remaining);
    assert_eq!(Lock { remaining: first.remaining, ..second }, first);
    // What was extended meanwhile is what the claim holds.
    let extended = fixture.ledger.extend(extension(&key, &first, Micros(3 * HOUR.0))).await.unwrap();
    let third = fixture.acquire(claim(&key, "claim")).await;
    assert_eq!((third.fencing_token, third.expire_time), (first.fencing_token, extended.expire_time));
    assert_eq!(latest(&fixture.event(&key).await).holder, "pod-1");
    // None of this was a duplicate: the one that follows is the only one.
    fixture.claim(claim(&key, "other")).await;
    fixture.counted(&key, 1, 0).await;
}

async fn an_expired_lock_is_granted_to_its_own_claim_anew(fixture: &Fixture) {
    let key = key("evt_1");
    let first = fixture.expired(&key, "claim").await;
    let second = fixture.acquire(claim(&key, "claim")).await;
    assert_eq!(second.attempt, 2);
    assert!(second.fencing_token > first.fencing_token);
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
    assert_eq!(
        history.attempts.iter().map(|attempt| (attempt.claim_id.as_str(), attempt.outcome)).collect::<Vec<_>>(),
        [("claim", Outcome::LockExpired), ("claim", Outcome::Running)]
    );
    // The archive has the claim id, and the attempt that runs has it too: it is still the holder's (S4).
    let third = fixture.acquire(claim(&key, "claim")).await;
    assert_eq!(third.fencing_token, second.fencing_token);
}

async fn an_expired_lock_is_taken_over(fixture: &Fixture) {
    let key = key("evt_1");
    let first = fixture.expired(&key, "first").await;
    let request = Claim { holder: "pod-2".into(), payload_digest: Some([2; 32]), ..claim(&key, "second") };
    let claimed = fixture.claim(request.clone()).await;
    let Decision::Acquired(second) = claimed.decision else { panic!("{:?}", claimed.decision) };
    assert_holds(&claimed.event, &second, &request);
    assert_eq!(second.attempt, 2);
    assert!(second.fencing_token > first.fencing_token);
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
    let [taken, running] = &history.attempts[..] else { panic!("{history:?}") };
    assert_eq!((taken.outcome, taken.fencing_token), (Outcome::LockExpired, first.fencing_token));
    assert_eq!(taken.end_time, Some(running.start_time), "it ended when it was taken over");
    assert_eq!((running.outcome, running.payload_digest), (Outcome::Running, Some([2; 32])));
    assert_eq!(history.event.update_time, running.start_time);
}

async fn a_failed_event_is_granted_again(fixture: &Fixture) {
    let key = key("evt_1");
    let request = Claim { metadata: Some(r#"{"a":1}"#.into()), ..claim(&key, "first") };
    let first = fixture.acquire(request).await;
    let failed = Mark { result: Some(result(503, b"later")), ..failure(&key, &first, FailureKind::Retryable) };
    let failed = fixture.mark(failed).await.event;
    let again = Claim { metadata: Some(r#"{"b":2}"#.into()), event_type: "other".into(), ..claim(&key, "second") };
    let claimed = fixture.claim(again).await;
    let Decision::Acquired(second) = &claimed.decision else { panic!("{:?}", claimed.decision) };
    let event = &claimed.event;
    assert_eq!((second.attempt, event.state), (2, State::Processing));
    assert!(second.fencing_token > first.fencing_token);
    // The result belongs to the attempt that ended; the error is told until the next one.
    assert_eq!((&event.result, event.last_error.as_deref()), (&None, Some("refused")));
    assert_eq!((event.end_time, event.retry_time), (None, None));
    // Type and metadata are the creating call's.
    assert_eq!(event.event_type, "payment_intent.succeeded");
    assert_eq!(super::comparable(event).metadata.as_deref(), Some(r#"{"a":1}"#));
    assert_eq!(event.create_time, failed.create_time);
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
    let first = &history.attempts[0];
    assert_eq!((first.outcome, first.error.as_deref()), (Outcome::FailedRetryable, Some("refused")));
    assert_eq!((&first.result, first.end_time), (&Some(result(503, b"later")), Some(failed.update_time)));
    assert_eq!((&history.attempts[1].error, &history.attempts[1].result), (&None, &None));
}

async fn a_pause_is_waited_for(fixture: &Fixture) {
    let paused = |pause| Ending::Failed { kind: FailureKind::Retryable, error: None, retry_after: Some(pause) };
    let long = key("evt_long");
    let lock = fixture.acquire(claim(&long, "first")).await;
    let event = fixture.mark(mark(&long, &lock, paused(HOUR))).await.event;
    assert_eq!(event.retry_time, Some(event.update_time.plus(HOUR)));
    let claimed = fixture.claim(claim(&long, "second")).await;
    let Decision::InProgress { retry_after } = claimed.decision else { panic!("{:?}", claimed.decision) };
    assert!(retry_after > MINUTE && retry_after <= HOUR, "{retry_after:?}");
    assert_eq!(claimed.event.state, State::Failed);

    let short = key("evt_short");
    let lock = fixture.acquire(claim(&short, "first")).await;
    let event = fixture.mark(mark(&short, &lock, paused(Micros(20_000)))).await.event;
    fixture.passed(event.retry_time.unwrap()).await;
    assert_eq!(fixture.acquire(claim(&short, "second")).await.attempt, 2);

    let none = key("evt_none");
    let lock = fixture.acquire(claim(&none, "first")).await;
    let event = fixture.mark(mark(&none, &lock, paused(Micros::ZERO))).await.event;
    assert_eq!(event.retry_time, None);
    assert_eq!(fixture.acquire(claim(&none, "second")).await.attempt, 2);
}

async fn tokens_grow_over_all_events(fixture: &Fixture) {
    let mut last = FencingToken::NONE;
    for round in 0..20 {
        for event in 0..5 {
            let key = key(&format!("evt_{event}"));
            let lock = fixture.expired(&key, &format!("claim-{round}")).await;
            assert!(lock.fencing_token > last, "{} after {last}", lock.fencing_token);
            last = lock.fencing_token;
        }
    }
    // S2: they start at the epoch in microseconds, so that an older database's are smaller.
    assert!(last.0 > 1_700_000_000_000_000, "{last}");
}

async fn peek_tells_where_events_are(fixture: &Fixture) {
    let (done, held, absent) = (key("evt_done"), key("evt_held"), key("evt_absent"));
    let lock = fixture.acquire(claim(&done, "claim")).await;
    fixture.mark(completion(&done, &lock)).await;
    let held_lock = fixture.acquire(claim(&held, "claim")).await;
    let mut found = fixture.ledger.peek(vec![absent, held.clone(), done.clone()]).await.unwrap();
    found.sort();
    assert_eq!(
        found,
        [(done, State::Completed, lock.fencing_token), (held, State::Processing, held_lock.fencing_token)]
    );
    assert!(fixture.ledger.peek(Vec::new()).await.unwrap().is_empty());
}
