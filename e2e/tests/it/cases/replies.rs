//! Replies that are lost after the commit: the same call again gets the same answer.

use std::time::Duration;

use anyhow::{Context as _, Result};
use oncegate_api::v1::{Decision, State};
use oncegate_e2e::{eventually, wire::Lossy};

use super::{Sidecar, ask, claim, client, completion, history};
use crate::setup::{Ledger, on_each_ledger};

on_each_ledger!(a_lock_whose_reply_was_lost_is_given_again_to_its_claim, a_completion_whose_reply_was_lost_is_repeated,);

/// T07
async fn a_lock_whose_reply_was_lost_is_given_again_to_its_claim(ledger: Ledger) -> Result<()> {
    let sidecar = Sidecar::start(ledger).await?;
    let way = Lossy::to(sidecar.address).await?;
    let (through, beside) = (client(way.address()).await?, sidecar.client().await?);
    // So that the connection stands.
    ask(&through, claim("evt_0", "")).await?;

    way.lose(true);
    let asked = tokio::spawn({
        let through = through.clone();
        async move { ask(&through, claim("evt_1", "claim-1")).await }
    });
    let granted = eventually("the lock is granted, though nobody hears of it", async || {
        history(&beside, "evt_1").await.ok()??.event
    })
    .await;
    assert!(!asked.is_finished());
    asked.abort();
    way.lose(false);

    let again = client(way.address()).await?;
    let answer = ask(&again, claim("evt_1", "claim-1")).await?;
    assert_eq!(answer.decision(), Decision::Acquired, "no wait for the expiry");
    let lock = answer.lock.context("the lock")?;
    assert_eq!((lock.fencing_token, lock.attempt), (granted.fencing_token, 1));
    assert_eq!(ask(&again, claim("evt_1", "claim-2")).await?.decision(), Decision::InProgress);
    assert_eq!(history(&beside, "evt_1").await?.context("the event")?.attempts.len(), 1);
    Ok(())
}

/// T09
async fn a_completion_whose_reply_was_lost_is_repeated(ledger: Ledger) -> Result<()> {
    let sidecar = Sidecar::start(ledger).await?;
    let way = Lossy::to(sidecar.address).await?;
    let (through, beside) = (client(way.address()).await?, sidecar.client().await?);
    let lock = ask(&through, claim("evt_1", "claim-1")).await?.lock.context("the lock")?;

    way.lose(true);
    let asked = tokio::spawn({
        let mut through = through.clone();
        async move {
            let mut request = tonic::Request::new(completion("evt_1", lock.fencing_token));
            request.set_timeout(Duration::from_secs(30));
            through.mark_completed(request).await
        }
    });
    eventually("the completion is accepted, though nobody hears of it", async || {
        (history(&beside, "evt_1").await.ok()??.event?.state() == State::Completed).then_some(())
    })
    .await;
    assert!(!asked.is_finished());
    asked.abort();
    way.lose(false);

    let mut again = client(way.address()).await?;
    let answer = again.mark_completed(completion("evt_1", lock.fencing_token)).await?.into_inner();
    assert!(answer.repeated);
    let event = history(&beside, "evt_1").await?.context("the event")?;
    assert_eq!(event.attempts.len(), 1);
    let completed = "select count(*) from payment_webhook_events where state = 'completed'";
    assert_eq!(sidecar.outside(completed).await?, "1");
    Ok(())
}
