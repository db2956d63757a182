//! Callers that go away, and callers that come all at once.

#![allow(clippy::print_stdout, reason = "tests print their seeds")]

use std::time::Duration;

use anyhow::{Context as _, Result};
use oncegate_api::v1::{Decision, State};
use oncegate_e2e::eventually;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;

use super::{Sidecar, ask, claim, completion, history};
use crate::setup::{Ledger, on_each_ledger};

on_each_ledger!(two_thousand_calls_that_are_given_up_leave_nothing_open, of_64_callers_of_a_new_event_one_gets_it,);

/// T01
async fn two_thousand_calls_that_are_given_up_leave_nothing_open(ledger: Ledger) -> Result<()> {
    const CALLS: u64 = 2_000;
    let sidecar = Sidecar::start_with(ledger, |command| command.env("SIDECAR_CALLS_MAX", "2")).await?;
    let client = sidecar.client().await?;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut calls = JoinSet::new();
    for number in 0..CALLS {
        let (mut client, event_id) = (client.clone(), format!("evt_{}", number % 200));
        let after = Duration::from_micros(random.random_range(0..3_000));
        calls.spawn(async move {
            if number % 2 == 0 {
                // Dropped on its way.
                let _ = tokio::time::timeout(after, client.check_and_lock(claim(&event_id, ""))).await;
            } else {
                let mut request = tonic::Request::new(claim(&event_id, ""));
                request.set_timeout(Duration::from_millis(1));
                let _ = client.check_and_lock(request).await;
            }
        });
        // Some at once, not all.
        if calls.len() >= 16 {
            calls.join_next().await.context("a call")??;
        }
    }
    while let Some(call) = calls.join_next().await {
        call?;
    }

    // The pool is whole: as many calls as it permits, several times over, on one connection and on a new one.
    for (round, client) in [client, sidecar.client().await?].iter().enumerate() {
        for number in 0..50 {
            let event_id = format!("evt_after_{round}_{number}");
            let lock = ask(client, claim(&event_id, "")).await?.lock.context("the lock")?;
            client.clone().mark_completed(completion(&event_id, lock.fencing_token)).await?;
        }
    }
    let count = "select count(*) from payment_webhook_events where event_id like 'evt\\_after\\_%' escape '\\' \
        and state = 'completed'";
    assert_eq!(sidecar.outside(count).await?, "100", "what was acknowledged is seen from outside");
    if let Some(database) = sidecar.database() {
        let open = "select count(*) from pg_stat_activity where datname = current_database() \
            and state like 'idle in transaction%'";
        assert_eq!(database.query(open).await?, "0");
    }
    assert!(!sidecar.program.output().contains("25P02"), "a transaction that had failed was used");
    Ok(())
}

/// T02
async fn of_64_callers_of_a_new_event_one_gets_it(ledger: Ledger) -> Result<()> {
    let sidecar = Sidecar::start(ledger).await?;
    let mut callers = JoinSet::new();
    for number in 0..64 {
        let client = sidecar.client().await?;
        callers.spawn(async move { ask(&client, claim("evt_1", &format!("claim-{number}"))).await });
    }
    let mut acquired = 0;
    while let Some(answer) = callers.join_next().await {
        match answer??.decision() {
            Decision::Acquired => acquired += 1,
            other => assert_eq!(other, Decision::InProgress),
        }
    }
    assert_eq!(acquired, 1);
    assert_eq!(sidecar.outside("select count(*) from payment_webhook_events").await?, "1");
    let client = sidecar.client().await?;
    let event = eventually("63 duplicates are counted", async || {
        let history = history(&client, "evt_1").await.ok()??;
        (history.event.as_ref()?.duplicate_count == 63).then_some(history)
    })
    .await;
    assert_eq!((event.attempts.len(), event.event.context("the event")?.state()), (1, State::Processing));
    Ok(())
}
