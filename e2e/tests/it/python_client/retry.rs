//! grpc's own retries, by the service config that is shipped for clients in other languages.

use std::{
    convert::Infallible,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result};
use oncegate_e2e::{http_client, program::Oncegate};
use oncegate_runtime::{
    server::{Options, TowerToHyperService, serve},
    shutdown::CancellationToken,
};
use oncegate_sidecar::{
    Sidecar,
    cache::CacheSettings,
    config::{Access, Policy, Settings, Store},
    coordinator::Limits,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpListener,
    time::timeout,
};
use tonic::Status;
use tower::{Service as _, service_fn};

use super::{client, execute, generate};
use crate::{access::Guarded, setup::Ledger};

const SCRIPT: &str = "e2e/python/settled_by_retry.py";

/// Every first reply of a method is lost on its way, after the sidecar did what it was asked to.
#[tokio::test]
async fn a_lost_reply_is_settled_by_grpcs_own_retry_with_the_same_claim() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let python = generate(directory.path()).await?;
    let sidecar = Sidecar::start(Settings {
        listen: None,
        access: Access::open(),
        store: Store::Embedded(directory.path().join("oncegate.db")),
        migrate: false,
        policy: Policy::default(),
        cache: CacheSettings::default(),
        limits: Limits::default(),
        count_interval: Duration::from_secs(15),
        drain: Duration::from_secs(1),
    })
    .await?;
    let (service, replies) = (sidecar.service(), Arc::new(Mutex::new(Vec::<String>::new())));
    let stop = CancellationToken::new();
    let running = tokio::spawn(sidecar.run(stop.clone()));
    let seen = replies.clone();
    let losing = service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let (mut service, seen) = (service.clone(), seen.clone());
        async move {
            let path = request.uri().path().to_owned();
            let reply = service.call(request).await?;
            let first = {
                let mut seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                seen.push(path.clone());
                seen.iter().filter(|known| **known == path).count() == 1
            };
            Ok::<_, Infallible>(if first { Status::unavailable("the reply was lost").into_http() } else { reply })
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let losing = TowerToHyperService::new(losing);
    let proxy = tokio::spawn(serve(listener, losing, Options::http2(Duration::from_secs(1)), stop.clone()));
    let printed = execute(client(&python, directory.path(), SCRIPT).args([address.as_str(), "unavailable"])).await?;
    assert_eq!(printed, "settled\n");
    let service = "/oncegate.v1.IdempotencyService/";
    let wanted =
        ["CheckAndLock", "CheckAndLock", "MarkCompleted", "MarkCompleted"].map(|method| format!("{service}{method}"));
    assert_eq!(*replies.lock().unwrap_or_else(std::sync::PoisonError::into_inner), wanted);
    stop.cancel();
    proxy.await?;
    running.await??;
    Ok(())
}

#[tokio::test]
async fn a_restart_between_two_calls_is_not_seen_by_the_client() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let python = generate(directory.path()).await?;
    let start = |listen: &str| Oncegate::new(directory.path(), ["sidecar"])?.env("SIDECAR_LISTEN", listen).start();
    let mut sidecar = start("127.0.0.1:0")?;
    let address = sidecar.address("sidecar").await?.to_string();
    let mut running = client(&python, directory.path(), SCRIPT)
        .args([address.as_str(), "restart"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = running.stdin.take().context("its input")?;
    let mut lines = BufReader::new(running.stdout.take().context("its output")?).lines();
    assert_eq!(lines.next_line().await?.as_deref(), Some("ready"));
    sidecar.kill().await?;
    // Called while nobody listens: the call waits for the connection, within its time-out.
    input.write_all(b"go\n").await?;
    let mut sidecar = start(&address)?;
    let settled = timeout(Duration::from_secs(30), lines.next_line()).await.context("the call is settled in time")?;
    assert_eq!(settled?.as_deref(), Some("settled"));
    assert_eq!(running.wait().await?.code(), Some(0));
    assert_eq!(sidecar.stop().await?.code, Some(0));
    Ok(())
}

/// The service config has grpc call all addresses that a target has, where its default stays with the first.
#[tokio::test]
async fn calls_are_shared_among_the_addresses_of_a_target() -> Result<()> {
    let (database, directory) = (Ledger::postgres().await?, tempfile::tempdir()?);
    let python = generate(directory.path()).await?;
    let start = || {
        let command = Oncegate::new(directory.path(), ["sidecar"])?.env("SIDECAR_LISTEN", "127.0.0.1:0");
        database.configure(command).env("ADMIN_LISTEN", "127.0.0.1:0").start()
    };
    let mut sidecars = [start()?, start()?];
    let mut addresses = Vec::new();
    for sidecar in &mut sidecars {
        addresses.push(sidecar.address("sidecar").await?.to_string());
    }
    let target = format!("ipv4:{}", addresses.join(","));
    let printed = execute(client(&python, directory.path(), SCRIPT).args([target.as_str(), "balance"])).await?;
    assert_eq!(printed, "settled\n");
    let mut calls = Vec::new();
    for sidecar in &mut sidecars {
        let page = http_client::get(sidecar.address("admin").await?, "/metrics").await?;
        let page = String::from_utf8(page.body.to_vec())?;
        let rows = page.lines().filter(|line| line.starts_with("oncegate_rpc_requests_total{"));
        let counts = rows.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u32>().ok());
        calls.push(counts.sum::<u32>());
    }
    // A claim and a mark each, one after the other.
    assert_eq!(calls.iter().sum::<u32>(), 200, "{calls:?}");
    assert!(calls.iter().all(|calls| *calls > 50), "{calls:?}");
    Ok(())
}

#[tokio::test]
async fn a_client_in_python_calls_by_tls_with_a_token() -> Result<()> {
    let guarded = Guarded::start().await?;
    let directory = tempfile::tempdir()?;
    let python = generate(directory.path()).await?;
    let (ca, token) = (guarded.ca().to_string_lossy().into_owned(), guarded.token_file("caller")?);
    let target = guarded.url.trim_start_matches("https://");
    let call = async |token: &str| {
        execute(client(&python, directory.path(), SCRIPT).args([target, "unavailable", &ca, token])).await
    };
    assert_eq!(call(&token).await?, "settled\n");
    let refused = call(&guarded.token_file("cleanup")?).await.err().context("the role does not permit it")?;
    assert!(refused.to_string().contains("PERMISSION_DENIED"), "{refused}");
    Ok(())
}

/// What the service config says is what the table of errors says, and every method but the one that streams has a line.
#[test]
fn the_service_config_names_every_method_and_repeats_what_the_table_of_errors_permits() -> Result<()> {
    let root = super::root();
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(root.join("proto/oncegate/v1/service_config.json"))?)?;
    let mut named = Vec::new();
    for method in config["methodConfig"].as_array().context("methods")? {
        let codes = &method["retryPolicy"]["retryableStatusCodes"];
        assert_eq!(*codes, serde_json::json!(["UNAVAILABLE"]));
        for name in method["name"].as_array().context("names")? {
            assert_eq!(name["service"], "oncegate.v1.IdempotencyService");
            named.push(name["method"].as_str().context("a method")?.to_owned());
        }
    }
    let contract = std::fs::read_to_string(root.join("proto/oncegate/v1/idempotency.proto"))?;
    let mut methods: Vec<&str> = contract
        .lines()
        .filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next())
        .filter(|method| *method != "Cleanup")
        .collect();
    methods.sort_unstable();
    named.sort_unstable();
    assert_eq!(named, methods);
    // Each reason with the code that is repeated says that repeating helps.
    let errors = std::fs::read_to_string(root.join("docs/errors.md"))?;
    for row in errors.lines().filter(|line| line.contains("| UNAVAILABLE |")) {
        assert!(row.contains("Ask again") || row.contains("Repeat the very same call"), "{row}");
    }
    Ok(())
}
