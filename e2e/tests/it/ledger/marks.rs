//! MarkCompleted and MarkFailed: what is recorded, what is repeated, and who is too late.

use std::num::NonZeroU32;

use oncegate_sidecar::event::{
    Attempt, Claim, Decision, Ending, Event, FailureKind, FencingToken, Key, Loss, Mark, Outcome, Refusal, Resolve,
    Resolved, State, StoredResult, metadata,
};
use serde_json::{Value, json};

use super::{
    Fixture, HOUR, claim, comparable, completion, conformance, failure, key, latest, lost, lost_by, mark, only,
    refused, resolution, result, taken_over,
};

conformance!(
    a_completion_is_recorded_with_its_result,
    a_completion_is_repeated_and_the_first_result_stands,
    each_kind_of_failure_leads_to_its_state,
    a_failure_is_repeated_and_the_first_stands,
    another_outcome_is_a_conflict,
    a_mark_needs_the_token_and_the_claim_that_were_granted,
    a_mark_inserts_nothing,
    expiry_does_not_revoke,
    a_takeover_revokes,
    an_earlier_attempt_is_judged_by_its_own_record,
    a_mark_of_a_buried_attempt_is_accepted,
    a_mark_of_a_buried_failure_meets_its_record,
    completions_add_to_the_metadata,
    empty_values_are_kept_as_they_are,
    the_latest_failure_tells_the_error,
);

const KINDS: [(FailureKind, State, Outcome); 3] = [
    (FailureKind::Retryable, State::Failed, Outcome::FailedRetryable),
    (FailureKind::Terminal, State::Dead, Outcome::FailedTerminal),
    (FailureKind::Unknown, State::Unknown, Outcome::FailedUnknown),
];

async fn the_only_attempt(fixture: &Fixture, key: &Key) -> Attempt {
    only(&fixture.history_of(key).await.attempts).clone()
}

async fn a_completion_is_recorded_with_its_result(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "claim")).await;
    let request =
        Mark { claim_id: Some("claim".into()), result: Some(result(201, b"created")), ..completion(&key, &lock) };
    let marked = fixture.mark(request).await;
    assert!(!marked.repeated);
    let event = marked.event;
    assert_eq!((event.state, event.fencing_token), (State::Completed, lock.fencing_token));
    assert_eq!((event.end_time, event.retry_time), (Some(event.update_time), None));
    assert_eq!((&event.result, &event.last_error), (&Some(result(201, b"created")), &None));
    assert_eq!(latest(&event).outcome, Outcome::Completed);
    let attempt = the_only_attempt(fixture, &key).await;
    assert_eq!((attempt.outcome, attempt.end_time), (Outcome::Completed, event.end_time));
    assert_eq!((attempt.result, attempt.error), (Some(result(201, b"created")), None));
}

// T09
async fn a_completion_is_repeated_and_the_first_result_stands(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "claim")).await;
    let first = fixture.mark(Mark { result: Some(result(200, b"first")), ..completion(&key, &lock) }).await.event;
    for claim_id in [None, Some("claim".to_owned())] {
        let again = Mark {
            claim_id,
            result: Some(result(500, b"second")),
            ending: Ending::Completed { metadata: Some(r#"{"late":true}"#.into()) },
            ..completion(&key, &lock)
        };
        let marked = fixture.mark(again).await;
        assert!(marked.repeated);
        assert_eq!(super::comparable(&marked.event), super::comparable(&first));
    }
}

async fn each_kind_of_failure_leads_to_its_state(fixture: &Fixture) {
    for (kind, state, outcome) in KINDS {
        let key = key(outcome.as_str());
        let lock = fixture.acquire(claim(&key, "claim")).await;
        let ending = Ending::Failed { kind, error: Some("no answer".into()), retry_after: Some(HOUR) };
        let request = Mark { result: Some(result(502, b"bad")), ..mark(&key, &lock, ending) };
        let event = fixture.mark(request).await.event;
        assert_eq!((event.state, latest(&event).outcome), (state, outcome));
        assert_eq!((event.last_error.as_deref(), &event.result), (Some("no answer"), &Some(result(502, b"bad"))));
        // A failed event waits for another attempt; the others have ended.
        let waits = state == State::Failed;
        assert_eq!(event.end_time, (!waits).then_some(event.update_time));
        assert_eq!(event.retry_time, waits.then(|| event.update_time.plus(HOUR)));
        let attempt = the_only_attempt(fixture, &key).await;
        assert_eq!((attempt.outcome, attempt.end_time), (outcome, Some(event.update_time)));
        assert_eq!(attempt.error.as_deref(), Some("no answer"));
        assert_eq!(attempt.result, Some(result(502, b"bad")));
        // And whoever asks next is told so.
        let told = fixture.claim(claim(&key, "next")).await.decision;
        match state {
            State::Failed => assert!(matches!(told, Decision::InProgress { .. }), "{outcome:?}: {told:?}"),
            _ => assert_eq!(told, Decision::Refused, "{outcome:?}"),
        }
    }
}

async fn a_failure_is_repeated_and_the_first_stands(fixture: &Fixture) {
    for (kind, _, outcome) in KINDS {
        let key = key(outcome.as_str());
        let lock = fixture.acquire(claim(&key, "claim")).await;
        let first = fixture.mark(failure(&key, &lock, kind)).await.event;
        let ending = Ending::Failed { kind, error: Some("another".into()), retry_after: Some(HOUR) };
        let marked = fixture.mark(Mark { result: Some(result(1, b"")), ..mark(&key, &lock, ending) }).await;
        assert!(marked.repeated);
        assert_eq!(super::comparable(&marked.event), super::comparable(&first));
    }
}

async fn another_outcome_is_a_conflict(fixture: &Fixture) {
    let endings = |key: &_, lock: &_| {
        KINDS
            .map(|(kind, _, outcome)| (failure(key, lock, kind), outcome))
            .into_iter()
            .chain([(completion(key, lock), Outcome::Completed)])
            .collect::<Vec<_>>()
    };
    for first in 0..4 {
        let key = key(&format!("evt_{first}"));
        let lock = fixture.acquire(claim(&key, "claim")).await;
        let (request, recorded) = endings(&key, &lock).swap_remove(first);
        let event = fixture.mark(request).await.event;
        for (request, outcome) in endings(&key, &lock) {
            if outcome != recorded {
                let refusal = refused(fixture.ledger.mark(request).await);
                assert_eq!(refusal, Refusal::OutcomeConflict { recorded }, "{outcome} after {recorded}");
            }
        }
        assert_eq!(super::comparable(&fixture.event(&key).await), super::comparable(&event), "nothing changed");
    }
}

async fn a_mark_needs_the_token_and_the_claim_that_were_granted(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "claim")).await;
    for token in [lock.fencing_token.0 - 1, lock.fencing_token.0 + 1, 1, i64::MAX].map(FencingToken) {
        let request = Mark { fencing_token: token, ..completion(&key, &lock) };
        assert_eq!(refused(fixture.ledger.mark(request).await), lost(State::Processing, &lock));
    }
    let request = Mark { claim_id: Some("other".into()), ..completion(&key, &lock) };
    let refusal = refused(fixture.ledger.mark(request).await);
    assert_eq!(refusal, lost_by(Loss::OtherClaim, State::Processing, &lock));
    assert_eq!(fixture.event(&key).await.state, State::Processing);
    // Also of one that is recorded.
    fixture.mark(completion(&key, &lock)).await;
    let request = Mark { claim_id: Some("other".into()), ..completion(&key, &lock) };
    let refusal = refused(fixture.ledger.mark(request).await);
    assert_eq!(refusal, lost_by(Loss::OtherClaim, State::Completed, &lock));
}

async fn a_mark_inserts_nothing(fixture: &Fixture) {
    let (known, absent) = (key("evt_1"), key("evt_2"));
    let lock = fixture.acquire(claim(&known, "claim")).await;
    for request in [completion(&absent, &lock), failure(&absent, &lock, FailureKind::Terminal)] {
        assert_eq!(refused(fixture.ledger.mark(request).await), Refusal::NotFound);
    }
    assert_eq!(fixture.ledger.history_of(absent).await.unwrap(), None);
}

async fn expiry_does_not_revoke(fixture: &Fixture) {
    let completed = key("evt_1");
    let lock = fixture.expired(&completed, "claim").await;
    assert_eq!(fixture.mark(completion(&completed, &lock)).await.event.state, State::Completed);
    let failed = key("evt_2");
    let lock = fixture.expired(&failed, "claim").await;
    let event = fixture.mark(failure(&failed, &lock, FailureKind::Unknown)).await.event;
    assert_eq!(event.state, State::Unknown);
}

// T04
async fn a_takeover_revokes(fixture: &Fixture) {
    let key = key("evt_1");
    let first = fixture.expired(&key, "first").await;
    let second = fixture.acquire(claim(&key, "second")).await;
    for claim_id in [None, Some("first".to_owned()), Some("second".to_owned())] {
        let request = Mark { claim_id, ..completion(&key, &first) };
        assert_eq!(refused(fixture.ledger.mark(request).await), lost(State::Processing, &second));
    }
    // Not even the holder's own claim id helps an older token.
    fixture.mark(completion(&key, &second)).await;
    assert_eq!(refused(fixture.ledger.mark(completion(&key, &first)).await), lost(State::Completed, &second));
    let history = fixture.history_of(&key).await;
    assert_eq!(
        history.attempts.iter().map(|attempt| attempt.outcome).collect::<Vec<_>>(),
        [Outcome::LockExpired, Outcome::Completed]
    );
}

async fn an_earlier_attempt_is_judged_by_its_own_record(fixture: &Fixture) {
    let key = key("evt_1");
    let first = fixture.failed(&key, FailureKind::Retryable).await;
    let second = fixture.acquire(claim(&key, "second")).await;
    // The same outcome again is success, whatever came since; another is too late.
    let repeat = async |claim_id: Option<&str>| {
        let request = Mark { claim_id: claim_id.map(str::to_owned), ..failure(&key, &first, FailureKind::Retryable) };
        fixture.ledger.mark(request).await
    };
    let marked = repeat(None).await.unwrap();
    assert!(marked.repeated);
    assert_eq!((marked.event.state, marked.event.fencing_token), (State::Processing, second.fencing_token));
    assert!(repeat(Some("failer")).await.unwrap().repeated);
    assert_eq!(refused(repeat(Some("second")).await), lost(State::Processing, &second));
    for request in [completion(&key, &first), failure(&key, &first, FailureKind::Unknown)] {
        assert_eq!(refused(fixture.ledger.mark(request).await), lost(State::Processing, &second));
    }
    fixture.mark(failure(&key, &second, FailureKind::Unknown)).await;
    let event = fixture.resolve(resolution(&key, Resolved::Completed)).await;
    assert!(fixture.mark(failure(&key, &second, FailureKind::Unknown)).await.repeated, "the operator came later");
    let refusal = refused(fixture.ledger.mark(completion(&key, &second)).await);
    assert_eq!(refusal, taken_over(State::Completed, &event));
    // A resolution's token was granted to nobody.
    let request = Mark { fencing_token: event.fencing_token, ..completion(&key, &second) };
    let refusal = refused(fixture.ledger.mark(request).await);
    assert_eq!(refusal, taken_over(State::Completed, &event));
}

async fn a_mark_of_a_buried_attempt_is_accepted(fixture: &Fixture) {
    for (name, state) in [
        ("completed", State::Completed),
        ("retryable", State::Dead),
        ("terminal", State::Dead),
        ("unknown", State::Unknown),
    ] {
        let key = key(name);
        let lock = fixture.expired(&key, "first").await;
        let buried = fixture.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(&key, "second") }).await.event;
        assert_eq!(buried.state, State::Dead);
        let request = match name {
            "completed" => completion(&key, &lock),
            "retryable" => failure(&key, &lock, FailureKind::Retryable),
            "terminal" => failure(&key, &lock, FailureKind::Terminal),
            _ => failure(&key, &lock, FailureKind::Unknown),
        };
        let request = Mark { attempts_max: NonZeroU32::new(1), result: Some(result(7, b"late")), ..request };
        let outcome = request.ending.outcome();
        let marked = fixture.mark(request.clone()).await;
        assert_eq!((marked.repeated, marked.event.state), (false, state), "{name}");
        assert_eq!(marked.event.end_time, Some(marked.event.update_time));
        assert_eq!(
            (the_only_attempt(fixture, &key).await.outcome, marked.event.result),
            (outcome, request.result.clone())
        );
        assert!(fixture.mark(request).await.repeated);
    }
    // A cap that was raised since: the failed attempt may be followed by another one.
    let key = key("raised");
    let lock = fixture.expired(&key, "first").await;
    fixture.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(&key, "second") }).await;
    let event = fixture.mark(failure(&key, &lock, FailureKind::Retryable)).await.event;
    assert_eq!((event.state, event.end_time), (State::Failed, None));
    assert_eq!(fixture.acquire(claim(&key, "second")).await.attempt, 2);
}

async fn a_mark_of_a_buried_failure_meets_its_record(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.failed(&key, FailureKind::Retryable).await;
    let buried = fixture.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(&key, "second") }).await.event;
    assert_eq!(buried.state, State::Dead);
    let failed = failure(&key, &lock, FailureKind::Retryable);
    for claim_id in [None, Some("failer".to_owned())] {
        let marked = fixture.mark(Mark { claim_id, ..failed.clone() }).await;
        assert!(marked.repeated);
        assert_eq!(comparable(&marked.event), comparable(&buried));
    }
    let refusal = refused(fixture.ledger.mark(Mark { claim_id: Some("second".into()), ..failed.clone() }).await);
    assert_eq!(refusal, lost_by(Loss::OtherClaim, State::Dead, &lock));
    // Its token is still the event's: another outcome is no lost lock.
    let terminal = failure(&key, &lock, FailureKind::Terminal);
    for request in [completion(&key, &lock), terminal, failure(&key, &lock, FailureKind::Unknown)] {
        let refusal = refused(fixture.ledger.mark(request).await);
        assert_eq!(refusal, Refusal::OutcomeConflict { recorded: Outcome::FailedRetryable });
    }
    assert_eq!(the_only_attempt(fixture, &key).await.outcome, Outcome::FailedRetryable);
    // Until somebody decides otherwise.
    let resolved = fixture.resolve(resolution(&key, Resolved::Completed)).await;
    assert!(fixture.mark(failed).await.repeated);
    let refusal = refused(fixture.ledger.mark(completion(&key, &lock)).await);
    assert_eq!(refusal, taken_over(State::Completed, &resolved));
}

async fn completions_add_to_the_metadata(fixture: &Fixture) {
    let key = key("evt_1");
    let merged = |event: &Event| {
        let merged = metadata::merged(event.metadata.as_deref(), event.completion_metadata.as_deref());
        (Value::Object(merged.metadata), merged.left_out)
    };
    let request = Claim { metadata: Some(r#"{"a":{"x":1},"b":2}"#.into()), ..claim(&key, "first") };
    let lock = fixture.acquire(request).await;
    let adding = |lock: &_, json: Value| mark(&key, lock, Ending::Completed { metadata: Some(json.to_string()) });
    let event = fixture.mark(adding(&lock, json!({"a": {"y": "\u{1f600}\""}, "c": null}))).await.event;
    assert_eq!(merged(&event), (json!({"a": {"y": "\u{1f600}\""}, "b": 2, "c": null}), 0));

    // Replayed, it completes again and adds to what there is.
    fixture.resolve(Resolve { force: true, ..resolution(&key, Resolved::Pending) }).await;
    let lock = fixture.acquire(claim(&key, "second")).await;
    let event = fixture.mark(adding(&lock, json!({"c": 3, "d": [1.5, true]}))).await.event;
    assert_eq!(merged(&event), (json!({"a": {"y": "\u{1f600}\""}, "b": 2, "c": 3, "d": [1.5, true]}), 0));

    // What would pass the limit is left out of it; the completion is never refused.
    fixture.resolve(Resolve { force: true, ..resolution(&key, Resolved::Pending) }).await;
    let lock = fixture.acquire(claim(&key, "third")).await;
    let event = fixture.mark(adding(&lock, json!({"e": "x".repeat(9_000), "f": 1}))).await.event;
    let (merged, left_out) = merged(&event);
    assert_eq!((event.state, left_out), (State::Completed, 1));
    assert_eq!((&merged["f"], merged.get("e")), (&json!(1), None));
}

async fn empty_values_are_kept_as_they_are(fixture: &Fixture) {
    let key = key("evt_1");
    let lock =
        fixture.acquire(Claim { holder: String::new(), metadata: Some("{}".into()), ..claim(&key, "claim") }).await;
    let empty = StoredResult { code: 0, body: Default::default(), content_type: String::new() };
    let ending = Ending::Failed { kind: FailureKind::Retryable, error: Some(String::new()), retry_after: None };
    let event = fixture.mark(Mark { result: Some(empty.clone()), ..mark(&key, &lock, ending) }).await.event;
    assert_eq!((event.result, event.last_error.as_deref()), (Some(empty.clone()), Some("")));
    assert_eq!((event.metadata.as_deref(), latest(&fixture.event(&key).await).holder.as_str()), (Some("{}"), ""));
    fixture.acquire(claim(&key, "second")).await;
    let history = fixture.history_of(&key).await;
    let attempt = &history.attempts[0];
    assert_eq!((&attempt.result, attempt.error.as_deref(), attempt.holder.as_str()), (&Some(empty), Some(""), ""));
}

async fn the_latest_failure_tells_the_error(fixture: &Fixture) {
    let key = key("evt_1");
    fixture.failed(&key, FailureKind::Retryable).await;
    let lock = fixture.acquire(claim(&key, "second")).await;
    let silent = Ending::Failed { kind: FailureKind::Retryable, error: None, retry_after: None };
    assert_eq!(fixture.mark(mark(&key, &lock, silent)).await.event.last_error, None);
    let lock = fixture.acquire(claim(&key, "third")).await;
    fixture.mark(failure(&key, &lock, FailureKind::Retryable)).await;
    let lock = fixture.acquire(claim(&key, "fourth")).await;
    let event = fixture.mark(completion(&key, &lock)).await.event;
    assert_eq!((event.state, event.last_error.as_deref()), (State::Completed, Some("refused")));
    let history = fixture.history_of(&key).await;
    assert_eq!(
        history.attempts.iter().map(|attempt| attempt.error.as_deref()).collect::<Vec<_>>(),
        [Some("refused"), None, Some("refused"), None]
    );
}
