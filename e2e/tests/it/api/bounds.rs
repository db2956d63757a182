//! Bounds on the calls under way: who is refused, and who is not.

use anyhow::{Context as _, Result};
use futures::FutureExt as _;
use oncegate_api::{
    reason,
    v1::{self, Decision},
};
use oncegate_sidecar::coordinator::Limits;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{Served, claim, reason_of, seconds, waiting};
use crate::setup::Ledger;

#[tokio::test]
async fn calls_beyond_the_bound_are_refused_at_once_as_overloaded() -> Result<()> {
    let served = Served::with_limits(Ledger::Sqlite, Limits { calls_max: 1, waiting_max: 1 }).await?;
    let calls = (0..64).map(|number| served.claim(claim(&format!("evt_{number}"))).boxed());
    let answers = futures::future::join_all(calls).await;
    let granted = answers.iter().filter(|answer| answer.is_ok()).count();
    assert!((1..answers.len()).contains(&granted), "{granted} of {}", answers.len());
    for status in answers.into_iter().filter_map(Result::err) {
        assert_eq!((status.code(), reason_of(&status).as_str()), (Code::Unavailable, reason::OVERLOADED));
        assert!(status.get_details_retry_info().context("RetryInfo")?.retry_delay.is_some());
    }
    Ok(())
}

#[tokio::test]
async fn a_crowd_that_wakes_has_nobody_elses_claim_refused() -> Result<()> {
    let served = Served::with_limits(Ledger::Sqlite, Limits { calls_max: 2, waiting_max: 1_000 }).await?;
    let lock = served.lock("evt_1").await?;
    let waiters = waiting(&served, "evt_1", 600).await;
    let answered = CancellationToken::new();
    let others = async {
        let mut number = 0;
        while !answered.is_cancelled() {
            served.lock(&format!("evt_other_{number}")).await?;
            number += 1;
        }
        anyhow::Ok(number)
    };
    let crowd = async {
        served.complete("evt_1", lock.fencing_token).await?;
        let answers = futures::future::join_all(waiters).await;
        answered.cancel();
        for answer in answers {
            assert_eq!(answer??.decision(), Decision::AlreadyCompleted);
        }
        anyhow::Ok(())
    };
    let (others, crowd) = tokio::join!(others, crowd);
    crowd?;
    assert!(others? > 0);
    Ok(())
}

#[tokio::test]
async fn a_completion_does_not_stand_in_line_behind_claims_that_wait_for_a_place() -> Result<()> {
    let served = Served::with_limits(Ledger::Sqlite, Limits { calls_max: 1, waiting_max: 1_000 }).await?;
    let mut granted = Vec::new();
    for number in 0..20 {
        let event_id = format!("evt_granted_{number}");
        let lock = served.claim(claim(&event_id)).await?.lock.context("the lock")?;
        granted.push((event_id, lock.fencing_token));
    }
    let ended = CancellationToken::new();
    let crowd = futures::future::join_all((0..64).map(|caller| {
        let (served, ended) = (&served, &ended);
        async move {
            let mut number = 0;
            while !ended.is_cancelled() {
                let new = claim(&format!("evt_{caller}_{number}"));
                served.claim(v1::CheckAndLockRequest { wait_duration: seconds(20), ..new }).await?;
                number += 1;
            }
            Ok::<_, Status>(number)
        }
    }));
    let completions = async {
        let mut completed = Ok(());
        for (event_id, token) in &granted {
            completed = completed.and(served.complete(event_id, *token).await.map(drop));
        }
        ended.cancel();
        completed
    };
    let (claims, completed) = tokio::join!(crowd, completions);
    completed?;
    for claims in claims {
        assert!(claims? > 0, "the crowd was there");
    }
    Ok(())
}
