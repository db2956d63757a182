//! The store, or the process on it, killed under load: nothing that was acknowledged is missing (I5), nothing is done
//! twice (I4), and it goes on by itself.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use oncegate_api::v1::Decision;
use oncegate_e2e::{
    eventually, http_client,
    postgres::{Cluster, Options},
    program::Oncegate,
    stripe,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{Client, Sidecar, ask, claim, completion};
use crate::setup::{Everything, Ledger, on_each_ledger, word};

/// Events that were acknowledged as completed.
type Acknowledged = Arc<Mutex<Vec<String>>>;

/// Claims and completes until told to end; failures are what an outage is.
fn load(client: &Client, ended: &CancellationToken) -> (Vec<AbortOnDropHandle<()>>, Acknowledged) {
    let acknowledged = Acknowledged::default();
    let workers = (0..16)
        .map(|worker| {
            let (client, ended, acknowledged) = (client.clone(), ended.clone(), acknowledged.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                let mut round = 0;
                while !ended.is_cancelled() {
                    round += 1;
                    let event_id = format!("evt_{worker}_{round}");
                    let Ok(answer) = ask(&client, claim(&event_id, "")).await else {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    };
                    let Some(lock) = answer.lock else { continue };
                    if client.clone().mark_completed(completion(&event_id, lock.fencing_token)).await.is_ok() {
                        acknowledged.lock().expect("nobody panics with it").push(event_id);
                    }
                }
            }))
        })
        .collect();
    (workers, acknowledged)
}

fn count(acknowledged: &Acknowledged) -> usize {
    acknowledged.lock().expect("nobody panics with it").len()
}

/// Waits until so many more have been acknowledged.
async fn more(acknowledged: &Acknowledged, number: usize) {
    let wanted = count(acknowledged) + number;
    eventually(&format!("{number} more completions"), async || (count(acknowledged) >= wanted).then_some(())).await;
}

async fn all_are_completed(client: &Client, acknowledged: &Acknowledged) -> Result<()> {
    let acknowledged = acknowledged.lock().expect("nobody panics with it").clone();
    for event_id in &acknowledged {
        let answer = ask(client, claim(event_id, "")).await?;
        assert_eq!(answer.decision(), Decision::AlreadyCompleted, "{event_id} was acknowledged");
    }
    Ok(())
}

/// T23
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_killed_under_load_loses_nothing_and_is_used_again_within_ten_seconds() -> Result<()> {
    let mut cluster = Cluster::start(Options { fsync: true, ..Options::default() }).await?;
    let sidecar = Sidecar::start(Ledger::Postgres(cluster.database().await?)).await?;
    let client = sidecar.client().await?;
    let ended = CancellationToken::new();
    let (workers, acknowledged) = load(&client, &ended);
    for _ in 0..2 {
        more(&acknowledged, 100).await;
        cluster.kill()?;
        let during = count(&acknowledged);
        let status = ask(&client, claim("evt_during", "")).await.expect_err("fail closed");
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(count(&acknowledged) <= during + 16, "acknowledged without a store");
        cluster.restart().await?;
        let back = Instant::now();
        more(&acknowledged, 1).await;
        assert!(back.elapsed() < Duration::from_secs(10), "{:?}", back.elapsed());
    }
    ended.cancel();
    futures::future::join_all(workers).await;
    all_are_completed(&client, &acknowledged).await
}

on_each_ledger!(a_sidecar_killed_under_load_loses_nothing);

/// T23, of the process: the embedded store dies with it.
async fn a_sidecar_killed_under_load_loses_nothing(ledger: Ledger) -> Result<()> {
    let mut sidecar = Sidecar::start(ledger).await?;
    for _ in 0..2 {
        let client = sidecar.client().await?;
        let ended = CancellationToken::new();
        let (workers, acknowledged) = load(&client, &ended);
        more(&acknowledged, 50).await;
        sidecar.crash().await?;
        ended.cancel();
        futures::future::join_all(workers).await;
        let client = sidecar.client().await?;
        all_are_completed(&client, &acknowledged).await?;
        // The next round begins with other names.
        for number in 0..16 {
            client.clone().check_and_lock(claim(&format!("evt_{number}_0"), "")).await?;
        }
        let all = "select count(*) from payment_webhook_events where state = 'completed'";
        let stored: usize = sidecar.outside(all).await?.parse()?;
        assert!(stored >= count(&acknowledged), "{stored}");
    }
    Ok(())
}

on_each_ledger!(a_collector_that_never_answers_changes_nothing);

/// T33. A place for telemetry that takes connections and says nothing: no request waits for it, and neither does the end.
async fn a_collector_that_never_answers_changes_nothing(ledger: Ledger) -> Result<()> {
    let collector = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = collector.local_addr()?;
    let mut everything = Everything::start_as(ledger, |command: Oncegate| {
        command
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"))
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
            .env("TOKIO_WORKER_THREADS", "1")
    })
    .await?;
    let mut times = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        let body = stripe::event(&stripe::event_id(), "charge.succeeded");
        assert_eq!(word(&everything.send(&body).await?), "200 processed");
        times.push(began.elapsed());
    }
    // Were any of them to wait for the collector, it would take seconds, and all behind it as well.
    times.sort_unstable();
    assert!(times[44] < Duration::from_millis(250) && times[49] < Duration::from_secs(1), "{times:?}");
    assert_eq!(http_client::get(everything.admin, "/metrics").await?.status, 200);
    let began = Instant::now();
    let finished = everything.program.stop().await.context("it ends")?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    Ok(())
}
