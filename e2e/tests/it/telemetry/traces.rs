//! A trace from the webhook over the sidecar to the database and the application, and a collector in trouble.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    collector::{Collector, Span},
    eventually,
    program::Oncegate,
    stripe,
    upstream::{Upstream, refused_url},
};

use super::{Services, page, sum};
use crate::setup::{SECRET, send_signed, word};

const INTERNAL: i32 = 1;
const SERVER: i32 = 2;
const CLIENT: i32 = 3;
const CHECK_AND_LOCK: &str = "oncegate.v1.IdempotencyService/CheckAndLock";
const MARK_COMPLETED: &str = "oncegate.v1.IdempotencyService/MarkCompleted";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_leads_from_the_webhook_to_the_statement_and_the_application() -> Result<()> {
    let collector = Collector::start().await?;
    let mut services = Services::start(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url())]).await?;
    let (outer_trace, outer_span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let inbound = format!("00-{outer_trace}-{outer_span}-01");
    assert_eq!(word(&services.send(&body, &[("traceparent", &inbound)]).await?), "200 processed");

    let root = collector.span("the webhook's span", |span| span.name == "POST /webhooks/payments/stripe").await;
    assert_eq!((root.kind, root.service.as_str(), root.parent.as_str()), (SERVER, "oncegate-gateway", ""));
    assert_eq!(root.links, [(outer_trace.to_owned(), outer_span.to_owned())], "linked to the stranger's trace");
    assert_ne!(root.trace, outer_trace, "which is not continued");
    assert_eq!(root.attributes["http.response.status_code"], "200");
    assert_eq!(root.attributes["oncegate.answer"], "processed");
    assert_eq!(root.resource["service.version"], env!("CARGO_PKG_VERSION"));

    let within = async |what: &str, parent: &Span, kind: i32, name: &str| {
        let (trace, parent) = (parent.trace.clone(), parent.id.clone());
        collector
            .span(what, |span| span.trace == trace && span.parent == parent && span.kind == kind && span.name == name)
            .await
    };
    let event = within("the event's span", &root, INTERNAL, "event").await;
    assert_eq!(
        (event.attributes["oncegate.attempt"].as_str(), event.attributes["oncegate.outcome"].as_str()),
        ("1", "completed")
    );
    let call = within("the call to the sidecar", &event, CLIENT, CHECK_AND_LOCK).await;
    let served = within("the call in the sidecar", &call, SERVER, CHECK_AND_LOCK).await;
    assert_eq!(served.service, "oncegate-sidecar");
    assert_eq!(served.attributes["oncegate.outcome"], "acquired");
    let ledger = within("the wait for the ledger", &served, INTERNAL, "ledger").await;
    let delivery = within("the delivery", &event, CLIENT, "POST").await;
    assert_eq!(delivery.attributes["http.response.status_code"], "200");
    let mark = within("the mark", &event, CLIENT, MARK_COMPLETED).await;
    let marked = within("the mark in the sidecar", &mark, SERVER, MARK_COMPLETED).await;
    assert_eq!(marked.attributes["oncegate.outcome"], "completed");

    // A batch is many calls': a root of its own, with a link to each.
    let link = (ledger.trace.clone(), ledger.id.clone());
    let batch = collector.span("the batch", |span| span.name == "ledger batch" && span.links.contains(&link)).await;
    assert_eq!((batch.parent.as_str(), batch.service.as_str()), ("", "oncegate-sidecar"));
    assert_ne!(batch.trace, root.trace);
    let statement = within("the statement", &batch, CLIENT, "Hot").await;
    assert_eq!(statement.attributes["db.system.name"], "postgresql");

    // The application's part goes into the delivery's.
    let requests = services.upstream.requests();
    assert_eq!(requests[0].header("traceparent"), format!("00-{}-{}-01", root.trace, delivery.id));

    // The log names the trace of each request.
    let line = services.gateway.line_where("the request is logged", |line| line.contains("\"request\"")).await?;
    let line: serde_json::Value = serde_json::from_str(&line)?;
    assert_eq!(line["trace_id"], root.trace.as_str());
    assert_eq!(line["span_id"], root.id.as_str());
    assert_eq!((&line["route"], &line["answer"]), (&"/webhooks/payments/stripe".into(), &"processed".into()));
    assert_eq!((&line["event_type"], &line["status"]), (&"charge.succeeded".into(), &200.into()));
    let line = services.sidecar.line_where("the call is logged", |line| line.contains("\"CheckAndLock\"")).await?;
    let line: serde_json::Value = serde_json::from_str(&line)?;
    assert_eq!((&line["code"], &line["outcome"]), (&"OK".into(), &"acquired".into()));
    assert_eq!(line["trace_id"], root.trace.as_str());

    // Neither the libraries' spans nor the exporter's own, and nothing of the body.
    let names: BTreeSet<String> = collector.spans().into_iter().map(|span| span.name).collect();
    let known = [
        "POST",
        "POST /webhooks/payments/stripe",
        "event",
        "ledger",
        "ledger batch",
        "Hot",
        "Flush",
        CHECK_AND_LOCK,
        MARK_COMPLETED,
    ];
    assert!(names.iter().all(|name| known.contains(&name.as_str())), "{names:?}");
    let written = format!("{:?}{}{}", collector.spans(), services.gateway.output(), services.sidecar.output());
    let secret: serde_json::Value = serde_json::from_slice(&body)?;
    assert!(!written.contains(secret["data"]["object"]["id"].as_str().context("an id")?), "a body was written");
    assert!(!written.contains(SECRET) && !written.contains("v1="), "a secret or a signature was written");

    let exported = |page: &str| sum(page, "oncegate_trace_spans_exported_total", &[]);
    eventually("what was exported is counted", async || {
        (exported(&page(services.gateway_admin).await.ok()?) >= 5.0).then_some(())
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_sampled_is_told_to_the_application_and_not_exported() -> Result<()> {
    let collector = Collector::start().await?;
    let settings = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url()), ("OTEL_TRACES_SAMPLER", "always_off".to_owned())];
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut services = Services::start(&settings).await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&services.send(&body, &[]).await?), "200 processed");
    assert!(services.upstream.requests()[0].header("traceparent").ends_with("-00"));
    assert_eq!(services.gateway.stop().await?.code, Some(0));
    assert_eq!(services.sidecar.stop().await?.code, Some(0));
    assert_eq!(collector.spans(), [], "also at the end, when everything is flushed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_flushes_what_has_gathered() -> Result<()> {
    let collector = Collector::start().await?;
    let mut services =
        Services::start(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url()), ("OTEL_SERVICE_NAME", "payments")])
            .await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&services.send(&body, &[]).await?), "200 processed");
    // Well within the second that spans gather for. The gateway's first: it began the trace.
    assert_eq!(services.gateway.stop().await?.code, Some(0));
    let spans = collector.spans();
    let root = spans.iter().find(|span| span.kind == SERVER && span.service == "payments" && span.parent.is_empty());
    let root = root.with_context(|| format!("the gateway's: {spans:?}"))?.clone();
    assert_eq!(services.sidecar.stop().await?.code, Some(0));
    let spans = collector.spans();
    let of_the_sidecar =
        |span: &&Span| span.kind == SERVER && span.trace == root.trace && span.name.contains("IdempotencyService");
    assert!(spans.iter().find(of_the_sidecar).is_some(), "the sidecar's: {spans:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t33_a_collector_that_never_answers_holds_up_neither_requests_nor_the_end() -> Result<()> {
    let collector = Collector::silent().await?;
    let (upstream, directory) = (Upstream::start().await?, tempfile::tempdir()?);
    let mut program = Oncegate::new(directory.path(), ["all"])?
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("UPSTREAM_URL", upstream.url())
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url())
        // An hour: whoever waited for the collector would wait for the test's end.
        .env("OTEL_EXPORTER_OTLP_TIMEOUT", "3600000")
        .start()?;
    let gateway = program.address("gateway").await?;
    let send = async || {
        let body = stripe::event(&stripe::event_id(), "charge.succeeded");
        send_signed(gateway, &stripe::sign(SECRET, &body), &body).await
    };
    assert_eq!(word(&send().await?), "200 processed");
    eventually("the collector has a request that it does not answer", async || {
        (collector.requests() > 0).then_some(())
    })
    .await;
    for _ in 0..20 {
        assert_eq!(word(&send().await?), "200 processed");
    }
    assert_eq!(collector.requests(), 1, "it still has the first one");
    let ended = program.stop().await?;
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.stderr.contains("they are lost"), "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t33_spans_for_a_collector_that_is_away_are_dropped_and_counted() -> Result<()> {
    let mut services = Services::start(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &refused_url()?)]).await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&services.send(&body, &[]).await?), "200 processed");
    eventually("they are counted", async || {
        let page = page(services.gateway_admin).await.ok()?;
        (sum(&page, "oncegate_trace_spans_dropped_total", &["export_failed"]) > 0.0).then_some(())
    })
    .await;
    assert_eq!(word(&services.send(&body, &[]).await?), "200 already_processed");
    assert_eq!(services.gateway.stop().await?.code, Some(0));
    Ok(())
}
