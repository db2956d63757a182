//! One line in the log for each request, however it ends.

use std::io::Read as _;

use anyhow::{Context as _, Result, ensure};
use http::{Method, uri::PathAndQuery};
use oncegate_api::v1::{self, idempotency_service_client::IdempotencyServiceClient};
use oncegate_e2e::{eventually, http_client, program::Oncegate, stripe, upstream::Answer};
use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tonic::{Request, client::Grpc, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{Services, page, sum};
use crate::setup::{SECRET, STRIPE, send_signed};

/// The lines of a target in what a program logged.
fn lines(output: &str, target: &str) -> Vec<Value> {
    let lines = output.lines().filter(|line| line.contains(target));
    lines.filter_map(|line| serde_json::from_str(line).ok()).filter(|line: &Value| line["target"] == target).collect()
}

fn fields(line: &Value, names: [&str; 3]) -> [String; 3] {
    names.map(|name| match &line[name] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    })
}

const GATEWAY: &str = "oncegate_gateway::access";
const SIDECAR: &str = "oncegate_sidecar::access";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_at_the_gateway_has_one_line() -> Result<()> {
    // What hangs at the end is given up at once.
    let settings = [("GATEWAY_DRAIN", "0s"), ("GATEWAY_FAILURES_PER_MINUTE", "1")];
    let mut services = Services::start(&settings).await?;
    let (address, health) = (services.address, "/webhooks/payments/health");
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    services.send(&body, &[]).await?;
    services.send(&body, &[]).await?;
    let forged = stripe::sign("whsec_of_somebody_else", &body);
    send_signed(address, &forged, &body).await?;
    // Beyond the limit (W14): a stranger must not be able to fill the log.
    assert_eq!(send_signed(address, &forged, &body).await?.status, 429);
    services.send("x".repeat(300 * 1024).as_bytes(), &[]).await?;
    services.send(&body, &[("content-encoding", "gzip")]).await?;
    services.send(b"no JSON", &[]).await?;
    http_client::get(address, STRIPE).await?;
    http_client::get(address, "/of-a-stranger").await?;
    http_client::get(address, health).await?;
    http_client::send(address, Method::DELETE, health, &[], "").await?;

    // The provider hangs up while the application is at work.
    services.upstream.answer_next([Answer::hang()]);
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let head = format!(
        "POST {STRIPE} HTTP/1.1\r\nhost: {address}\r\n{}: {}\r\ncontent-length: {}\r\n\r\n",
        stripe::HEADER,
        stripe::sign(SECRET, &body),
        body.len()
    );
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(&[head.as_bytes(), &body].concat()).await?;
    services.upstream.wait_for(2).await;
    drop(stream);
    services.gateway.line_where("it is seen that nobody waits", |line| line.contains("\"hung_up\"")).await?;

    let ended = services.gateway.stop().await?;
    assert_eq!(ended.code, Some(0), "{ended}");
    let lines = lines(&ended.stderr, GATEWAY);
    let found: Vec<_> = lines.iter().map(|line| fields(line, ["route", "status", "answer"])).collect();
    let wanted = [
        [STRIPE, "200", "processed"],
        [STRIPE, "200", "already_processed"],
        [STRIPE, "401", "unauthorized"],
        [STRIPE, "413", "too_large"],
        [STRIPE, "415", "encoded"],
        [STRIPE, "400", "malformed_body"],
        [STRIPE, "405", "method_not_allowed"],
        ["-", "404", "not_found"],
        [health, "200", "ok"],
        [health, "405", "method_not_allowed"],
        [STRIPE, "-", "hung_up"],
    ];
    assert_eq!(found, wanted.map(|line| line.map(str::to_owned)));
    assert!(!ended.stderr.contains("of-a-stranger"), "a stranger's path is not logged");
    let hung_up = lines.last().context("a line")?;
    assert!(hung_up["event"].is_string() && hung_up["event_type"] == "charge.succeeded", "{hung_up}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w14_strangers_cannot_fill_the_log_and_the_lines_say_how_many_they_leave_out() -> Result<()> {
    let mut services = Services::start(&[("GATEWAY_DRAIN", "0s")]).await?;
    let answered = async || Ok::<_, anyhow::Error>(page(services.gateway_admin).await?);
    for number in 0..200 {
        http_client::get(services.address, &format!("/of-a-stranger-{number}")).await?;
    }
    let counted = sum(&answered().await?, "oncegate_gateway_answers_total", &["answer=\"not_found\""]);
    assert_eq!(counted, 200.0, "the metrics leave out none");
    eventually("a line says how many have none", async || {
        http_client::get(services.address, "/of-a-stranger").await.ok()?;
        services.gateway.output().contains("\"unreported\":").then_some(())
    })
    .await;
    let ended = services.gateway.stop().await?;
    let lines = lines(&ended.stderr, GATEWAY);
    let unreported: u64 = lines.iter().filter_map(|line| line["unreported"].as_u64()).sum();
    assert!(unreported > 0 && lines.len() < 200, "{unreported} left out, {} lines", lines.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_call_at_the_sidecar_has_one_line() -> Result<()> {
    let mut services = Services::start(&[]).await?;
    let channel = Channel::from_shared(format!("http://{}", services.sidecar_address))?.connect().await?;
    let mut client = IdempotencyServiceClient::new(channel.clone());
    let key = Some(v1::EventKey { provider: "stripe".into(), event_id: stripe::event_id(), ..Default::default() });
    let claim = v1::CheckAndLockRequest { key, event_type: "charge.succeeded".into(), ..Default::default() };
    client.check_and_lock(claim.clone()).await?;
    client.check_and_lock(v1::CheckAndLockRequest::default()).await.err().context("refused")?;
    let mut raw = Grpc::new(channel.clone());
    raw.ready().await?;
    let codec = tonic_prost::ProstCodec::<v1::StatsRequest, v1::StatsResponse>::default();
    let path = PathAndQuery::from_static("/oncegate.v1.IdempotencyService/OfAStranger");
    raw.unary(Request::new(v1::StatsRequest::default()), path, codec).await.err().context("refused")?;
    HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await?;

    // Waits for the outcome of the first attempt, until its caller goes away.
    let wait_duration = Some(prost_types::Duration { seconds: 20, nanos: 0 });
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.check_and_lock(v1::CheckAndLockRequest { wait_duration, ..claim }).await }
    });
    eventually("the call waits", async || {
        let page = page(services.sidecar_admin).await.ok()?;
        (sum(&page, "oncegate_calls_waiting", &[]) == 1.0).then_some(())
    })
    .await;
    waiting.abort();
    services.sidecar.line_where("it is seen that nobody waits", |line| line.contains("\"CANCELLED\"")).await?;

    let ended = services.sidecar.stop().await?;
    assert_eq!(ended.code, Some(0), "{ended}");
    let lines = lines(&ended.stderr, SIDECAR);
    let found: Vec<_> = lines.iter().map(|line| fields(line, ["method", "code", "outcome"])).collect();
    let wanted = [
        ["CheckAndLock", "OK", "acquired"],
        ["CheckAndLock", "INVALID_ARGUMENT", "rejected"],
        ["other", "UNIMPLEMENTED", "-"],
        ["other", "OK", "-"],
        ["CheckAndLock", "CANCELLED", "failed"],
    ];
    assert_eq!(found, wanted.map(|line| line.map(str::to_owned)));
    assert!(!ended.stderr.contains("OfAStranger"), "a stranger's path is not logged");
    Ok(())
}

// A service whose collector hangs goes on, and ends when it is told to.
#[tokio::test]
async fn a_log_that_nobody_reads_holds_up_neither_calls_nor_the_end() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("sidecar.sock");
    let url = format!("unix:{}", socket.display());
    let (mut log, unread) = std::io::pipe()?;
    let sidecar = Oncegate::new(directory.path(), ["sidecar"])?.env("SIDECAR_LISTEN", &url).log_to(unread);
    let mut sidecar = sidecar.start()?;
    eventually("it listens", async || socket.exists().then_some(())).await;
    // Each call has a line, and a pipe takes some two hundred of them. A load in which no call ended is a failure: on a busy machine
    // less than a second may see none.
    let mut calls = 0;
    while calls < 2_000 {
        let load = ["bench", "--json", "--url", &url, "--duration", "3s", "--warm-up", "0s", "--concurrency", "16"];
        let finished = Oncegate::new(directory.path(), load)?.run().await?;
        ensure!(finished.code == Some(0), "{finished}");
        let report: serde_json::Value = serde_json::from_str(&finished.stdout)?;
        assert_eq!(report["errors"], serde_json::json!({}));
        calls += report["operations"][0]["count"].as_u64().context("no count")?;
    }
    let finished = sidecar.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    // What there was room for is whole, and in order.
    let mut lines = String::new();
    log.read_to_string(&mut lines)?;
    let first = lines.lines().next().context("no lines")?;
    assert!(serde_json::from_str::<serde_json::Value>(first).is_ok(), "{first}");
    Ok(())
}
