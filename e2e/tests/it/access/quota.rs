//! Quotas of tenants, as callers meet them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use oncegate_api::{
    reason,
    v1::{self, idempotency_service_client::IdempotencyServiceClient},
};
use oncegate_e2e::{http_client, program::Oncegate, stripe, upstream::Upstream};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

use crate::setup::{SECRET, send_signed, word};

type Client = IdempotencyServiceClient<Channel>;

fn key(tenant: &str, event_id: &str) -> Option<v1::EventKey> {
    Some(v1::EventKey { tenant: tenant.into(), provider: "stripe".into(), event_id: event_id.into() })
}

async fn lock(client: &mut Client, tenant: &str) -> Result<(Option<v1::EventKey>, v1::Lock), Status> {
    let key = key(tenant, &stripe::event_id());
    let request =
        v1::CheckAndLockRequest { key: key.clone(), event_type: "charge.succeeded".into(), ..Default::default() };
    let granted = client.check_and_lock(request).await?.into_inner();
    Ok((key, granted.lock.ok_or_else(|| Status::internal("no lock"))?))
}

/// Calls again and again, faster than once a second, until it is refused.
async fn refusal<T>(mut call: impl AsyncFnMut() -> Result<T, Status>) -> Result<Status> {
    for _ in 0..50 {
        if let Err(status) = call().await {
            return Ok(status);
        }
    }
    bail!("never refused")
}

#[tokio::test]
async fn a_tenant_beyond_its_quota_is_refused_alone_and_may_end_what_it_was_granted() -> Result<()> {
    let (directory, upstream) = (tempfile::tempdir()?, Upstream::start().await?);
    let mut sidecar = Oncegate::new(directory.path(), ["sidecar"])?
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .env("ADMIN_LISTEN", "127.0.0.1:0")
        .env("SIDECAR_TENANT_CALLS_PER_SECOND", "1")
        .start()?;
    let (url, admin) = (format!("http://{}", sidecar.address("sidecar").await?), sidecar.address("admin").await?);
    let mut client = Client::connect(url.clone()).await?;
    let (granted, held) = lock(&mut client, "eager").await?;

    let (mut claims, mut lists, mut counts) = (client.clone(), client.clone(), client.clone());
    let history = v1::HistoryRequest { tenant: "eager".into(), ..Default::default() };
    let stats = v1::StatsRequest { tenant: "eager".into(), ..Default::default() };
    for (what, refused) in [
        ("claims", refusal(async || lock(&mut claims, "eager").await).await?),
        ("lists", refusal(async || lists.history(history.clone()).await).await?),
        ("counts", refusal(async || counts.stats(stats.clone()).await).await?),
    ] {
        assert_eq!(refused.code(), Code::ResourceExhausted, "{what}: {refused:?}");
        let details = refused.get_error_details();
        let info = details.error_info().context("a reason")?;
        assert_eq!((info.domain.as_str(), info.reason.as_str()), (reason::DOMAIN, reason::QUOTA_EXCEEDED), "{what}");
        let pause = details.retry_info().and_then(|info| info.retry_delay).context("a pause")?;
        assert!(!pause.is_zero() && pause <= Duration::from_secs(1), "{what}: {pause:?}");
    }
    lock(&mut client, "other").await.context("another tenant's quota is its own")?;

    // Whoever holds a lock may keep it and end it, however many calls that takes.
    for _ in 0..20 {
        let fencing_token = held.fencing_token;
        client
            .extend_lock(v1::ExtendLockRequest { key: granted.clone(), fencing_token, ..Default::default() })
            .await
            .context("an extension")?;
    }
    for _ in 0..20 {
        let fencing_token = held.fencing_token;
        client
            .mark_completed(v1::MarkCompletedRequest { key: granted.clone(), fencing_token, ..Default::default() })
            .await
            .context("a mark")?;
    }

    // A gateway's webhooks count as any calls: they come again.
    let mut gateway = Oncegate::new(directory.path(), ["gateway"])?
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("GATEWAY_TENANT", "eager")
        .env("SIDECAR_URL", &url)
        .env("UPSTREAM_URL", upstream.url())
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        .start()?;
    let address = gateway.address("gateway").await?;
    let mut answers = Vec::new();
    while answers.len() < 50 && answers.last().is_none_or(|answer: &http_client::Answer| answer.status == 200) {
        let body = stripe::event(&stripe::event_id(), "charge.succeeded");
        answers.push(send_signed(address, &stripe::sign(SECRET, &body), &body).await?);
    }
    let last = answers.last().context("an answer")?;
    assert_eq!((word(last).as_str(), last.header("retry-after")), ("503 unavailable", "1"));
    assert_eq!(upstream.requests().len(), answers.len() - 1, "what was refused was not delivered");

    let page = http_client::get(admin, "/metrics").await?;
    let page = String::from_utf8(page.body.to_vec())?;
    let counted = page.lines().find_map(|line| line.strip_prefix("oncegate_calls_over_quota_total "));
    assert!(counted.context("a count")?.parse::<u64>()? >= 4, "{page}");
    Ok(())
}
