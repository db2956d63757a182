//! No request makes a series, whatever it says.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use http::{Method, uri::PathAndQuery};
use oncegate_api::v1::{self, idempotency_service_client::IdempotencyServiceClient};
use oncegate_e2e::{http_client, stripe};
use tonic::{Request, client::Grpc, transport::Channel};

use super::{Services, page};
use crate::setup::STRIPE;

/// What callers and strangers choose themselves.
struct Words {
    event_type: String,
    event_id: String,
    tenant: String,
    provider: String,
    metadata_key: String,
    /// A method of HTTP, and of gRPC.
    method: String,
    path: String,
}

impl Words {
    /// As everybody's.
    fn tame() -> Self {
        Self {
            event_type: "charge.succeeded".into(),
            event_id: stripe::event_id(),
            tenant: "default".into(),
            provider: "stripe".into(),
            metadata_key: "colour".into(),
            method: "DELETE".into(),
            path: "elsewhere".into(),
        }
    }

    /// Permitted, and never heard of.
    fn strange(number: usize) -> Self {
        Self {
            event_type: format!("strange.{number}\",route=\"/strange{{}}"),
            event_id: format!("evt_strange_{number}\"\\}}={{"),
            tenant: format!("strange-{number}"),
            provider: format!("strange_{number}"),
            metadata_key: format!("strange {number}"),
            method: format!("STRANGE{number}"),
            path: format!("strange-{number}%22%7D"),
        }
    }

    /// Not permitted at all.
    fn forbidden(number: usize) -> Self {
        Self {
            event_type: format!("strange {number}\n\u{1b}[2J"),
            event_id: format!("strange {number} \u{202e}"),
            tenant: format!("strange {number}\"\n"),
            provider: format!("STRANGE {number}\\"),
            metadata_key: format!("strange\n{number}"),
            ..Self::strange(number)
        }
    }
}

async fn provoke(services: &Services, words: &Words) -> Result<()> {
    // The provider's own, and a stranger's with a signature that is none.
    let body = stripe::event(&words.event_id, &words.event_type);
    services.send(&body, &[]).await?;
    services.send(&body, &[("traceparent", &words.path), ("x-forwarded-for", &words.path)]).await?;
    http_client::post(services.address, STRIPE, &[(stripe::HEADER, "t=1,v1=00")], body).await?;
    // What has no route, and methods that nobody has.
    let nowhere = format!("/webhooks/payments/{}?{}", words.path, words.path);
    http_client::get(services.address, &nowhere).await?;
    let method = Method::from_bytes(words.method.as_bytes())?;
    for path in [STRIPE, &nowhere, "/webhooks/payments/health"] {
        http_client::send(services.address, method.clone(), path, &[], "").await?;
    }

    let channel = Channel::from_shared(format!("http://{}", services.sidecar_address))?.connect().await?;
    let mut client = IdempotencyServiceClient::new(channel.clone());
    let key = Some(v1::EventKey {
        tenant: words.tenant.clone(),
        provider: words.provider.clone(),
        event_id: words.event_id.clone(),
    });
    let kind = prost_types::value::Kind::StringValue(words.path.clone());
    let fields = [(words.metadata_key.clone(), prost_types::Value { kind: Some(kind) })].into();
    let metadata = Some(prost_types::Struct { fields });
    // Each call may be refused, which is counted as well.
    let _ = client
        .check_and_lock(v1::CheckAndLockRequest {
            key: key.clone(),
            event_type: words.event_type.clone(),
            claim_id: words.path.clone(),
            holder: words.metadata_key.clone(),
            metadata: metadata.clone(),
            ..Default::default()
        })
        .await;
    let fencing_token = 1;
    let completed = v1::MarkCompletedRequest { key: key.clone(), fencing_token, metadata, ..Default::default() };
    let _ = client.mark_completed(completed).await;
    let error = words.event_type.clone();
    let _ = client.mark_failed(v1::MarkFailedRequest { key: key.clone(), error, ..Default::default() }).await;
    let _ = client.extend_lock(v1::ExtendLockRequest { key, fencing_token, ..Default::default() }).await;
    let (tenant, provider) = (words.tenant.clone(), words.provider.clone());
    let history = v1::HistoryRequest { tenant: tenant.clone(), provider: provider.clone(), ..Default::default() };
    let _ = client.history(history).await;
    let _ = client.stats(v1::StatsRequest { tenant, provider, ..Default::default() }).await;

    let service = "oncegate.v1.IdempotencyService";
    for path in [format!("/{service}/{}", words.method), format!("/{}/{}", words.path, words.method)] {
        let mut raw = Grpc::new(channel.clone());
        raw.ready().await?;
        let codec = tonic_prost::ProstCodec::<v1::StatsRequest, v1::StatsResponse>::default();
        let path = PathAndQuery::try_from(path)?;
        let _ = raw.unary(Request::new(v1::StatsRequest::default()), path, codec).await;
    }
    Ok(())
}

/// The series of both pages: names and labels.
async fn series(services: &Services) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for (process, admin) in [("gateway", services.gateway_admin), ("sidecar", services.sidecar_admin)] {
        for line in page(admin).await?.lines().filter(|line| !line.starts_with('#')) {
            let (series, _) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            all.insert(format!("{process} {series}"));
        }
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_requests_say_there_are_as_many_series_as_before() -> Result<()> {
    let services = Services::start(&[]).await?;
    // Of methods and codes only what has happened has a row: let it happen, with words as everybody's, of an event that is
    // done, one that is not and one that is not there, and with words that are refused.
    for words in [
        Words::tame(),
        Words { tenant: "another".into(), ..Words::tame() },
        Words { tenant: "another".into(), event_type: "no type\n".into(), ..Words::tame() },
        Words { tenant: "not a name".into(), provider: "NOT A NAME".into(), ..Words::tame() },
    ] {
        provoke(&services, &words).await?;
    }
    let before = series(&services).await?;
    assert!(before.len() > 200, "{}", before.len());
    for number in 0..20 {
        provoke(&services, &Words::strange(number)).await?;
        provoke(&services, &Words::forbidden(number)).await?;
    }
    let after = series(&services).await?;
    let made: Vec<_> = after.difference(&before).collect();
    assert!(made.is_empty() && after.len() == before.len(), "{made:#?}");
    for admin in [services.gateway_admin, services.sidecar_admin] {
        let page = page(admin).await?;
        assert!(!page.to_lowercase().contains("strange"), "{page}");
    }
    Ok(())
}
