//! Postgres away: the service refuses, the gateway tells the provider to come back, nothing is delivered without a lock,
//! and everything goes on by itself when Postgres returns (L6). Away for one of two sidecars only: the other does the work.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use oncegate_api::{
    reason,
    v1::{CheckAndLockRequest, EventKey},
};
use oncegate_e2e::{
    eventually, http_client,
    postgres::{Cluster, Options},
    program::{Oncegate, Running},
    proxy::{Link, Proxy},
    stripe,
    upstream::Upstream,
};
use sqlx::{Connection as _, PgConnection};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::setup::{Everything, Ledger, SECRET, send_signed, word};

// T23
#[tokio::test]
async fn without_postgres_nothing_is_delivered_and_everything_recovers_without_a_restart() -> Result<()> {
    let mut cluster = Cluster::start(Options { fsync: true, ..Options::default() }).await?;
    let everything = Everything::start(Ledger::Postgres(cluster.database().await?)).await?;
    let before = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&everything.send(&before).await?), "200 processed");

    cluster.kill()?;
    let during = stripe::event(&stripe::event_id(), "charge.succeeded");
    for _ in 0..3 {
        let began = Instant::now();
        let answer = everything.send(&during).await?;
        assert_eq!(answer.status.as_u16(), 503, "{:?}", answer.body);
        let retry_after: u64 = answer.header("retry-after").parse().context("Retry-After in seconds")?;
        assert!((1..=60).contains(&retry_after));
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    let claim = CheckAndLockRequest {
        key: Some(EventKey { provider: "stripe".into(), event_id: "evt_direct".into(), ..Default::default() }),
        event_type: "charge.succeeded".into(),
        ..Default::default()
    };
    let mut client = everything.client().await?;
    let status = client.check_and_lock(claim.clone()).await.expect_err("the store is away");
    assert_eq!(status.code(), Code::Unavailable);
    let info = status.get_details_error_info().context("ErrorInfo")?;
    assert_eq!(info.reason, reason::STORE_UNAVAILABLE);
    assert!(status.get_details_retry_info().context("RetryInfo")?.retry_delay.is_some());
    assert_eq!(everything.upstream.requests().len(), 1, "nothing without a lock");

    cluster.restart().await?;
    eventually("the event is delivered once Postgres is back", async || {
        let answer = everything.send(&during).await.ok()?;
        matches!(word(&answer).as_str(), "200 processed" | "200 already_processed").then_some(())
    })
    .await;
    assert_eq!(word(&everything.send(&before).await?), "200 already_processed");
    client.check_and_lock(claim).await?;
    assert_eq!(everything.upstream.requests().len(), 2, "each event once");
    Ok(())
}

// T27
#[tokio::test]
async fn a_standby_behind_the_name_decides_nothing_until_it_is_promoted() -> Result<()> {
    let mut primary = Cluster::start(Options::default()).await?;
    let database = primary.database().await?;
    let standby = primary.standby(Options::default()).await?;
    primary.wait_for_standby(false).await?;
    // The name by which applications know the database.
    let name = Proxy::start(primary.address()).await?;
    let url = format!("postgres://postgres@{}/{}", name.address(), database.name());
    let everything = Everything::start_as(Ledger::Sqlite, |command| command.env("DATABASE_URL", url)).await?;
    let before = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&everything.send(&before).await?), "200 processed");
    let claim = |event_id: &str| CheckAndLockRequest {
        key: Some(EventKey { provider: "stripe".into(), event_id: event_id.into(), ..Default::default() }),
        event_type: "charge.succeeded".into(),
        ..Default::default()
    };
    let mut client = everything.client().await?;
    client.check_and_lock(claim("evt_before")).await?;
    // Read before the primary goes: what it says last has to be there.
    let told = "select count(*) from payment_webhook_events";
    let rows = database.query(told).await?;
    let mut reader = PgConnection::connect(&standby.url(database.name())).await?;
    eventually("the standby has it all", async || {
        let count: i64 = sqlx::query_scalar(told).fetch_one(&mut reader).await.ok()?;
        (count.to_string() == rows).then_some(())
    })
    .await;

    primary.kill()?;
    name.set_target(standby.address());
    name.reset();
    let during = stripe::event(&stripe::event_id(), "charge.succeeded");
    for _ in 0..5 {
        let status = client.check_and_lock(claim("evt_during")).await.expect_err("a standby cannot decide");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(everything.send(&during).await?.status.as_u16(), 503);
    }
    assert_eq!(everything.upstream.requests().len(), 1, "nothing without a lock");

    standby.promote().await?;
    a_new_event_is_processed(&everything).await;
    it_is_delivered_once(&everything, &during).await;
    assert_eq!(word(&everything.send(&before).await?), "200 already_processed");
    client.check_and_lock(claim("evt_during")).await?;
    Ok(())
}

// T27
#[tokio::test]
async fn a_read_only_database_is_unavailable_until_it_can_be_written() -> Result<()> {
    let cluster = Cluster::start(Options::default()).await?;
    let database = cluster.database().await?;
    let name = database.name().to_owned();
    let mut admin = database.connect().await?;
    let everything = Everything::start(Ledger::Postgres(database)).await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let statement = |sql: String| sqlx::AssertSqlSafe(sql);
    // What a fail-over to the wrong node looks like from here: sessions that may not write.
    let read_only = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::raw_sql(statement(read_only)).execute(&mut admin).await?;
    let cut = "select pg_terminate_backend(pid) from pg_stat_activity \
        where datname = current_database() and pid <> pg_backend_pid()";
    sqlx::raw_sql(cut).execute(&mut admin).await?;
    eventually("the gateway refuses", async || {
        (everything.send(&body).await.ok()?.status.as_u16() == 503).then_some(())
    })
    .await;
    assert_eq!(everything.upstream.requests().len(), 0);
    let writable = format!("begin read write; alter database {name} reset default_transaction_read_only; commit");
    sqlx::raw_sql(statement(writable)).execute(&mut admin).await?;
    a_new_event_is_processed(&everything).await;
    it_is_delivered_once(&everything, &body).await;
    Ok(())
}

/// How many calls a sidecar has answered with this code.
async fn answered(admin: SocketAddr, code: &str) -> Result<u64> {
    let page = http_client::get(admin, "/metrics").await?;
    let code = format!("code=\"{code}\"}} ");
    let mut calls = 0;
    for line in
        String::from_utf8_lossy(&page.body).lines().filter(|line| line.starts_with("oncegate_rpc_requests_total{"))
    {
        if let Some((_, count)) = line.split_once(&code) {
            calls += count.parse::<u64>()?;
        }
    }
    Ok(calls)
}

// T45
#[tokio::test]
async fn of_two_sidecars_one_that_is_cut_off_from_postgres_costs_no_webhook() -> Result<()> {
    let cluster = Cluster::start(Options::default()).await?;
    let database = cluster.database().await?;
    // The network of the first one's node.
    let network = Proxy::start(cluster.address()).await?;
    let over_it = format!("postgres://postgres@{}/{}", network.address(), database.name());
    let directory = tempfile::tempdir()?;
    let start = async |url: &str| -> Result<(Running, SocketAddr, SocketAddr)> {
        let mut program = Oncegate::new(directory.path(), ["sidecar"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("ADMIN_LISTEN", "127.0.0.1:0")
            .env("DATABASE_URL", url)
            .start()?;
        let (address, admin) = (program.address("sidecar").await?, program.address("admin").await?);
        Ok((program, address, admin))
    };
    let (_cut_off, first, admin) = start(&over_it).await?;
    let (_healthy, second, _) = start(database.url()).await?;
    let upstream = Upstream::start().await?;
    let mut gateway = Oncegate::new(directory.path(), ["gateway"])?
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("ADMIN_LISTEN", "127.0.0.1:0")
        .env("SIDECAR_URL", format!("http://{first},http://{second}"))
        .env("UPSTREAM_URL", upstream.url())
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        .start()?;
    let address = gateway.address("gateway").await?;
    let deliver = async || {
        let event = stripe::event(&stripe::event_id(), "charge.succeeded");
        send_signed(address, &stripe::sign(SECRET, &event), &event).await
    };
    eventually("the first one has its share", async || {
        deliver().await.ok()?;
        (answered(admin, "OK").await.ok()? > 0).then_some(())
    })
    .await;

    let before = upstream.requests().len();
    network.set(Link::Refuse);
    network.reset();
    for _ in 0..100 {
        assert_eq!(word(&deliver().await?), "200 processed");
    }
    assert_eq!(upstream.requests().len(), before + 100, "each event once");
    // Claims and marks. By a coin toss for each it would be a hundred; it is left alone for longer each time.
    let refused = answered(admin, "UNAVAILABLE").await?;
    assert!((1..=20).contains(&refused), "{refused} of 200");

    let served = answered(admin, "OK").await?;
    network.set(Link::Up);
    eventually("it is used again", async || {
        assert_eq!(word(&deliver().await.ok()?), "200 processed");
        (answered(admin, "OK").await.ok()? > served).then_some(())
    })
    .await;
    Ok(())
}

/// By the request that it came with. One that is answered with 503 is left alone: its claim may be repeated in the background
/// (G9), and the next request told that the event is processed already.
async fn a_new_event_is_processed(everything: &Everything) {
    eventually("a new event is processed", async || {
        let event = stripe::event(&stripe::event_id(), "charge.succeeded");
        (word(&everything.send(&event).await.ok()?) == "200 processed").then_some(())
    })
    .await;
}

/// An event that was sent while the ledger was away, by whichever of its requests.
async fn it_is_delivered_once(everything: &Everything, event: &[u8]) {
    eventually("the event is processed", async || everything.send(event).await.ok()?.status.is_success().then_some(()))
        .await;
    let requests = everything.upstream.requests();
    assert_eq!(requests.iter().filter(|request| request.body == event).count(), 1);
}
