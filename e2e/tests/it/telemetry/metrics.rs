//! Every metric in the code is on a page and in the document, and the reverse; the numbers add up; a real Prometheus takes them.

use std::{collections::BTreeSet, fs, thread};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{
    CheckAndLockRequest, EventKey, FailureKind, MarkCompletedRequest, MarkFailedRequest, ResolveRequest, State,
};
use oncegate_e2e::{
    eventually,
    prometheus::{Prometheus, promtool},
    stripe,
    upstream::Answer,
};
use oncegate_runtime::metrics::Family;
use tonic::Code;

use super::{Services, all_families, gateway_families, page, process_families, repository, sidecar_families, sum};
use crate::setup::{send_signed, word};

/// Name, kind, labels and buckets, as the document has them.
type Line = (String, String, Vec<String>, Vec<String>);

#[test]
fn the_document_has_every_metric_and_no_other() -> Result<()> {
    let code: BTreeSet<Line> = all_families()
        .map(|family| {
            let text = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let buckets = family.buckets.iter().map(ToString::to_string).collect();
            (family.name.to_owned(), family.kind.name().to_owned(), text(family.labels), buckets)
        })
        .collect();
    let mut document = BTreeSet::new();
    for line in fs::read_to_string(repository("docs/metrics.md"))?.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, meaning] = cells[..] else { continue };
        let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else { continue };
        let list = |text: &str| {
            text.split(", ").filter(|one| !one.is_empty()).map(|one| one.trim_matches('`').to_owned()).collect()
        };
        let buckets = meaning.rsplit_once("Buckets: ").map_or("", |(_, buckets)| buckets.trim_end_matches('.'));
        document.insert((name.to_owned(), kind.to_owned(), list(labels), list(buckets)));
    }
    let undocumented: Vec<_> = code.difference(&document).collect();
    let unknown: Vec<_> = document.difference(&code).collect();
    assert!(
        undocumented.is_empty() && unknown.is_empty(),
        "not in the document: {undocumented:#?}\nnot in the code: {unknown:#?}"
    );
    Ok(())
}

#[test]
fn no_label_can_hold_what_a_request_says() {
    for family in all_families() {
        for label in family.labels {
            assert!(!["tenant", "event_id", "event", "event_type", "path"].contains(label), "{}: {label}", family.name);
        }
        let prefix = family.name.starts_with("oncegate_") || family.name.starts_with("process_");
        assert!(prefix, "{}", family.name);
    }
    // What a caller of the sidecar says is a provider may be anything.
    assert!(sidecar_families().all(|family| !family.labels.contains(&"provider")));
}

fn on(page: &str) -> BTreeSet<(String, String)> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

fn expected(families: impl Iterator<Item = &'static Family>) -> BTreeSet<(String, String)> {
    families.map(|family| (family.name.to_owned(), family.kind.name().to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i11_what_came_in_is_what_was_decided_and_prometheus_sees_it() -> Result<()> {
    let services = Services::start(&[]).await?;
    let rules = repository("ops/prometheus/rules.yaml").canonicalize()?;
    let prometheus = Prometheus::start(
        &[("oncegate-sidecar", services.sidecar_admin), ("oncegate-gateway", services.gateway_admin)],
        &rules,
    )
    .await?;
    // Nothing that is asked below is found missing only because it was asked wrongly.
    let refused = prometheus.query("sum(up").await.expect_err("no query").to_string();
    assert!(refused.contains("sum(up and answered 400") && refused.contains("parse error"), "{refused}");
    eventually("both are scraped", async || (prometheus.value("sum(up)").await.ok()? == Some(2.0)).then_some(())).await;

    // Completed, completed before, failed, retried, refused by signature, in progress.
    services.upstream.answer_next([Answer::ok(), Answer::status(500), Answer::ok()]);
    let first = stripe::event(&stripe::event_id(), "charge.succeeded");
    let second = stripe::event(&stripe::event_id(), "charge.succeeded");
    for (body, expected) in [
        (&first, "200 processed"),
        (&first, "200 already_processed"),
        (&second, "500 failed"),
        (&second, "200 processed"),
        (&second, "200 already_processed"),
    ] {
        assert_eq!(word(&services.send(body, &[]).await?), expected);
    }
    let forged = send_signed(services.address, &stripe::sign("whsec_of_somebody_else", &first), &first).await?;
    assert_eq!(forged.status, 401);

    let (gateway, sidecar) = (page(services.gateway_admin).await?, page(services.sidecar_admin).await?);
    assert_eq!(on(&gateway), expected(gateway_families().chain(process_families())));
    assert_eq!(on(&sidecar), expected(sidecar_families().chain(process_families())));
    for page in [&gateway, &sidecar] {
        promtool(&repository("."), &["check", "metrics"], page).await?;
    }

    let row = |name: &str, label: &str| sum(&gateway, &format!("oncegate_gateway_{name}"), &[label]);
    let decisions =
        ["acquired", "duplicate", "in_progress", "rejected", "failed"].map(|decision| row("claims_total", decision));
    assert_eq!(decisions, [3.0, 2.0, 0.0, 0.0, 0.0]);
    assert_eq!(row("webhooks_total", "stripe"), decisions.iter().sum::<f64>());
    assert_eq!((row("deliveries_total", "completed"), row("deliveries_total", "retryable")), (2.0, 1.0));
    assert_eq!(row("refusals_total", "bad_signature"), 1.0);
    assert_eq!(row("secrets_matched_total", "secret=\"2\""), 5.0, "the second secret signs");
    assert_eq!(row("answers_total", "processed\""), 4.0, "processed and already_processed");
    assert_eq!(row("upstream_duration_seconds_count", ""), 3.0);

    let row = |name: &str, label: &str| sum(&sidecar, &format!("oncegate_{name}"), &[label]);
    assert_eq!(row("rpc_requests_total", "CheckAndLock"), row("claims_total", ""));
    assert_eq!((row("claims_total", "acquired"), row("claims_total", "duplicate")), (3.0, 2.0));
    assert_eq!((row("attempts_total", "first"), row("attempts_total", "retry")), (2.0, 1.0));
    assert_eq!((row("marks_total", "completed"), row("marks_total", "retryable")), (2.0, 1.0));
    assert_eq!(row("processing_duration_seconds_count", ""), 3.0);
    assert_eq!(row("ledger_up", ""), 1.0);
    assert!(row("ledger_batch_calls_count", "") >= 1.0 && row("ledger_batch_calls_sum", "") >= 6.0, "{sidecar}");
    let hits = row("cache_lookups_total", "result=\"hit\"");
    assert!(hits >= 1.0, "a duplicate of an event with one attempt is answered from memory: {sidecar}");

    // The same through Prometheus, and the events that the sidecar counts now and then.
    for (query, value) in [
        ("sum(oncegate_gateway_webhooks_total)", 5.0),
        ("max(oncegate_events{state=\"completed\"})", 2.0),
        ("max(oncegate_events_stuck)", 0.0),
        ("oncegate:stuck_events", 0.0),
        ("count(oncegate_build_info)", 2.0),
    ] {
        eventually(query, async || (prometheus.value(query).await.ok()? == Some(value)).then_some(())).await;
    }
    eventually("all rules are evaluated without an error", async || {
        let groups = prometheus.get("/api/v1/rules").await.ok()?;
        let rules: Vec<_> =
            groups["groups"].as_array()?.iter().flat_map(|group| group["rules"].as_array()).flatten().collect();
        (rules.len() > 20 && rules.iter().all(|rule| rule["health"] == "ok")).then_some(())
    })
    .await;
    let firing = prometheus.query("ALERTS{alertstate=\"firing\",severity=\"page\"}").await?;
    assert_eq!(firing.as_array().context("a list")?.len(), 0, "{firing}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_whose_holder_is_gone_is_counted_as_stuck() -> Result<()> {
    let services = Services::start(&[]).await?;
    let mut client = services.client().await?;
    let lock_duration = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    client.check_and_lock(CheckAndLockRequest { lock_duration, ..claim("evt_stuck") }).await?;
    eventually("it is stuck", async || {
        let page = page(services.sidecar_admin).await.ok()?;
        (sum(&page, "oncegate_events_stuck", &[]) == 1.0).then_some(())
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_event_that_no_provider_delivers_any_more_is_counted_as_abandoned() -> Result<()> {
    let services = Services::start(&[]).await?;
    let mut client = services.client().await?;
    let mut fail = async |event_id: &str| -> Result<()> {
        let claimed = claim(event_id);
        let key = claimed.key.clone();
        let lock = client.check_and_lock(claimed).await?.into_inner().lock.context("granted")?;
        let kind = FailureKind::Retryable.into();
        let failed = MarkFailedRequest { key, fencing_token: lock.fencing_token, kind, ..Default::default() };
        client.mark_failed(failed).await?;
        Ok(())
    };
    let counted = async |failed: f64, abandoned: f64| {
        eventually(&format!("{failed} failed, {abandoned} of them abandoned"), async || {
            let page = page(services.sidecar_admin).await.ok()?;
            let found = (sum(&page, "oncegate_events", &["failed"]), sum(&page, "oncegate_events_abandoned", &[]));
            (found == (failed, abandoned)).then_some(())
        })
        .await;
    };
    fail("evt_old").await?;
    counted(1.0, 0.0).await;
    let mut connection = services.database.connect().await?;
    let age = async |connection: &mut sqlx::PgConnection, days: i32| {
        for sql in ["events set create_time = create_time", "counts set hour = hour"] {
            let sql = format!("update payment_webhook_{sql} - make_interval(days => {days})");
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut *connection).await?;
        }
        anyhow::Ok(())
    };
    age(&mut connection, 3).await?;
    counted(1.0, 0.0).await;
    age(&mut connection, 2).await?;
    counted(1.0, 1.0).await;
    fail("evt_new").await?;
    counted(2.0, 1.0).await;
    let resolved = ResolveRequest {
        key: claim("evt_old").key,
        to: State::Dead.into(),
        reason: "nobody sends it".into(),
        actor: "test".into(),
        ..Default::default()
    };
    client.resolve(resolved).await?;
    counted(1.0, 0.0).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_process_looks_for_work_before_it_sleeps_and_says_for_how_long() -> Result<()> {
    let looks = thread::available_parallelism()?.get() > 1;
    for (setting, looks) in [("0s", false), ("1ms", looks)] {
        let services = Services::start(&[("ONCEGATE_IDLE_POLL", setting)]).await?;
        let mut client = services.client().await?;
        let mut looked = false;
        for call in 0.. {
            client.check_and_lock(claim("evt")).await?;
            if call % 50 == 49 {
                let page = page(services.sidecar_admin).await?;
                looked = sum(&page, "oncegate_idle_poll_seconds_total", &[]) > 0.0;
                // Where others have the cores it takes some more calls.
                if looked || !looks || call > 50_000 {
                    break;
                }
            }
        }
        assert_eq!(looked, looks, "{setting}");
    }
    Ok(())
}

fn claim(event_id: &str) -> CheckAndLockRequest {
    CheckAndLockRequest {
        key: Some(EventKey { provider: "stripe".into(), event_id: event_id.into(), ..Default::default() }),
        event_type: "charge.succeeded".into(),
        claim_id: "claim".into(),
        ..Default::default()
    }
}

// S4: a call is repeated whose answer was lost. I10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_its_claim_asks_for_again_is_counted_once() -> Result<()> {
    let services = Services::start(&[]).await?;
    let mut client = services.client().await?;
    for _ in 0..3 {
        client.check_and_lock(claim("evt")).await?;
    }
    let page = page(services.sidecar_admin).await?;
    assert_eq!(sum(&page, "oncegate_claims_total", &["acquired"]), 3.0);
    assert_eq!(sum(&page, "oncegate_attempts_total", &[]), 1.0);
    Ok(())
}

// L3
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repetitions_of_a_mark_share_the_batch_that_answers_it() -> Result<()> {
    const MARKS: u32 = 200;
    let services = Services::start(&[]).await?;
    let mut client = services.client().await?;
    let late = client.check_and_lock(claim("evt")).await?.into_inner().lock.context("a lock")?;
    let failed = MarkFailedRequest {
        key: claim("evt").key,
        fencing_token: late.fencing_token,
        kind: FailureKind::Retryable.into(),
        retry_after: Some(prost_types::Duration::default()),
        ..Default::default()
    };
    client.mark_failed(failed).await?;
    let again = CheckAndLockRequest { claim_id: "again".into(), ..claim("evt") };
    let lock = client.check_and_lock(again).await?.into_inner().lock.context("a lock")?;
    for (lock, accepted) in [(late, 0), (lock, MARKS)] {
        let before = sum(&page(services.sidecar_admin).await?, "oncegate_ledger_batch_calls_sum", &[]);
        let request =
            MarkCompletedRequest { key: claim("evt").key, fencing_token: lock.fencing_token, ..Default::default() };
        let marks = (0..MARKS).map(|_| {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.mark_completed(request).await }
        });
        let (mut marked, mut repeated) = (0, 0);
        for answer in futures::future::join_all(marks).await {
            match answer {
                Ok(answer) => {
                    marked += 1;
                    repeated += u32::from(answer.into_inner().repeated);
                }
                Err(status) => assert_eq!(status.code(), Code::Aborted, "{status:?}"),
            }
        }
        assert_eq!((marked, repeated), (accepted, accepted.saturating_sub(1)));
        // Whatever batches they came in, none was put off to another one, again and again.
        let calls = sum(&page(services.sidecar_admin).await?, "oncegate_ledger_batch_calls_sum", &[]) - before;
        assert!(calls < f64::from(2 * MARKS), "{calls} calls in batches");
    }
    Ok(())
}
