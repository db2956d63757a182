//! Postgres goes away and comes back: the service refuses meanwhile, and needs no restart.

use std::time::Duration;

use anyhow::Result;
use oncegate_api::v1::{CheckAndLockRequest, Decision, EventKey};
use oncegate_e2e::{
    eventually,
    postgres::{Cluster, Options},
    stripe,
};
use tonic_types::StatusExt as _;

use crate::setup::{Everything, Ledger, word};

#[tokio::test]
async fn without_postgres_it_refuses_and_with_it_goes_on() -> Result<()> {
    let mut cluster = Cluster::start(Options::default()).await?;
    let everything = Everything::start(Ledger::Postgres(cluster.database().await?)).await?;
    let before = stripe::event(&stripe::event_id(), "payment_intent.succeeded");
    let during = stripe::event(&stripe::event_id(), "payment_intent.succeeded");
    assert_eq!(word(&everything.send(&before).await?), "200 processed");

    for kill in [false, true] {
        let delivered = everything.upstream.requests().len();
        if kill {
            cluster.kill()?
        } else {
            cluster.stop()?
        }
        for body in [&before, &during] {
            let answer = everything.send(body).await?;
            assert_eq!(answer.status, 503, "{}", word(&answer));
            assert!(answer.header("retry-after").parse::<u32>().is_ok_and(|seconds| seconds >= 1), "{answer:?}");
        }
        let request = CheckAndLockRequest {
            key: Some(EventKey {
                provider: "stripe".into(),
                event_id: "evt_of_the_outage".into(),
                ..Default::default()
            }),
            event_type: "payment_intent.succeeded".into(),
            ..Default::default()
        };
        let refused = everything.client().await?.check_and_lock(request.clone()).await.err();
        let refused = refused.ok_or_else(|| anyhow::anyhow!("a lock was granted without Postgres"))?;
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
        let details = refused.get_error_details();
        assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some("STORE_UNAVAILABLE"));
        let delay = details.retry_info().and_then(|retry| retry.retry_delay).unwrap_or_default();
        assert!(delay > Duration::ZERO, "it says when to ask again");
        assert_eq!(everything.upstream.requests().len(), delivered, "nothing is delivered without a lock");

        cluster.restart().await?;
        eventually("it grants again", async || {
            let mut client = everything.client().await.ok()?;
            let answer = client.check_and_lock(request.clone()).await.ok()?;
            // Granted by the first round, and never ended.
            [Decision::Acquired, Decision::InProgress].contains(&answer.into_inner().decision()).then_some(())
        })
        .await;
        assert_eq!(word(&everything.send(&before).await?), "200 already_processed");
    }
    assert_eq!(word(&everything.send(&during).await?), "200 processed");
    assert_eq!(everything.upstream.requests().len(), 2);
    Ok(())
}
