//! How every service ends: readiness off at once, what is under way finished within the drain, peers that hang ignored,
//! status 0 (T31); and a second signal that ends it at once.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{
    CheckAndLockRequest, CheckAndLockResponse, Decision, EventKey, idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::{
    eventually, http_client,
    program::{Oncegate, Running},
    stripe,
    upstream::{Answer, Upstream},
    wire::{http2, say},
};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::setup::{SECRET, send_signed, word};

/// A service with all that belongs to it.
struct Service {
    program: Running,
    sidecar: Option<SocketAddr>,
    gateway: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    upstream: Upstream,
    // What a gateway on its own needs. Ends after it.
    _other: Option<Running>,
    _directory: TempDir,
}

impl Service {
    async fn start(command: &str) -> Result<Self> {
        let upstream = Upstream::start().await?;
        let directory = tempfile::tempdir()?;
        let start = |arguments: &[&'static str]| -> Result<Running> {
            Oncegate::new(directory.path(), arguments.iter().copied())?
                .env("SIDECAR_LISTEN", "127.0.0.1:0")
                .env("GATEWAY_LISTEN", "127.0.0.1:0")
                .env("APPLICATION_LISTEN", "127.0.0.1:0")
                .env("ADMIN_LISTEN", "127.0.0.1:0")
                .env("UPSTREAM_URL", upstream.url())
                .env("STRIPE_WEBHOOK_SECRET", SECRET)
                .env("SIDECAR_DRAIN", "3s")
                .start()
        };
        match command {
            "gateway" => {
                let mut other = start(&["sidecar"])?;
                let sidecar = other.address("sidecar").await?;
                let mut program = Oncegate::new(directory.path(), ["gateway"])?
                    .env("GATEWAY_LISTEN", "127.0.0.1:0")
                    .env("ADMIN_LISTEN", "127.0.0.1:0")
                    .env("SIDECAR_URL", format!("http://{sidecar}"))
                    .env("UPSTREAM_URL", upstream.url())
                    .env("STRIPE_WEBHOOK_SECRET", SECRET)
                    .start()?;
                let gateway = Some(program.address("gateway").await?);
                let admin = Some(program.address("admin").await?);
                let sidecar = None;
                Ok(Self { program, sidecar, gateway, admin, upstream, _other: Some(other), _directory: directory })
            }
            "dev" => {
                let mut program = start(&["dev"])?;
                program.line_where("dev serves", |line| line.contains("Serving until")).await?;
                let output = program.output();
                let address = |name: &str| -> Result<SocketAddr> {
                    let line = output.lines().find(|line| line.starts_with(name)).context("an address")?;
                    let url = line.split_whitespace().nth(1).context("a URL")?;
                    Ok(url.trim_start_matches("http://").parse()?)
                };
                let (sidecar, gateway) = (Some(address("sidecar")?), Some(address("gateway")?));
                Ok(Self { program, sidecar, gateway, admin: None, upstream, _other: None, _directory: directory })
            }
            command => {
                let mut program = start(if command == "all" { &["all"] } else { &["sidecar"] })?;
                let sidecar = Some(program.address("sidecar").await?);
                let admin = Some(program.address("admin").await?);
                let gateway = if command == "all" { Some(program.address("gateway").await?) } else { None };
                Ok(Self { program, sidecar, gateway, admin, upstream, _other: None, _directory: directory })
            }
        }
    }

    /// Peers that hold nothing up: silent ones, half a preface, half a head, an open health watch.
    async fn hangers(&self) -> Result<Vec<TcpStream>> {
        let mut hangers = Vec::new();
        for address in [self.sidecar, self.gateway, self.admin].into_iter().flatten() {
            hangers.push(TcpStream::connect(address).await?);
        }
        if let Some(sidecar) = self.sidecar {
            hangers.push(say(sidecar, &http2::PREFACE[..12]).await?);
            if self.admin.is_some() {
                // It does not even answer the question whether it has heard of the end: the drain's bound is for such.
                hangers.push(http2::begin(sidecar, &[]).await?);
            }
        }
        Ok(hangers)
    }

    async fn watch(&self) -> Result<Option<tonic::Streaming<tonic_health::pb::HealthCheckResponse>>> {
        let Some(sidecar) = self.sidecar else { return Ok(None) };
        let channel = tonic::transport::Channel::from_shared(format!("http://{sidecar}"))?.connect().await?;
        let mut client = HealthClient::new(channel);
        let mut watch = client.watch(HealthCheckRequest { service: String::new() }).await?.into_inner();
        watch.message().await?.context("a status")?;
        Ok(Some(watch))
    }
}

/// A call that is under way: one that waits for an event that another holds.
async fn waiting(
    sidecar: SocketAddr,
    admin: SocketAddr,
) -> Result<AbortOnDropHandle<Result<CheckAndLockResponse, tonic::Status>>> {
    let mut client = IdempotencyServiceClient::connect(format!("http://{sidecar}")).await?;
    let claim = CheckAndLockRequest {
        key: Some(EventKey { provider: "stripe".into(), event_id: "evt_held".into(), ..Default::default() }),
        event_type: "charge.succeeded".into(),
        ..Default::default()
    };
    client.check_and_lock(claim.clone()).await?;
    let waits = CheckAndLockRequest {
        claim_id: "waits".into(),
        wait_duration: Some(prost_types::Duration { seconds: 20, nanos: 0 }),
        ..claim
    };
    let call = tokio::spawn(async move { Ok(client.check_and_lock(waits).await?.into_inner()) });
    eventually("it waits", async || {
        let page = http_client::get(admin, "/metrics").await.ok()?;
        String::from_utf8_lossy(&page.body).contains("\noncegate_calls_waiting 1\n").then_some(())
    })
    .await;
    Ok(AbortOnDropHandle::new(call))
}

/// T31, of one service.
async fn ends_in_order(command: &str) -> Result<()> {
    let mut service = Service::start(command).await?;
    let _hangers = service.hangers().await?;
    let watch = service.watch().await?;
    if let Some(admin) = service.admin {
        eventually("it is ready", async || {
            (http_client::get(admin, "/readyz").await.ok()?.status == 200).then_some(())
        })
        .await;
    }
    service.upstream.answer_otherwise(Answer::ok().after(Duration::from_millis(700)));
    // `dev` has an application and secrets of its own, and answers at once.
    let under_way = service.gateway.filter(|_| command != "dev").map(|gateway| {
        tokio::spawn(async move {
            let body = stripe::event(&stripe::event_id(), "charge.succeeded");
            send_signed(gateway, &stripe::sign(SECRET, &body), &body).await
        })
    });
    if under_way.is_some() {
        service.upstream.wait_for(1).await;
    }

    // A caller that waits for the outcome of another's attempt is told what is true, and not kept waiting.
    let waiting = match (service.sidecar, service.admin) {
        (Some(sidecar), Some(admin)) => Some(waiting(sidecar, admin).await?),
        _ => None,
    };

    let began = Instant::now();
    service.program.signal("TERM")?;
    if let Some(waiting) = waiting {
        let answer = waiting.await?.context("a call that was under way is answered")?;
        assert_eq!(answer.decision(), Decision::InProgress);
        assert!(began.elapsed() < Duration::from_secs(5), "and not only when its time was over");
    }
    if let (Some(admin), Some(_)) = (service.admin, &under_way) {
        eventually("readiness goes off while the delivery is still under way", async || {
            let answer = http_client::get(admin, "/readyz").await.expect("it answers until the end");
            (answer.status == 503 && answer.body.starts_with(b"draining")).then_some(())
        })
        .await;
        let gateway = service.gateway.context("a gateway")?;
        eventually("new connections are refused", async || TcpStream::connect(gateway).await.is_err().then_some(()))
            .await;
    }
    if let Some(under_way) = under_way {
        assert_eq!(word(&under_way.await??), "200 processed");
    }
    let finished = service.program.finish(Duration::from_secs(10)).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}: peers that hang held it up\n{finished}", began.elapsed());
    if let Some(mut watch) = watch {
        // Told that it does not serve, or cut off; never left to believe that it serves.
        let mut last = None;
        while let Ok(Some(message)) = watch.message().await {
            last = Some(message.status);
        }
        let not_serving = i32::from(tonic_health::pb::health_check_response::ServingStatus::NotServing);
        assert!(last.is_none_or(|last| last >= not_serving), "{last:?}");
    }
    Ok(())
}

/// A call that never ends holds the drain up, and a second signal does not wait for it.
async fn a_second_signal_ends(command: &str, signal: &str, code: i32) -> Result<()> {
    let mut service = Service::start(command).await?;
    service.upstream.answer_otherwise(Answer::hang());
    let mut holding = None;
    let mut under_way = None;
    match (service.sidecar, service.gateway) {
        (Some(sidecar), _) => {
            let mut stream = http2::begin(sidecar, &[]).await?;
            let headers = http2::frame(http2::HEADERS, http2::END_HEADERS, 1, &http2::call("CheckAndLock"));
            tokio::io::AsyncWriteExt::write_all(&mut stream, &headers).await?;
            // Answered after the call before it has begun.
            let ping = http2::frame(http2::PING, 0, 0, b"01234567");
            tokio::io::AsyncWriteExt::write_all(&mut stream, &ping).await?;
            let mut seen = Vec::new();
            while !http2::frames(&seen).iter().any(|(kind, ..)| *kind == http2::PING) {
                assert_ne!(tokio::io::AsyncReadExt::read_buf(&mut stream, &mut seen).await?, 0);
            }
            holding = Some(stream);
        }
        (None, Some(gateway)) => {
            under_way = Some(tokio::spawn(async move {
                let body = stripe::event(&stripe::event_id(), "charge.succeeded");
                send_signed(gateway, &stripe::sign(SECRET, &body), &body).await
            }));
            service.upstream.wait_for(1).await;
        }
        (None, None) => anyhow::bail!("nothing listens"),
    }
    service.program.signal(signal)?;
    match service.admin {
        Some(admin) => {
            eventually("it drains", async || {
                (http_client::get(admin, "/readyz").await.ok()?.status == 503).then_some(())
            })
            .await;
        }
        None => {
            let address = service.gateway.context("a gateway")?;
            eventually("it drains", async || TcpStream::connect(address).await.is_err().then_some(())).await;
        }
    }
    let began = Instant::now();
    service.program.signal(signal)?;
    let finished = service.program.finish(Duration::from_secs(10)).await?;
    assert_eq!(finished.code, Some(code), "{finished}");
    assert!(began.elapsed() < Duration::from_secs(2), "at once: {:?}", began.elapsed());
    drop((holding, under_way));
    Ok(())
}

macro_rules! of_each_service {
    ($($name:ident: $body:expr;)+) => {
        $(#[tokio::test] async fn $name() -> Result<()> { $body.await })+
    };
}

of_each_service! {
    // T31
    a_sidecar_ends_in_order: ends_in_order("sidecar");
    a_gateway_ends_in_order: ends_in_order("gateway");
    both_in_one_end_in_order: ends_in_order("all");
    dev_ends_in_order: ends_in_order("dev");
    a_second_sigterm_ends_a_sidecar_at_once: a_second_signal_ends("sidecar", "TERM", 143);
    a_second_sigterm_ends_a_gateway_at_once: a_second_signal_ends("gateway", "TERM", 143);
    a_second_sigint_ends_both_at_once: a_second_signal_ends("all", "INT", 130);
    a_second_sigint_ends_dev_at_once: a_second_signal_ends("dev", "INT", 130);
}

#[tokio::test]
async fn what_outlasts_the_drain_is_cut_and_the_status_is_still_0() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut program = Oncegate::new(directory.path(), ["sidecar"])?
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .env("SIDECAR_DRAIN", "500ms")
        .start()?;
    let sidecar = program.address("sidecar").await?;
    let mut stream = http2::begin(sidecar, &[]).await?;
    let headers = http2::frame(http2::HEADERS, http2::END_HEADERS, 1, &http2::call("CheckAndLock"));
    tokio::io::AsyncWriteExt::write_all(&mut stream, &headers).await?;
    tokio::io::AsyncReadExt::read_u8(&mut stream).await?;
    let began = Instant::now();
    let finished = program.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let took = began.elapsed();
    assert!((Duration::from_millis(450)..Duration::from_secs(5)).contains(&took), "{took:?}");
    Ok(())
}

/// To the first process of a container the kernel gives no signal that it has not asked for.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_command_ends_by_a_signal_as_the_first_process_too() -> Result<()> {
    let directory = tempfile::tempdir()?;
    // Who takes calls and never answers them.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let sidecar = format!("http://{}", silent.local_addr()?);
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let mut running = Oncegate::new(directory.path(), ["stats", "--sidecar", &sidecar])?.first_process().start()?;
        let (_call, _) = tokio::time::timeout(oncegate_e2e::DEADLINE, silent.accept()).await.context("no call")??;
        let children = format!("/proc/{pid}/task/{pid}/children", pid = running.pid()?);
        let command = std::fs::read_to_string(children)?.trim().parse()?;
        oncegate_e2e::supervised::send_signal(command, signal)?;
        let finished = running.finish(oncegate_e2e::DEADLINE).await?;
        assert_eq!(finished.code, Some(code), "{finished}");
    }
    Ok(())
}
