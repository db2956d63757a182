//! Settings that OpenTelemetry's library reads by itself, from the environment alone.

use anyhow::Result;
use oncegate_e2e::{collector::Collector, stripe};

use super::Services;
use crate::setup::word;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_and_attributes_go_to_the_collector() -> Result<()> {
    let collector = Collector::start().await?;
    let services = Services::start(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20of-a-test,x-scope-orgid=org-of-this-test"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=live,k8s.cluster.name=a"),
    ])
    .await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&services.send(&body, &[]).await?), "200 processed");
    let span = collector.span("the webhook's span", |span| span.name == "POST /webhooks/payments/stripe").await;
    assert_eq!(span.resource["deployment.environment.name"], "live");
    assert_eq!(span.resource["k8s.cluster.name"], "a");
    assert_eq!(span.service, "oncegate-gateway", "beside what is set otherwise");
    assert_eq!(collector.header("authorization").as_deref(), Some("Bearer of-a-test"));
    assert_eq!(collector.header("x-scope-orgid").as_deref(), Some("org-of-this-test"));
    Ok(())
}
