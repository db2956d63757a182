//! From the lock to the mark: every answer of the sidecar and of the application.

use std::time::Duration;

use oncegate_api::{
    reason,
    v1::{self, Decision, FailureKind, State},
};
use oncegate_gateway::config::{Enforcement, HeldStatus, InProgressStatus, OnRefusal, OnUnclear, Options};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, Status};

use crate::{
    application::{self, Reply},
    client::{self, Answer, PATIENCE, SECRET, STRIPE, event, webhook},
    harness::Harness,
    sidecar::{Call, Scripted, acquired, decided, error, lock, lock_lost, unavailable, unknown},
};

const SECONDS: fn(u64) -> Duration = Duration::from_secs;

fn said(word: &str) -> String {
    format!(r#"{{"status":"{word}"}}"#)
}

fn assert_said(answer: &Answer, status: u16, word: &str, retry_after: Option<&str>) {
    assert_eq!(answer.said(), (status, &*said(word)));
    assert_eq!(answer.header("retry-after"), retry_after, "{word}");
}

// T45
#[tokio::test]
async fn g6_without_a_lock_nothing_is_delivered_and_the_answer_says_why() {
    let harness = Harness::start().await;
    let scripted = |code, reason, retry| Scripted::Error(error(code, reason, &[], retry));
    for (scripted, status, word, retry_after) in [
        (Scripted::Answer(decided(Decision::AlreadyCompleted, State::Completed, None)), 200, "already_processed", None),
        (
            Scripted::Answer(decided(Decision::InProgress, State::Processing, Some(SECONDS(7)))),
            409,
            "in_progress",
            Some("7"),
        ),
        (
            Scripted::Answer(decided(Decision::InProgress, State::Failed, Some(Duration::from_millis(1_001)))),
            503,
            "paused",
            Some("2"),
        ),
        (Scripted::Answer(decided(Decision::Refused, State::Dead, None)), 422, "held", None),
        (Scripted::Answer(decided(Decision::Refused, State::Unknown, None)), 422, "held", None),
        (scripted(Code::FailedPrecondition, reason::FINGERPRINT_MISMATCH, None), 422, "conflict", None),
        (scripted(Code::FailedPrecondition, reason::DELIVERY_MISMATCH, None), 422, "conflict", None),
        (scripted(Code::Unavailable, reason::STORE_UNAVAILABLE, Some(SECONDS(4))), 503, "unavailable", Some("4")),
        (scripted(Code::Unavailable, reason::OVERLOADED, None), 503, "unavailable", Some("1")),
        (scripted(Code::ResourceExhausted, reason::QUOTA_EXCEEDED, Some(SECONDS(9))), 503, "unavailable", Some("9")),
        (scripted(Code::PermissionDenied, reason::PERMISSION_DENIED, None), 503, "unavailable", Some("1")),
        (scripted(Code::InvalidArgument, reason::INVALID_FIELD, None), 500, "failed", None),
        (scripted(Code::FailedPrecondition, reason::CLAIM_ENDED, None), 409, "in_progress", Some("1")),
    ] {
        let context = format!("{scripted:?}");
        harness.sidecar.claim(scripted);
        let answer = harness.deliver("evt_1").await;
        assert_eq!(answer.said(), (status, &*said(word)), "{context}");
        assert_eq!(answer.header("retry-after"), retry_after, "{context}");
    }
    assert!(harness.application.deliveries().is_empty(), "never without a lock");
    assert!(harness.sidecar.calls().iter().all(|call| matches!(call, Call::Claim(..))));
}

#[tokio::test]
async fn a_route_that_observes_delivers_no_event_under_the_delivery_id_of_another() {
    let harness = Harness::with(|options| Options { gateway_enforcement: Enforcement::Observe, ..options }).await;
    let mismatch = error(Code::FailedPrecondition, reason::DELIVERY_MISMATCH, &[], None);
    harness.sidecar.claim(Scripted::Error(mismatch));
    assert_said(&harness.deliver("evt_1").await, 422, "conflict", None);
    assert!(harness.application.deliveries().is_empty(), "signed by us, a forgery would look genuine");
    assert_eq!(harness.metric("oncegate_gateway_answers_total{answer=\"conflict\"}"), 1, "what the alert asks for");
    assert_eq!(harness.metric("oncegate_gateway_observed_total"), 0);
    // Events that are refused only for their state are delivered.
    harness.sidecar.claim(Scripted::Answer(decided(Decision::Refused, State::Dead, None)));
    assert_said(&harness.deliver("evt_2").await, 200, "processed", None);
    assert_eq!(harness.application.deliveries().len(), 1);
    assert_eq!(harness.metric("oncegate_gateway_observed_total"), 1);
}

#[tokio::test]
async fn a_route_that_observes_delivers_at_once_what_nobody_decides_about_and_marks_it_if_it_was_granted() {
    let harness = Harness::with(|options| Options { gateway_enforcement: Enforcement::Observe, ..options }).await;
    let made = |calls: &[Call], made: fn(&Call) -> bool| calls.iter().filter(|call| made(call)).count();
    for (round, reply, decision) in
        [(1, 200, Decision::Acquired), (2, 500, Decision::Acquired), (3, 200, Decision::InProgress)]
    {
        harness.sidecar.claim(unknown());
        harness.sidecar.claim(unknown());
        if decision == Decision::InProgress {
            let held = decided(decision, State::Processing, Some(SECONDS(7)));
            harness.sidecar.claim(Scripted::Answer(held));
        }
        harness.application.reply(Reply::Status(reply));
        let answer = harness.deliver(&format!("evt_{round}")).await;
        assert_said(&answer, reply, if reply == 200 { "processed" } else { "failed" }, None);
        let asked = |calls: &[Call]| made(calls, |call| matches!(call, Call::Claim(..))) == 3 * round;
        harness.sidecar.until(asked).await;
        let claims = &harness.sidecar.claims()[3 * (round - 1)..];
        assert!(claims.iter().all(|claim| claim.claim_id == claims[0].claim_id), "{claims:?}");
    }
    let marked = |calls: &[Call]| {
        made(calls, |call| matches!(call, Call::Completed(_))) == 1
            && made(calls, |call| matches!(call, Call::Failed(_))) == 1
    };
    harness.sidecar.until(marked).await;
    assert_eq!(harness.application.deliveries().len(), 3, "nothing is delivered again");
    let counted = |decision| harness.metric(&format!("oncegate_gateway_claims_total{{decision=\"{decision}\"}}"));
    assert_eq!((counted("failed"), harness.metric("oncegate_gateway_claims_total")), (3, 3), "each webhook once (I11)");
}

#[tokio::test]
async fn g6_by_choice_duplicates_and_held_events_are_answered_with_200() {
    let harness = Harness::with(|options| Options {
        gateway_in_progress_status: InProgressStatus::Ok,
        gateway_held_status: HeldStatus::Ok,
        ..options
    })
    .await;
    harness.sidecar.claim(Scripted::Answer(decided(Decision::InProgress, State::Processing, Some(SECONDS(7)))));
    assert_said(&harness.deliver("evt_1").await, 200, "in_progress", None);
    harness.sidecar.claim(Scripted::Answer(decided(Decision::Refused, State::Dead, None)));
    assert_said(&harness.deliver("evt_1").await, 200, "held", None);
    // Paused is not in progress: 200 there would lose the payment for certain.
    harness.sidecar.claim(Scripted::Answer(decided(Decision::InProgress, State::Failed, Some(SECONDS(7)))));
    assert_said(&harness.deliver("evt_1").await, 503, "paused", Some("7"));
}

// T44
#[tokio::test]
async fn g5_the_applications_status_decides_and_is_recorded() {
    let harness = Harness::start().await;
    for (reply, status, word, retry_after) in [
        (Reply::Status(204), 200, "processed", None),
        (Reply::Status(302), 500, "failed", None),
        (Reply::Status(404), 500, "failed", None),
        (Reply::Status(500), 500, "failed", None),
        (Reply::RetryAfter(503, "120"), 500, "failed", Some("120")),
        (Reply::RetryAfter(429, "nonsense"), 500, "failed", None),
    ] {
        harness.application.reply(reply.clone());
        let answer = harness.deliver("evt_1").await;
        assert_eq!(answer.said(), (status, &*said(word)), "{reply:?}");
        assert_eq!(answer.header("retry-after"), retry_after, "{reply:?}");
    }
    let codes: Vec<i32> = harness.sidecar.failures().iter().map(|mark| mark.result.as_ref().unwrap().code).collect();
    assert_eq!(codes, [302, 404, 500, 503, 429]);
    for mark in harness.sidecar.failures() {
        assert_eq!(mark.kind(), FailureKind::Retryable);
        // A pause in the ledger would use up the provider's tries.
        assert_eq!(mark.retry_after, None);
        assert_eq!(mark.error, format!("upstream answered {}", mark.result.unwrap().code));
    }
    assert_eq!(harness.sidecar.completions().len(), 1);
    // The redirect was not followed.
    assert_eq!(harness.application.deliveries().len(), 6);
}

#[tokio::test]
async fn g5_by_policy_a_refusal_is_terminal() {
    let harness = Harness::with(|options| Options { upstream_refusal: OnRefusal::Terminal, ..options }).await;
    for (code, kind) in [
        (400, FailureKind::Terminal),
        (410, FailureKind::Terminal),
        (301, FailureKind::Terminal),
        (408, FailureKind::Retryable),
        (503, FailureKind::Retryable),
    ] {
        harness.application.reply(Reply::Status(code));
        assert_eq!(harness.deliver("evt_1").await.status, 500);
        assert_eq!(harness.sidecar.failures().last().unwrap().kind(), kind, "{code}");
    }
}

#[tokio::test]
async fn g5_an_application_that_is_away_is_retryable_at_once() {
    let harness = Harness::with(|options| Options {
        upstream_url: Some(application::that_is_away()),
        upstream_unclear: OnUnclear::Unknown,
        ..options
    })
    .await;
    assert_said(&harness.deliver("evt_1").await, 500, "failed", None);
    let mark = harness.sidecar.failures().remove(0);
    // Nothing was sent, so nothing is unclear, whatever the policy.
    assert_eq!((mark.kind(), mark.retry_after), (FailureKind::Retryable, None));
}

#[tokio::test]
async fn g5_a_reset_after_sending_is_retryable_or_unknown() {
    let url = application::that_resets().await;
    for (policy, kind) in [(OnUnclear::Retryable, FailureKind::Retryable), (OnUnclear::Unknown, FailureKind::Unknown)] {
        let harness =
            Harness::with(|options| Options { upstream_url: Some(url.clone()), upstream_unclear: policy, ..options })
                .await;
        assert_said(&harness.deliver("evt_1").await, 500, "failed", None);
        let mark = harness.sidecar.failures().remove(0);
        assert_eq!((mark.kind(), mark.retry_after), (kind, None));
    }
}

#[tokio::test]
async fn g5_the_status_line_decides_however_many_headers_follow() {
    let headers: String = (0..150).map(|number| format!("x-header-{number}: value\r\n")).collect();
    let answer = format!("HTTP/1.1 200 OK\r\n{headers}content-length: 0\r\n\r\n");
    let url = application::that_answers(answer).await;
    let harness = Harness::with(|options| Options { upstream_url: Some(url), ..options }).await;
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
}

#[tokio::test]
async fn g5_an_answer_that_is_none_of_http_is_unclear_and_said_to_be_that() {
    let url = application::that_answers("ICY 200 OK\r\n\r\n".to_owned()).await;
    for (policy, kind) in [(OnUnclear::Retryable, FailureKind::Retryable), (OnUnclear::Unknown, FailureKind::Unknown)] {
        let harness =
            Harness::with(|options| Options { upstream_url: Some(url.clone()), upstream_unclear: policy, ..options })
                .await;
        assert_said(&harness.deliver("evt_1").await, 500, "failed", None);
        let mark = harness.sidecar.failures().remove(0);
        assert_eq!((mark.kind(), mark.retry_after, &*mark.error), (kind, None, "upstream's answer could not be read"));
    }
}

#[tokio::test]
async fn a_connection_that_went_stale_in_the_pool_costs_no_attempt() {
    let url = application::that_closes_quietly().await;
    let harness = Harness::with(|options| Options { upstream_url: Some(url), ..options }).await;
    for _ in 0..5 {
        assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    }
    assert!(harness.sidecar.failures().is_empty());
}

#[tokio::test]
async fn g5_of_a_body_no_more_is_read_than_is_allowed() {
    // More than all the buffers between the two hold.
    let (url, written) = application::that_floods(64 << 20).await;
    let harness =
        Harness::with(|options| Options { upstream_url: Some(url), upstream_body_timeout: SECONDS(600), ..options })
            .await;
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    let written = timeout(PATIENCE, written).await.expect("it ends in time").unwrap();
    assert!(written.is_err(), "all of it was taken");
}

#[tokio::test]
async fn g5_a_body_that_does_not_end_is_not_waited_for_for_ever() {
    let (url, closed) = application::that_stalls_in_its_body().await;
    let harness = Harness::with(|options| Options {
        upstream_url: Some(url),
        upstream_body_timeout: Duration::from_millis(100),
        ..options
    })
    .await;
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    timeout(PATIENCE, closed).await.expect("the connection is closed in time").unwrap();
}

fn with_short_timeout(options: Options) -> Options {
    Options {
        upstream_timeout: Duration::from_millis(200),
        upstream_connect_timeout: Duration::from_millis(100),
        ..options
    }
}

#[tokio::test]
async fn g5_after_a_time_out_the_next_attempt_waits_for_the_end_of_the_lock() {
    let harness = Harness::with(with_short_timeout).await;
    harness.application.reply(Reply::Never);
    let answer = harness.deliver("evt_1").await;
    assert_eq!(answer.said(), (500, &*said("failed")));
    let after: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((290..=300).contains(&after), "{after}");
    let mark = harness.sidecar.failures().remove(0);
    assert_eq!(mark.kind(), FailureKind::Retryable);
    assert_eq!(mark.error, "upstream did not answer in 200ms");
    let pause = mark.retry_after.unwrap().seconds;
    assert!((290..300).contains(&pause), "{pause}");
}

#[tokio::test]
async fn g5_by_policy_a_time_out_is_unknown() {
    let harness =
        Harness::with(|options| with_short_timeout(Options { upstream_unclear: OnUnclear::Unknown, ..options })).await;
    harness.application.reply(Reply::Never);
    assert_said(&harness.deliver("evt_1").await, 500, "failed", None);
    let mark = harness.sidecar.failures().remove(0);
    assert_eq!((mark.kind(), mark.retry_after), (FailureKind::Unknown, None));
}

#[tokio::test]
async fn g9_a_claim_whose_outcome_is_unknown_is_repeated_with_the_same_id_and_delivered_once() {
    let harness = Harness::with(|options| Options {
        sidecar_timeout: Duration::from_millis(300),
        sidecar_connect_timeout: Duration::from_millis(100),
        gateway_wait_duration: Duration::ZERO,
        ..options
    })
    .await;
    harness.sidecar.claim(unknown());
    // Once the outcome is unknown, a refusal says nothing about the first call.
    harness.sidecar.claim(unavailable(SECONDS(1)));
    harness.sidecar.claim(Scripted::Error(Status::cancelled("as tonic reports a deadline")));
    harness.sidecar.claim(Scripted::Hang);
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    let claims = harness.sidecar.claims();
    assert_eq!(claims.len(), 5);
    assert!(claims.iter().all(|claim| claim.claim_id == claims[0].claim_id));
    assert_eq!(harness.application.deliveries().len(), 1);
    assert_eq!(harness.metric("oncegate_gateway_claims_repeated_total"), 4);
    // Another delivery is another attempt.
    harness.deliver("evt_1").await;
    assert_ne!(harness.sidecar.claims()[5].claim_id, claims[0].claim_id);
}

/// Nobody learns the outcome of the first claim, nor of nine that repeat it.
async fn with_ten_unknown_claims() -> Harness {
    let harness = Harness::with(|options| Options {
        gateway_answer_timeout: SECONDS(8),
        sidecar_timeout: Duration::from_millis(300),
        sidecar_connect_timeout: Duration::from_millis(100),
        gateway_wait_duration: Duration::ZERO,
        ..options
    })
    .await;
    // With the shortest pauses (50 ms, doubling up to 1 s) the provider's patience of 4 s is over at the ninth call, and
    // with the longest (2 s) well before the answer's deadline.
    for _ in 0..10 {
        harness.sidecar.claim(unknown());
    }
    harness
}

// T45
#[tokio::test]
async fn g9_the_provider_of_a_claim_that_stays_unknown_is_sent_away_and_the_event_is_delivered_when_it_is_known() {
    let harness = with_ten_unknown_claims().await;
    assert_said(&harness.deliver("evt_1").await, 503, "unavailable", Some("1"));
    assert_eq!(harness.application.deliveries().len(), 0);
    harness.sidecar.until(|calls| matches!(calls.last(), Some(Call::Completed(_)))).await;
    let claims = harness.sidecar.claims();
    assert_eq!(claims.len(), 11);
    assert!(claims.iter().all(|claim| claim.claim_id == claims[0].claim_id));
    assert_eq!(harness.application.deliveries().len(), 1);
    assert_eq!(harness.metric("oncegate_gateway_claims_total{decision=\"acquired\"}"), 1);
    assert_eq!(harness.metric("oncegate_gateway_claims_total"), 1, "not when it was handed back (I11)");
}

#[tokio::test]
async fn g9_what_is_settled_in_the_background_stays_enforced_when_its_route_begins_to_observe() {
    let harness = with_ten_unknown_claims().await;
    // The provider's next try, on another gateway, completed it meanwhile.
    harness.sidecar.claim(Scripted::Answer(decided(Decision::AlreadyCompleted, State::Completed, None)));
    let answer = harness.deliver("evt_1");
    let switched = async {
        harness.sidecar.until(|calls| calls.len() >= 2).await;
        harness.observe();
    };
    let (answer, ()) = tokio::join!(answer, switched);
    assert_said(&answer, 503, "unavailable", Some("1"));
    harness.sidecar.until(|calls| calls.len() == 11).await;
    // The one that is observed is counted only after this, when the first has ended.
    harness.sidecar.claim(Scripted::Answer(decided(Decision::AlreadyCompleted, State::Completed, None)));
    assert_said(&harness.deliver("evt_2").await, 200, "processed", None);
    harness.shutdown.cancel();
    let (application, metric) = (harness.application.clone(), "oncegate_gateway_observed_total");
    assert_eq!(harness.metric(metric), 1);
    harness.ended().await.unwrap();
    assert_eq!(application.deliveries().len(), 1, "sent away, it came again elsewhere");
}

#[tokio::test]
async fn g9_a_lock_that_would_not_cover_the_delivery_is_extended_first() {
    let harness = Harness::start().await;
    // 240 s of time-out and the half of 15 s of margin do not fit.
    harness.sidecar.claim(Scripted::Answer(acquired(7, SECONDS(247))));
    harness.sidecar.extension(unknown());
    harness.sidecar.extension(Scripted::Answer(v1::ExtendLockResponse { lock: Some(lock(7, SECONDS(300))) }));
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    let calls = harness.sidecar.calls();
    let [Call::Claim(claim, _), Call::Extend(first), Call::Extend(second), Call::Completed(mark)] = &calls[..] else {
        panic!("{calls:?}")
    };
    assert_eq!((first.fencing_token, &first.claim_id), (7, &claim.claim_id));
    assert_eq!(first, second);
    assert_eq!(first.lock_duration.unwrap().seconds, 300);
    assert_eq!(mark.fencing_token, 7);
    let remaining = &harness.application.deliveries()[0].headers["oncegate-lock-remaining-ms"];
    assert!(remaining.to_str().unwrap().parse::<u64>().unwrap() > 290_000);
}

// S5: reaching the application takes time too, and it measures what is left from when it is reached.
#[tokio::test]
async fn g7_the_application_is_told_of_a_lock_without_the_time_that_reaching_it_may_take() {
    let harness = Harness::with(|options| Options {
        upstream_timeout: SECONDS(25),
        upstream_connect_timeout: SECONDS(20),
        ..options
    })
    .await;
    harness.sidecar.claim(Scripted::Answer(acquired(7, SECONDS(60))));
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    assert!(matches!(&harness.sidecar.calls()[..], [Call::Claim(..), Call::Completed(_)]), "it was not extended");
    let remaining = &harness.application.deliveries()[0].headers["oncegate-lock-remaining-ms"];
    let remaining: u64 = remaining.to_str().unwrap().parse().unwrap();
    assert!((12_500..=40_000).contains(&remaining), "{remaining}");
}

#[tokio::test]
async fn g8_half_of_the_margin_covers_the_calls_before_the_delivery() {
    // The lock is one second longer than it has to be. The claim took seven.
    let harness = Harness::with(|options| Options { upstream_timeout: SECONDS(284), ..options }).await;
    harness.sidecar.claim(Scripted::Answer(acquired(7, SECONDS(293))));
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    assert!(matches!(&harness.sidecar.calls()[..], [Call::Claim(..), Call::Completed(_)]));
}

#[tokio::test]
async fn g8_a_sidecar_slower_than_the_margin_costs_the_application_time_and_no_attempt() {
    let harness = Harness::with(|options| Options {
        upstream_timeout: Duration::from_millis(299_998),
        gateway_lock_margin: Duration::from_millis(1),
        ..options
    })
    .await;
    let latency = Duration::from_millis(20);
    harness.sidecar.claim(Scripted::Late(latency, acquired(7, SECONDS(300))));
    let extended = v1::ExtendLockResponse { lock: Some(lock(7, SECONDS(300))) };
    harness.sidecar.extension(Scripted::Late(latency, extended));
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    assert!(matches!(&harness.sidecar.calls()[..], [Call::Claim(..), Call::Extend(_), Call::Completed(_)]));
}

#[tokio::test]
async fn g8_a_delivery_ends_before_its_lock() {
    let harness = Harness::with(|options| Options {
        upstream_timeout: Duration::from_millis(900),
        upstream_connect_timeout: Duration::from_millis(100),
        gateway_lock_margin: Duration::from_millis(90),
        gateway_lock_duration: SECONDS(1),
        ..options
    })
    .await;
    harness.application.reply(Reply::Never);
    harness.sidecar.claim(Scripted::Answer(acquired(7, Duration::from_millis(500))));
    let extended = v1::ExtendLockResponse { lock: Some(lock(7, SECONDS(1))) };
    harness.sidecar.extension(Scripted::Late(Duration::from_millis(300), extended));
    assert_eq!(harness.deliver("evt_1").await.status, 500);
    assert_eq!(harness.application.deliveries().len(), 1);
    let mark = harness.sidecar.failures().remove(0);
    assert!(mark.retry_after.is_some(), "the lock is not over: {mark:?}");
    assert_ne!(mark.error, "upstream did not answer in 900ms");
}

#[tokio::test]
async fn g8_a_lock_that_cannot_be_extended_delivers_nothing() {
    let harness = Harness::start().await;
    let short = || Scripted::Answer(acquired(7, SECONDS(5)));

    harness.sidecar.claim(short());
    harness.sidecar.extension(lock_lost("STATE_PROCESSING"));
    assert_said(&harness.deliver("evt_1").await, 409, "in_progress", Some("1"));
    assert!(harness.sidecar.failures().is_empty(), "the lock is somebody else's");

    harness.sidecar.claim(short());
    harness.sidecar.extension(lock_lost("STATE_COMPLETED"));
    assert_said(&harness.deliver("evt_1").await, 200, "already_processed", None);

    // Still too short: the attempt ends, so that the next one does not have to wait for the lock.
    harness.sidecar.claim(short());
    harness.sidecar.extension(Scripted::Answer(v1::ExtendLockResponse { lock: Some(lock(7, SECONDS(9))) }));
    assert_said(&harness.deliver("evt_1").await, 500, "failed", None);
    assert_eq!(harness.sidecar.failures().remove(0).kind(), FailureKind::Retryable);

    assert!(harness.application.deliveries().is_empty());
}

// T09
#[tokio::test]
async fn g9_a_mark_is_repeated_until_it_is_answered_and_only_then_is_it_a_success() {
    let harness = Harness::start().await;
    harness.sidecar.mark(unknown());
    harness.sidecar.mark(unavailable(Duration::from_millis(10)));
    harness.sidecar.mark(Scripted::Error(Status::unknown("a proxy")));
    assert_said(&harness.deliver("evt_1").await, 200, "processed", None);
    let marks = harness.sidecar.completions();
    assert_eq!(marks.len(), 4);
    assert!(marks.iter().all(|mark| *mark == marks[0]));
    assert_eq!(harness.application.deliveries().len(), 1);

    harness.application.reply(Reply::Status(500));
    harness.sidecar.mark(unknown());
    assert_said(&harness.deliver("evt_1").await, 500, "failed", None);
    assert_eq!(harness.sidecar.failures().len(), 2);
    assert_eq!(harness.metric("oncegate_gateway_marks_repeated_total"), 4);
}

#[tokio::test]
async fn a_body_gives_its_share_of_the_budget_back_before_the_mark() {
    let harness = Harness::start().await;
    let left = || harness.metric("oncegate_gateway_body_budget_left_bytes");
    let whole = left();
    harness.application.reply(Reply::Held);
    let provider = tokio::spawn(client::deliver(harness.address, "evt_1"));
    harness.application.arrived(1).await;
    assert_eq!(left(), whole - 1_024);
    harness.sidecar.mark(Scripted::Hang);
    harness.application.release();
    harness.sidecar.until(|calls| matches!(calls, [Call::Claim(..), Call::Completed(_)])).await;
    assert_eq!(left(), whole);
    assert_said(&provider.await.unwrap(), 200, "processed", None);
}

#[tokio::test]
async fn g6_a_lost_lock_is_a_success_only_if_the_event_is_completed() {
    let harness = Harness::start().await;
    for (scripted, status, word, retry_after) in [
        (lock_lost("STATE_COMPLETED"), 200, "already_processed", None),
        (lock_lost("STATE_PROCESSING"), 409, "in_progress", Some("1")),
        (lock_lost("STATE_FAILED"), 409, "in_progress", Some("1")),
        (
            Scripted::Error(error(Code::FailedPrecondition, reason::OUTCOME_CONFLICT, &[], None)),
            409,
            "in_progress",
            Some("1"),
        ),
        (Scripted::Error(error(Code::NotFound, reason::EVENT_NOT_FOUND, &[], None)), 500, "failed", None),
    ] {
        let context = format!("{scripted:?}");
        harness.sidecar.mark(scripted);
        let answer = harness.deliver("evt_1").await;
        assert_eq!(answer.said(), (status, &*said(word)), "{context}");
        assert_eq!(answer.header("retry-after"), retry_after, "{context}");
    }
    assert_eq!(harness.sidecar.completions().len(), 5, "such a mark is not repeated");
    assert_eq!(harness.metric("oncegate_gateway_locks_lost_total"), 3);
}

#[tokio::test]
async fn g8_a_delivery_outlives_a_provider_that_hangs_up() {
    let harness = Harness::start().await;
    harness.application.reply(Reply::Held);
    let mut provider = TcpStream::connect(harness.address).await.unwrap();
    provider.write_all(webhook(&event("evt_1")).as_bytes()).await.unwrap();
    harness.application.arrived(1).await;
    drop(provider);
    harness.application.release();
    harness.sidecar.until(|calls| matches!(calls, [Call::Claim(..), Call::Completed(_)])).await;
}

#[tokio::test]
async fn g8_a_provider_that_hangs_up_during_the_claim_changes_nothing() {
    let harness = Harness::with(|options| Options {
        sidecar_timeout: Duration::from_millis(300),
        sidecar_connect_timeout: Duration::from_millis(100),
        gateway_wait_duration: Duration::ZERO,
        ..options
    })
    .await;
    harness.sidecar.claim(Scripted::Hang);
    let mut provider = TcpStream::connect(harness.address).await.unwrap();
    provider.write_all(webhook(&event("evt_1")).as_bytes()).await.unwrap();
    harness.sidecar.until(|calls| calls.len() == 1).await;
    drop(provider);
    // Whether that claim got the lock is unknown: it is repeated, and the event delivered.
    harness
        .sidecar
        .until(|calls| matches!(calls, [Call::Claim(one, _), Call::Claim(two, _), Call::Completed(_)] if one.claim_id == two.claim_id))
        .await;
    assert_eq!(harness.application.deliveries().len(), 1);
}

#[tokio::test]
async fn g8_after_the_answer_deadline_the_provider_is_sent_away_and_the_delivery_goes_on() {
    let harness = Harness::with(|options| Options {
        gateway_answer_timeout: Duration::from_millis(400),
        gateway_wait_duration: Duration::from_millis(50),
        sidecar_timeout: Duration::from_millis(300),
        sidecar_connect_timeout: Duration::from_millis(100),
        ..options
    })
    .await;
    harness.application.reply(Reply::Held);
    assert_said(&harness.deliver("evt_1").await, 503, "in_progress", Some("30"));
    assert_eq!(harness.sidecar.calls().len(), 1);
    assert_eq!(harness.metric("oncegate_gateway_deliveries_under_way"), 1);
    harness.application.release();
    harness.sidecar.until(|calls| matches!(calls, [Call::Claim(..), Call::Completed(_)])).await;
}

// S5: a body that comes slowly has used up some of the time in which the provider wants its answer.
#[tokio::test]
async fn g6_no_wait_for_another_attempt_outlasts_the_provider() {
    const LATE: Duration = Duration::from_millis(200);
    let (wait, call, answer) = (Duration::from_millis(17_400), Duration::from_millis(2_500), SECONDS(20));
    let harness = Harness::with(|options| Options {
        gateway_wait_duration: wait,
        sidecar_timeout: call,
        gateway_answer_timeout: answer,
        gateway_body_timeout: answer,
        gateway_body_first_byte_timeout: answer,
        ..options
    })
    .await;
    let body = event("evt_1");
    let signature = client::signature(SECRET, &body);
    let headers = [("stripe-signature", &*signature), ("expect", "100-continue")];
    let request = client::request("POST", STRIPE, &headers, &body);
    let mut provider = TcpStream::connect(harness.address).await.unwrap();
    provider.write_all(request.strip_suffix(&*body).unwrap().as_bytes()).await.unwrap();
    // Only then is it certain that its time has begun.
    let mut go_on = [0; 25];
    timeout(PATIENCE, provider.read_exact(&mut go_on)).await.expect("an answer in time").unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    tokio::time::sleep(LATE).await;
    provider.write_all(body.as_bytes()).await.unwrap();
    harness.sidecar.until(|calls| matches!(calls, [Call::Claim(..), Call::Completed(_)])).await;
    let asked: Duration = harness.sidecar.claims()[0].wait_duration.unwrap().try_into().unwrap();
    assert!(asked <= answer - LATE - call, "{asked:?}");
}
