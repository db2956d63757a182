//! Resolve: what operators decide by hand, and the record of it.

use std::num::NonZeroU32;

use oncegate_sidecar::event::{
    Claim, Decision, FailureKind, FencingToken, Key, Lock, Loss, Mark, Outcome, Refusal, Resolution, Resolve, Resolved,
    State,
};

use super::{
    Fixture, assert_attempts_in_order, claim, completion, conformance, extension, failure, key, latest, lost_by,
    refused, resolution, result, taken_over,
};

conformance!(
    an_unknown_event_is_tried_again,
    an_event_is_completed_by_hand_with_a_result,
    an_event_is_put_away_and_brought_back,
    the_cap_starts_again_after_pending,
    a_completed_event_is_replayed_only_with_force,
    a_live_lock_is_not_resolved_and_an_expired_one_is,
    the_same_decision_again_is_success,
    a_repeated_decision_is_not_carried_out_on_what_came_after_it,
    a_decision_on_another_token_is_lost,
    every_decision_is_on_record,
);

async fn held(fixture: &Fixture, key: &Key) -> Lock {
    fixture.failed(key, FailureKind::Unknown).await
}

async fn an_unknown_event_is_tried_again(fixture: &Fixture) {
    let key = key("evt_1");
    let first = held(fixture, &key).await;
    let event = fixture.resolve(resolution(&key, Resolved::Pending)).await;
    assert_eq!((event.state, event.attempt_count, &event.latest), (State::Pending, 1, &None));
    assert!(event.fencing_token > first.fencing_token, "earlier holders are refused");
    assert_eq!((event.end_time, event.retry_time, &event.result), (None, None, &None));
    assert_eq!(event.last_error.as_deref(), Some("refused"));
    let refusal = refused(fixture.ledger.extend(extension(&key, &first, super::HOUR)).await);
    assert_eq!(refusal, taken_over(State::Pending, &event));
    let second = fixture.acquire(claim(&key, "second")).await;
    assert_eq!(second.attempt, 2);
    assert!(second.fencing_token > event.fencing_token);
    let history = fixture.history_of(&key).await;
    assert_attempts_in_order(&history);
    assert_eq!(
        history.attempts.iter().map(|attempt| attempt.outcome).collect::<Vec<_>>(),
        [Outcome::FailedUnknown, Outcome::Running]
    );
    assert_eq!(history.resolutions.len(), 1);
}

async fn an_event_is_completed_by_hand_with_a_result(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "first")).await;
    let failed = Mark { result: Some(result(504, b"late")), ..failure(&key, &lock, FailureKind::Unknown) };
    fixture.mark(failed).await;
    let resolve = Resolve { result: Some(result(200, b"found")), ..resolution(&key, Resolved::Completed) };
    let event = fixture.resolve(resolve).await;
    assert_eq!((event.state, event.end_time), (State::Completed, Some(event.update_time)));
    let claimed = fixture.claim(claim(&key, "second")).await;
    assert_eq!((claimed.decision, claimed.event.result), (Decision::AlreadyCompleted, Some(result(200, b"found"))));
    let history = fixture.history_of(&key).await;
    assert_eq!(super::only(&history.attempts).result, Some(result(504, b"late")), "the attempt keeps its own");

    // The failed attempt's result is not what a completed event answers.
    let other = super::key("evt_2");
    let lock = fixture.acquire(claim(&other, "first")).await;
    fixture.mark(Mark { result: Some(result(504, b"late")), ..failure(&other, &lock, FailureKind::Unknown) }).await;
    assert_eq!(fixture.resolve(resolution(&other, Resolved::Completed)).await.result, None);
}

async fn an_event_is_put_away_and_brought_back(fixture: &Fixture) {
    let key = key("evt_1");
    fixture.failed(&key, FailureKind::Retryable).await;
    let dead = fixture.resolve(resolution(&key, Resolved::Dead)).await;
    assert_eq!((dead.state, dead.end_time), (State::Dead, Some(dead.update_time)));
    assert_eq!(fixture.claim(claim(&key, "second")).await.decision, Decision::Refused);
    let pending = fixture.resolve(resolution(&key, Resolved::Pending)).await;
    assert_eq!((pending.state, pending.end_time), (State::Pending, None));
    assert!(pending.fencing_token > dead.fencing_token);
    let done = fixture.resolve(resolution(&key, Resolved::Completed)).await;
    assert_eq!(done.state, State::Completed, "from pending as well");
    assert_eq!(fixture.history_of(&key).await.resolutions.len(), 3);
}

async fn the_cap_starts_again_after_pending(fixture: &Fixture) {
    let key = key("evt_1");
    let capped = |claim_id: &str| Claim { attempts_max: NonZeroU32::new(2), ..claim(&key, claim_id) };
    let fail = async |lock: &_| {
        let mark = Mark { attempts_max: NonZeroU32::new(2), ..failure(&key, lock, FailureKind::Retryable) };
        fixture.mark(mark).await.event.state
    };
    for round in 0..3 {
        let first = fixture.acquire(capped(&format!("first-{round}"))).await;
        assert_eq!(fail(&first).await, State::Failed);
        let second = fixture.acquire(capped(&format!("second-{round}"))).await;
        assert_eq!(second.attempt, 2 * round + 2, "attempts go on counting");
        assert_eq!(fail(&second).await, State::Dead);
        assert_eq!(fixture.claim(capped("third")).await.decision, Decision::Refused);
        let event = fixture.resolve(resolution(&key, Resolved::Pending)).await;
        assert_eq!(event.attempts_forgiven, event.attempt_count);
    }
    // Dead and completed forgive nothing.
    let event = fixture.resolve(resolution(&key, Resolved::Dead)).await;
    assert_eq!((event.attempts_forgiven, event.attempt_count), (6, 6));
    assert_attempts_in_order(&fixture.history_of(&key).await);
}

async fn a_completed_event_is_replayed_only_with_force(fixture: &Fixture) {
    let key = key("evt_1");
    fixture.completed(&key).await;
    for (to, force) in [
        (Resolved::Pending, false),
        (Resolved::Completed, false),
        (Resolved::Completed, true),
        (Resolved::Dead, false),
        (Resolved::Dead, true),
    ] {
        let refusal = refused(fixture.ledger.resolve(Resolve { force, ..resolution(&key, to) }).await);
        let Refusal::StateConflict { from, to: asked, .. } = refusal else { panic!("{refusal:?}") };
        assert_eq!((from, asked), (State::Completed, to.state()));
    }
    assert!(fixture.history_of(&key).await.resolutions.is_empty());
    let event = fixture.resolve(Resolve { force: true, ..resolution(&key, Resolved::Pending) }).await;
    assert_eq!(event.state, State::Pending);
    let lock = fixture.acquire(claim(&key, "again")).await;
    assert_eq!(lock.attempt, 2);
    fixture.mark(completion(&key, &lock)).await;
    let history = fixture.history_of(&key).await;
    assert!(history.attempts.iter().all(|attempt| attempt.outcome == Outcome::Completed), "{history:?}");
}

async fn a_live_lock_is_not_resolved_and_an_expired_one_is(fixture: &Fixture) {
    let live = key("live");
    fixture.acquire(claim(&live, "claim")).await;
    for to in [Resolved::Pending, Resolved::Completed, Resolved::Dead] {
        let refusal = refused(fixture.ledger.resolve(Resolve { force: true, ..resolution(&live, to) }).await);
        assert!(matches!(refusal, Refusal::StateConflict { from: State::Processing, .. }), "{refusal:?}");
    }
    assert_eq!(latest(&fixture.event(&live).await).outcome, Outcome::Running);

    let expired = key("expired");
    let lock = fixture.expired(&expired, "claim").await;
    let event = fixture.resolve(resolution(&expired, Resolved::Pending)).await;
    let attempt = super::only(&fixture.history_of(&expired).await.attempts).clone();
    assert_eq!((attempt.outcome, attempt.end_time), (Outcome::LockExpired, Some(event.update_time)));
    let refusal = refused(fixture.ledger.mark(completion(&expired, &lock)).await);
    assert_eq!(refusal, taken_over(State::Pending, &event));

    let absent = resolution(&key("absent"), Resolved::Dead);
    assert_eq!(refused(fixture.ledger.resolve(absent).await), Refusal::NotFound);
}

async fn the_same_decision_again_is_success(fixture: &Fixture) {
    for to in [Resolved::Pending, Resolved::Completed, Resolved::Dead] {
        let key = key(to.state().as_str());
        let lock = held(fixture, &key).await;
        let token = Some(lock.fencing_token);
        let first = Resolve { fencing_token: token, result: Some(result(1, b"first")), ..resolution(&key, to) };
        let event = fixture.resolve(first.clone()).await;
        for token in [token, Some(event.fencing_token), None] {
            let again = Resolve { fencing_token: token, ..first.clone() };
            let repeated = fixture.resolve(again.clone()).await;
            assert_eq!(super::comparable(&repeated), super::comparable(&event), "{to:?}, {token:?}");
            // With anything else it is refused, and what stands is what it was.
            for (other, told) in [
                (Resolve { actor: "bea".into(), ..again.clone() }, "another actor,"),
                (Resolve { reason: "again".into(), ..again.clone() }, "another reason,"),
                (Resolve { result: Some(result(2, b"second")), ..again.clone() }, "another result,"),
                (Resolve { result: None, reason: "again".into(), ..again }, "another reason and another result,"),
            ] {
                let refusal = refused(fixture.ledger.resolve(other).await);
                assert!(matches!(refusal, Refusal::StateConflict { .. }), "{refusal:?}");
                assert!(refusal.to_string().contains(told), "{refusal}");
                assert_eq!(super::comparable(&fixture.event(&key).await), super::comparable(&event));
            }
        }
        assert_eq!(fixture.history_of(&key).await.resolutions.len(), 1);
    }
    // Once something came after it, it is another decision.
    let key = key(State::Pending.as_str());
    let lock = fixture.acquire(claim(&key, "second")).await;
    fixture.mark(failure(&key, &lock, FailureKind::Unknown)).await;
    fixture.resolve(resolution(&key, Resolved::Pending)).await;
    assert_eq!(fixture.history_of(&key).await.resolutions.len(), 2);
}

/// Its answer was lost, and gRPC's own client sends it again.
async fn a_repeated_decision_is_not_carried_out_on_what_came_after_it(fixture: &Fixture) {
    for ending in ["completed", "unknown"] {
        let key = key(ending);
        let fails = ending == "unknown";
        if fails {
            held(fixture, &key).await;
        } else {
            fixture.completed(&key).await;
        }
        let decided = Resolve { force: !fails, ..resolution(&key, Resolved::Pending) };
        fixture.resolve(decided.clone()).await;
        let lock = fixture.acquire(claim(&key, "second")).await;
        // While it is at work, and when it has ended.
        let refused_as_followed = async || {
            let refusal = refused(fixture.ledger.resolve(decided.clone()).await);
            let followed = matches!(refusal, Refusal::LockLost { loss: Loss::Followed, .. });
            assert!(followed && refusal.to_string().contains("another reason"), "{refusal:?}");
        };
        refused_as_followed().await;
        if fails {
            fixture.mark(failure(&key, &lock, FailureKind::Unknown)).await;
        } else {
            fixture.mark(completion(&key, &lock)).await;
        }
        refused_as_followed().await;
        let history = fixture.history_of(&key).await;
        assert_eq!((history.attempts.len(), history.resolutions.len()), (2, 1), "{ending}");
        // On what stands now it can be made again.
        let token = Some(lock.fencing_token);
        let again = fixture.resolve(Resolve { fencing_token: token, ..decided.clone() }).await;
        assert_eq!((again.state, fixture.history_of(&key).await.resolutions.len()), (State::Pending, 2));
    }
}

async fn a_decision_on_another_token_is_lost(fixture: &Fixture) {
    let key = key("evt_1");
    let first = fixture.failed(&key, FailureKind::Retryable).await;
    let second = fixture.acquire(claim(&key, "second")).await;
    fixture.mark(failure(&key, &second, FailureKind::Unknown)).await;
    let on = |token| Resolve { fencing_token: Some(token), ..resolution(&key, Resolved::Completed) };
    for token in [first.fencing_token, FencingToken(second.fencing_token.0 + 1)] {
        assert_eq!(refused(fixture.ledger.resolve(on(token)).await), lost_by(Loss::Changed, State::Unknown, &second));
    }
    let event = fixture.resolve(on(second.fencing_token)).await;
    assert_eq!(event.state, State::Completed);
    let refusal = refused(fixture.ledger.resolve(on(first.fencing_token)).await);
    let changed =
        Refusal::LockLost { loss: Loss::Changed, state: State::Completed, fencing_token: event.fencing_token };
    assert_eq!(refusal, changed);
}

async fn every_decision_is_on_record(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = held(fixture, &key).await;
    let mut expected = Vec::new();
    let (mut from_state, mut from_fencing_token) = (State::Unknown, lock.fencing_token);
    for (number, to) in [Resolved::Dead, Resolved::Pending, Resolved::Dead, Resolved::Pending, Resolved::Completed]
        .into_iter()
        .enumerate()
    {
        let request =
            Resolve { reason: format!("reason {number}"), actor: format!("actor {number}"), ..resolution(&key, to) };
        let event = fixture.resolve(request.clone()).await;
        expected.push(Resolution {
            from_state,
            to_state: to.state(),
            from_fencing_token,
            fencing_token: event.fencing_token,
            reason: request.reason,
            actor: request.actor,
            time: event.update_time,
        });
        (from_state, from_fencing_token) = (event.state, event.fencing_token);
    }
    let history = fixture.history_of(&key).await;
    assert_eq!(history.resolutions, expected);
    assert_eq!(history.attempts.len(), 1);
}
