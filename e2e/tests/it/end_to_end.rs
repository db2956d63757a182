//! The main job, by the built program: signed webhooks in, one delivery out, the provider's answer true.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{EventKey, Outcome, ResolveRequest, State};
use oncegate_e2e::{eventually, http_client, stripe, upstream::Answer};

use crate::setup::{Everything, Ledger, SECRET, on_each_ledger, send_signed, word};

on_each_ledger!(
    duplicates_are_answered_and_delivered_once,
    concurrent_duplicates_are_delivered_once,
    a_failed_delivery_is_tried_again_as_the_next_attempt,
    an_unverified_webhook_leaves_nothing_behind,
    a_delivery_under_way_is_finished_before_the_end,
    what_is_completed_stays_completed_over_a_restart,
    a_changed_body_is_seen_in_history_and_a_retry_with_one_is_delivered,
    a_duplicate_in_one_process_is_counted_and_logged_as_the_call_that_it_saves,
    in_one_process_a_replay_is_delivered_and_not_answered_as_a_duplicate,
    in_one_process_duplicates_are_of_their_tenants_quota,
);

async fn duplicates_are_answered_and_delivered_once(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let id = stripe::event_id();
    let body = stripe::event(&id, "payment_intent.succeeded");

    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    for _ in 0..5 {
        assert_eq!(word(&everything.send(&body).await?), "200 already_processed");
    }

    let deliveries = everything.upstream.requests();
    assert_eq!(deliveries.len(), 1, "one delivery: {deliveries:#?}");
    let delivery = &deliveries[0];
    assert_eq!(&delivery.body[..], &body[..], "the bytes that were signed");
    assert_eq!(delivery.uri, "/payments");
    for (name, value) in [
        ("idempotency-key", format!("default/stripe/{id}").as_str()),
        ("oncegate-tenant", "default"),
        ("oncegate-provider", "stripe"),
        ("oncegate-event-id", &id),
        ("oncegate-event-type", "payment_intent.succeeded"),
        ("oncegate-attempt", "1"),
    ] {
        assert_eq!(delivery.header(name), value, "{name}");
    }
    assert!(delivery.header(stripe::HEADER).contains("v1="), "the application can verify the signature itself");

    let history = everything.history(&id).await?.context("the event is remembered")?;
    let event = history.event.context("with its state")?;
    assert_eq!((event.state(), event.attempt_count), (State::Completed, 1));
    assert_eq!(delivery.header("oncegate-fencing-token"), event.fencing_token.to_string());
    Ok(())
}

async fn concurrent_duplicates_are_delivered_once(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    everything.upstream.answer_otherwise(Answer::ok().after(Duration::from_millis(200)));
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let answers = futures::future::try_join_all((0..24).map(|_| everything.send(&body))).await?;
    let mut words: Vec<String> = answers.iter().map(word).collect();
    words.sort();
    assert_eq!(words.iter().filter(|word| *word == "200 processed").count(), 1, "{words:?}");
    assert_eq!(words.iter().filter(|word| *word == "200 already_processed").count(), 23, "{words:?}");
    assert_eq!(everything.upstream.requests().len(), 1);
    Ok(())
}

async fn a_failed_delivery_is_tried_again_as_the_next_attempt(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    everything.upstream.answer_next([Answer::status(500), Answer::reset(), Answer::status(302)]);
    let id = stripe::event_id();
    let body = stripe::event(&id, "invoice.paid");

    for _ in 0..3 {
        assert_eq!(word(&everything.send(&body).await?), "500 failed");
    }
    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    assert_eq!(word(&everything.send(&body).await?), "200 already_processed");

    let deliveries = everything.upstream.requests();
    let attempts: Vec<&str> = deliveries.iter().map(|delivery| delivery.header("oncegate-attempt")).collect();
    assert_eq!(attempts, ["1", "2", "3", "4"]);
    let tokens: Vec<i64> = deliveries
        .iter()
        .map(|delivery| delivery.header("oncegate-fencing-token").parse())
        .collect::<Result<_, _>>()?;
    assert!(tokens.is_sorted_by(|earlier, later| earlier < later), "tokens grow: {tokens:?}");

    let history = everything.history(&id).await?.context("the event is remembered")?;
    let outcomes: Vec<Outcome> = history.attempts.iter().map(|attempt| attempt.outcome()).collect();
    let failed = Outcome::FailedRetryable;
    assert_eq!(outcomes, [failed, failed, failed, Outcome::Completed]);
    Ok(())
}

async fn an_unverified_webhook_leaves_nothing_behind(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let body = stripe::event(&stripe::event_id(), "payment_intent.succeeded");
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let good = stripe::sign(SECRET, &body);
    let mut answers = Vec::new();
    for signature in [
        stripe::sign("whsec_of_somebody_else", &body),
        stripe::sign(SECRET, b"another body"),
        stripe::sign_at(SECRET, &body, now - 3600),
        stripe::sign_at(SECRET, &body, now + 3600),
        good.replace("v1=", "v0="),
        good[..good.len() - 2].to_owned(),
        "t=,v1=".to_owned(),
    ] {
        let answer = send_signed(everything.gateway, &signature, &body).await?;
        assert_eq!(answer.status, 401, "{signature}");
        answers.push(answer.body);
    }
    let unsigned = http_client::post(everything.gateway, crate::setup::STRIPE, &[], body.clone()).await?;
    assert_eq!(unsigned.status, 401);
    answers.push(unsigned.body);
    answers.dedup();
    assert_eq!(answers.len(), 1, "the answer does not tell why: {answers:?}");
    assert_eq!(everything.events().await?, 0, "no row");
    assert!(everything.upstream.requests().is_empty());
    Ok(())
}

async fn a_delivery_under_way_is_finished_before_the_end(ledger: Ledger) -> Result<()> {
    let mut everything = Everything::start(ledger).await?;
    assert_eq!(http_client::get(everything.admin, "/livez").await?.status, 200);
    eventually("it is ready", async || {
        http_client::get(everything.admin, "/readyz").await.is_ok_and(|answer| answer.status == 200).then_some(())
    })
    .await;
    everything.upstream.answer_otherwise(Answer::ok().after(Duration::from_secs(1)));
    let body = stripe::event(&stripe::event_id(), "payment_intent.succeeded");
    let gateway = everything.gateway;
    let signature = stripe::sign(SECRET, &body);
    let under_way = tokio::spawn(async move { send_signed(gateway, &signature, &body).await });
    everything.upstream.wait_for(1).await;

    let finished = everything.program.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert_eq!(word(&under_way.await??), "200 processed");
    assert!(http_client::get(gateway, "/webhooks/payments/health").await.is_err(), "nobody listens any more");
    Ok(())
}

async fn what_is_completed_stays_completed_over_a_restart(ledger: Ledger) -> Result<()> {
    let mut everything = Everything::start(ledger).await?;
    let body = stripe::event(&stripe::event_id(), "payment_intent.succeeded");
    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    everything.program.kill().await?;

    everything.restart().await?;
    assert_eq!(word(&everything.send(&body).await?), "200 already_processed");
    assert_eq!(everything.upstream.requests().len(), 1);
    let health = http_client::get(everything.gateway, "/webhooks/payments/health").await?;
    assert_eq!(health.status, 200);
    assert_eq!(health.json()["statistics"]["completed"], 1, "{}", health.json());
    Ok(())
}

// T43
async fn a_changed_body_is_seen_in_history_and_a_retry_with_one_is_delivered(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    everything.upstream.answer_next([Answer::status(500)]);
    let id = stripe::event_id();
    let body = stripe::event(&id, "invoice.paid");
    // What Stripe changes between tries by itself.
    let changed = String::from_utf8(body.clone())?.replace("\"pending_webhooks\": 1", "\"pending_webhooks\": 2");
    assert_ne!(changed.as_bytes(), body);

    assert_eq!(word(&everything.send(&body).await?), "500 failed");
    assert_eq!(word(&everything.send(changed.as_bytes()).await?), "200 processed");
    assert_eq!(&everything.upstream.requests()[1].body[..], changed.as_bytes(), "the retry's own bytes");
    assert_eq!(word(&everything.send(&body).await?), "200 already_processed");
    assert_eq!(word(&everything.send(changed.as_bytes()).await?), "200 already_processed");

    eventually("both changed bodies are counted", async || {
        let history = everything.history(&id).await.ok()??;
        assert!(history.mismatch_count <= 2, "{}", history.mismatch_count);
        assert!(history.attempts[0].payload_digest != history.attempts[1].payload_digest);
        (history.mismatch_count == 2 && history.last_mismatch_time.is_some()).then_some(())
    })
    .await;
    Ok(())
}

async fn a_duplicate_in_one_process_is_counted_and_logged_as_the_call_that_it_saves(ledger: Ledger) -> Result<()> {
    let mut everything = Everything::start_with(ledger, &[("ONCEGATE_LOG_FORMAT", "json")]).await?;
    let id = stripe::event_id();
    let body = stripe::event(&id, "charge.succeeded");
    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    for _ in 0..5 {
        assert_eq!(word(&everything.send(&body).await?), "200 already_processed");
    }
    let page = String::from_utf8(http_client::get(everything.admin, "/metrics").await?.body.to_vec())?;
    for line in [
        "oncegate_rpc_requests_total{method=\"CheckAndLock\",code=\"OK\"} 6",
        "oncegate_claims_total{decision=\"acquired\"} 1",
        "oncegate_claims_total{decision=\"duplicate\"} 5",
        "oncegate_gateway_claims_total{provider=\"stripe\",decision=\"duplicate\"} 5",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is not in {page}");
    }
    eventually("History has the duplicates", async || {
        (everything.history(&id).await.ok()??.event?.duplicate_count == 5).then_some(())
    })
    .await;
    let log = everything.program.stop().await?.stderr;
    let calls = log.lines().filter(|line| line.contains("oncegate_sidecar::access") && line.contains("\"duplicate\""));
    assert_eq!(calls.count(), 5, "{log}");
    Ok(())
}

// C7
async fn in_one_process_a_replay_is_delivered_and_not_answered_as_a_duplicate(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let id = stripe::event_id();
    let body = stripe::event(&id, "charge.succeeded");
    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    for deliveries in 2..4 {
        assert_eq!(word(&everything.send(&body).await?), "200 already_processed");
        let replay = ResolveRequest {
            key: Some(EventKey { provider: "stripe".into(), event_id: id.clone(), ..Default::default() }),
            to: State::Pending.into(),
            reason: format!("the booking of delivery {deliveries} was rolled back"),
            actor: "a test".into(),
            force: true,
            ..Default::default()
        };
        everything.client().await?.resolve(replay).await?;
        assert_eq!(word(&everything.send(&body).await?), "200 processed");
        assert_eq!(everything.upstream.requests().len(), deliveries);
    }
    Ok(())
}

async fn in_one_process_duplicates_are_of_their_tenants_quota(ledger: Ledger) -> Result<()> {
    let everything = Everything::start_with(ledger, &[("SIDECAR_TENANT_CALLS_PER_SECOND", "1")]).await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    eventually("a duplicate is beyond the quota", async || {
        (word(&everything.send(&body).await.ok()?) == "503 unavailable").then_some(())
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn in_one_process_a_sidecar_elsewhere_is_not_called_and_the_log_says_so() -> Result<()> {
    const SAID: &str = "SIDECAR_URL is set and not used";
    let everything = Everything::start_with(Ledger::Sqlite, &[("SIDECAR_URL", "http://sidecar.example:50051")]).await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&everything.send(&body).await?), "200 processed");
    assert_eq!(everything.events().await?, 1, "in its own store");
    let output = everything.program.output();
    assert_eq!(output.matches(SAID).count(), 1, "{output}");

    let everything = Everything::start(Ledger::Sqlite).await?;
    assert!(!everything.program.output().contains(SAID), "{}", everything.program.output());
    Ok(())
}
