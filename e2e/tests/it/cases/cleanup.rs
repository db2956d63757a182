//! Cleanup under fire, and Cleanup as nobody should ask for it.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, stream};
use oncegate_api::{
    reason,
    v1::{CleanupRequest, State},
};
use oncegate_sidecar::{
    event::{Decision, State as Stored},
    ledger::filter::{CleanupProgress, CleanupScope},
};
use tonic_types::StatusExt as _;

use super::{Sidecar, ask, claim, completion};
use crate::{
    ledger::{self, Fixture},
    setup::{Ledger, on_each_ledger},
};

/// Rows of the test, from the environment (`ONCEGATE_CLEANUP_ROWS`); a million in a campaign.
fn rows() -> usize {
    std::env::var("ONCEGATE_CLEANUP_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(1_500)
}

/// T29
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_cleanups_at_once_of_which_one_is_killed_delete_what_was_counted_on_sqlite() {
    two_cleanups(Fixture::sqlite()).await;
}

/// T29
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_cleanups_at_once_of_which_one_is_killed_delete_what_was_counted_on_postgres() {
    two_cleanups(Fixture::postgres().await).await;
}

async fn two_cleanups(fixture: Fixture) {
    let rows = rows();
    // Completed, except every tenth, which is still being processed and may never go.
    stream::iter(0..rows)
        .for_each_concurrent(64, async |number| {
            let key = ledger::key(&format!("evt_{number}"));
            let claimed = fixture.ledger.claim(ledger::claim(&key, "claim")).await.unwrap();
            let Decision::Acquired(lock) = claimed.decision else { panic!("{claimed:?}") };
            if number % 10 != 0 {
                fixture.ledger.mark(ledger::completion(&key, &lock)).await.unwrap();
            }
        })
        .await;
    let open = rows.div_ceil(10);
    let scope = CleanupScope {
        tenant: None,
        provider: None,
        before: fixture.now().await,
        states: vec![Stored::Completed, Stored::Dead],
        dry_run: true,
        batch_size: 100,
    };
    let dry = run(&fixture, &scope).await;
    let matched = counted(&dry).0;
    assert_eq!(matched, i64::try_from(rows - open).unwrap());

    // Traffic goes on, and what it completes is younger than the moment.
    let ended = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicUsize::new(0));
    let traffic = tokio::spawn({
        let (ledger, ended, served) = (fixture.ledger.clone(), ended.clone(), served.clone());
        async move {
            while !ended.load(Ordering::Relaxed) {
                let key = ledger::key(&format!("live_{}", served.load(Ordering::Relaxed)));
                let Decision::Acquired(lock) = ledger.claim(ledger::claim(&key, "claim")).await.unwrap().decision
                else {
                    panic!("held")
                };
                ledger.mark(ledger::completion(&key, &lock)).await.unwrap();
                served.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let scope = CleanupScope { dry_run: false, ..scope };
    // One that is killed on its way.
    let killed = tokio::spawn({
        let (ledger, scope) = (fixture.ledger.clone(), scope.clone());
        async move {
            let mut progress = CleanupProgress::default();
            while !progress.done {
                ledger.cleanup_step(&scope, &mut progress).await.unwrap();
            }
        }
    });
    let first = run(&fixture, &scope);
    let second = run(&fixture, &scope);
    let (first, second, ()) = tokio::join!(first, second, async {
        tokio::time::sleep(Duration::from_millis(2)).await;
        killed.abort();
        drop(killed.await);
    });
    let again = run(&fixture, &scope).await;
    let before = served.load(Ordering::Relaxed);
    assert!(before > 0, "traffic stood still");
    ended.store(true, Ordering::Relaxed);
    traffic.await.unwrap();

    // No row was counted twice; those of the killed one are in no total.
    let deleted: i64 = [first, second, again].iter().map(|progress| counted(progress).1).sum();
    assert!(deleted <= matched, "{deleted} of {matched}");
    for number in (0..rows).step_by(7) {
        let left = fixture.ledger.history_of(ledger::key(&format!("evt_{number}"))).await.unwrap().is_some();
        assert_eq!(left, number % 10 == 0, "evt_{number}: only what has ended goes");
    }
    for number in 0..served.load(Ordering::Relaxed) {
        assert!(fixture.ledger.history_of(ledger::key(&format!("live_{number}"))).await.unwrap().is_some());
    }
    let left = run(&fixture, &CleanupScope { dry_run: true, ..scope }).await;
    assert_eq!(counted(&left).0, 0, "all that was counted has gone");
    fixture.close().await;
}

/// Matched, and deleted.
fn counted(progress: &CleanupProgress) -> (i64, i64) {
    progress.providers.values().fold((0, 0), |sum, totals| (sum.0 + totals.matched, sum.1 + totals.deleted))
}

async fn run(fixture: &Fixture, scope: &CleanupScope) -> CleanupProgress {
    let mut progress = CleanupProgress::default();
    while !progress.done {
        fixture.ledger.cleanup_step(scope, &mut progress).await.unwrap();
    }
    progress
}

on_each_ledger!(a_cleanup_that_nobody_can_mean_is_refused_and_deletes_nothing);

/// T30
async fn a_cleanup_that_nobody_can_mean_is_refused_and_deletes_nothing(ledger: Ledger) -> Result<()> {
    let mut sidecar = Sidecar::start(ledger).await?;
    let client = sidecar.client().await?;
    let token = ask(&client, claim("evt_1", "")).await?.lock.context("the lock")?.fencing_token;
    client.clone().mark_completed(completion("evt_1", token)).await?;
    let lasting = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    for (what, older_than) in [
        ("zero", lasting(0, 0)),
        ("negative", lasting(-1, 0)),
        ("negative by a nanosecond", lasting(0, -1)),
        ("the smallest", lasting(i64::MIN, i32::MIN)),
        ("a nanosecond", lasting(0, 1)),
        ("below the floor", lasting(6 * 86_400 - 1, 0)),
        ("absurd", lasting(i64::MAX, 0)),
        ("no duration", lasting(7 * 86_400, i32::MAX)),
        ("mixed signs", lasting(7 * 86_400, -1)),
    ] {
        for dry_run in [true, false] {
            let request = CleanupRequest { older_than, dry_run, ..Default::default() };
            let status = match client.clone().cleanup(request).await {
                Err(status) => status,
                Ok(mut stream) => match stream.get_mut().message().await {
                    Err(status) => status,
                    Ok(message) => panic!("{what}: {message:?}"),
                },
            };
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{what}: {status:?}");
            let info = status.get_details_error_info().context("ErrorInfo")?;
            assert_eq!(info.reason, reason::INVALID_FIELD, "{what}");
        }
    }
    for state in [State::Processing, State::Pending, State::Unspecified] {
        let request =
            CleanupRequest { older_than: lasting(7 * 86_400, 0), states: vec![state.into()], ..Default::default() };
        let status = client.clone().cleanup(request).await.expect_err("open events never go");
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{state:?}");
    }
    let line = sidecar.program.line_where("it is logged", |line| line.contains("cleanup was refused")).await?;
    assert!(line.contains("\"WARN\""), "{line}");
    assert_eq!(sidecar.outside("select count(*) from payment_webhook_events").await?, "1");
    Ok(())
}
