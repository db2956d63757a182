//! What a crash does to an event, state by state (`docs/states.md`).

use anyhow::{Context as _, Result};
use oncegate_api::v1::{Decision, FailureKind, MarkFailedRequest, State};

use super::{Client, Sidecar, ask, claim, completion, history, key, replay};
use crate::setup::{Ledger, on_each_ledger};

on_each_ledger!(a_crash_leaves_every_event_in_its_state_with_its_lock);

/// Brings an event into a state, as its callers do. The claim is the event's own name.
async fn bring(client: &Client, event_id: &str, to: State) -> Result<()> {
    let token = ask(client, claim(event_id, event_id)).await?.lock.context("the lock")?.fencing_token;
    let fail = async |kind: FailureKind| {
        let request = MarkFailedRequest {
            key: key(event_id),
            fencing_token: token,
            kind: kind.into(),
            error: "no answer in time".into(),
            ..Default::default()
        };
        client.clone().mark_failed(request).await.map(drop)
    };
    match to {
        State::Unspecified | State::Processing => {}
        State::Completed => drop(client.clone().mark_completed(completion(event_id, token)).await?),
        State::Failed => fail(FailureKind::Retryable).await?,
        State::Unknown => fail(FailureKind::Unknown).await?,
        State::Dead => fail(FailureKind::Terminal).await?,
        State::Pending => {
            fail(FailureKind::Unknown).await?;
            client.clone().resolve(replay(event_id)).await?;
        }
    }
    Ok(())
}

async fn a_crash_leaves_every_event_in_its_state_with_its_lock(ledger: Ledger) -> Result<()> {
    let mut sidecar = Sidecar::start(ledger).await?;
    let states = [State::Pending, State::Processing, State::Completed, State::Failed, State::Unknown, State::Dead];
    let client = sidecar.client().await?;
    let mut before = Vec::new();
    for state in states {
        bring(&client, state.as_str_name(), state).await?;
        let known = history(&client, state.as_str_name()).await?.context("the event")?;
        assert_eq!(known.event.as_ref().map(|event| event.state()), Some(state));
        before.push(known);
    }

    sidecar.crash().await?;
    let client = sidecar.client().await?;
    assert_eq!(history(&client, "evt_absent").await?, None);
    for (state, before) in states.into_iter().zip(before) {
        let after = history(&client, state.as_str_name()).await?.context("the event")?;
        assert_eq!(after, before, "{state:?}: its state, its lock, its attempts and decisions");
    }
    // Its holder has its lock, and nobody else gets it; what waits for a call is granted, what is held is not.
    let name = State::Processing.as_str_name();
    let own = ask(&client, claim(name, name)).await?;
    assert_eq!(own.decision(), Decision::Acquired);
    for (state, decision) in [
        (State::Pending, Decision::Acquired),
        (State::Processing, Decision::InProgress),
        (State::Completed, Decision::AlreadyCompleted),
        (State::Failed, Decision::Acquired),
        (State::Unknown, Decision::Refused),
        (State::Dead, Decision::Refused),
    ] {
        let answer = ask(&client, claim(state.as_str_name(), "another")).await?;
        assert_eq!(answer.decision(), decision, "{state:?}");
        if decision == Decision::Acquired {
            assert!(answer.lock.map(|lock| lock.fencing_token) > own.lock.as_ref().map(|lock| lock.fencing_token));
        }
    }
    Ok(())
}
