//! How a gateway stops, and how it reaches a sidecar in another process.

use std::time::Duration;

use oncegate_api::v1::{CheckAndLockResponse, FailureKind, idempotency_service_server::IdempotencyServiceServer};
use oncegate_gateway::{
    Gateway, RunError, StartError,
    config::Options,
    sidecar::{Connection, channel},
};
use oncegate_runtime::{
    server::{self, TowerToHyperService, serve},
    shutdown::CancellationToken,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{
    application::{Application, Reply},
    client::{PATIENCE, deliver},
    harness::{Harness, options},
    sidecar::{Call, Scripted, Sidecar, unknown},
};

#[tokio::test]
async fn g9_deliveries_under_way_finish_and_are_marked() {
    let harness = Harness::start().await;
    harness.application.reply(Reply::Held);
    let address = harness.address;
    let provider = tokio::spawn(deliver(address, "evt_1"));
    harness.application.arrived(1).await;
    harness.shutdown.cancel();
    timeout(PATIENCE, async { while TcpStream::connect(address).await.is_ok() {} })
        .await
        .expect("new connections are refused at once");
    harness.application.release();
    assert_eq!(provider.await.unwrap().status, 200);
    let sidecar = harness.sidecar.clone();
    assert_eq!(harness.ended().await, Ok(()));
    assert!(matches!(&sidecar.calls()[..], [Call::Claim(..), Call::Completed(_)]));
}

fn with_short_drain(options: Options) -> Options {
    Options {
        gateway_drain: Some(Duration::from_millis(100)),
        sidecar_timeout: Duration::from_millis(500),
        sidecar_connect_timeout: Duration::from_millis(100),
        ..options
    }
}

#[tokio::test]
async fn g9_what_outlasts_the_drain_is_marked_as_timed_out() {
    let harness = Harness::with(with_short_drain).await;
    harness.application.reply(Reply::Never);
    let address = harness.address;
    let pending = tokio::spawn(deliver(address, "evt_1"));
    harness.application.arrived(1).await;
    harness.shutdown.cancel();
    let sidecar = harness.sidecar.clone();
    assert_eq!(harness.ended().await, Ok(()));
    pending.abort();
    let mark = sidecar.failures().remove(0);
    assert_eq!(mark.kind(), FailureKind::Retryable);
    // The application may still be at work.
    assert!((290..300).contains(&mark.retry_after.unwrap().seconds));
}

#[tokio::test]
async fn what_cannot_be_marked_before_the_end_is_reported() {
    let harness = Harness::with(with_short_drain).await;
    for _ in 0..20 {
        harness.sidecar.mark(Scripted::Hang);
    }
    let address = harness.address;
    let pending = tokio::spawn(deliver(address, "evt_1"));
    harness.sidecar.until(|calls| calls.len() == 2).await;
    harness.shutdown.cancel();
    assert_eq!(harness.ended().await, Err(RunError::Unfinished { deliveries: 1 }));
    pending.abort();
}

/// A claim whose first call stays without an answer until the drain has ended: it is asked again, without a wait, and a lock
/// that this finds is marked as one under which nothing was sent.
async fn no_lock_is_left_behind(harness: Harness, first_call: Scripted<CheckAndLockResponse>) {
    harness.sidecar.claim(first_call);
    let pending = tokio::spawn(deliver(harness.address, "evt_1"));
    harness.sidecar.until(|calls| calls.len() == 1).await;
    harness.shutdown.cancel();
    let (sidecar, application) = (harness.sidecar.clone(), harness.application.clone());
    assert_eq!(harness.ended().await, Ok(()));
    pending.abort();
    let calls = sidecar.calls();
    let [Call::Claim(first, _), Call::Claim(second, _), Call::Failed(mark)] = &calls[..] else { panic!("{calls:?}") };
    assert_eq!((&second.claim_id, second.wait_duration), (&first.claim_id, None));
    assert_eq!((mark.kind(), mark.retry_after), (FailureKind::Retryable, None), "nothing was sent");
    assert!(application.deliveries().is_empty());
}

#[tokio::test]
async fn g9_a_claim_that_waits_past_the_drain_is_asked_again_and_leaves_no_lock_behind() {
    // Like a claim that waits for another attempt's outcome, and may be granted at that very moment.
    no_lock_is_left_behind(Harness::with(with_short_drain).await, Scripted::Hang).await;
}

#[tokio::test]
async fn g9_a_claim_that_pauses_at_the_end_of_the_drain_is_asked_again_and_leaves_no_lock_behind() {
    // Far shorter than the pause before the second try; as when the lock was granted and the answer lost.
    let shortest = |given| Options { gateway_drain: Some(Duration::from_millis(5)), ..with_short_drain(given) };
    no_lock_is_left_behind(Harness::with(shortest).await, unknown()).await;
}

#[tokio::test]
async fn an_idle_gateway_ends_at_once() {
    let harness = Harness::start().await;
    let _silent = TcpStream::connect(harness.address).await.unwrap();
    harness.shutdown.cancel();
    assert_eq!(harness.ended().await, Ok(()));
}

#[tokio::test]
async fn an_address_in_use_is_a_start_error() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let options = Options { gateway_listen: address, ..options("http://127.0.0.1:1/") };
    let service = Connection::over(IdempotencyServiceServer::new(Sidecar::default()));
    let started = Gateway::bind(options.validate().unwrap(), service).await;
    assert!(matches!(started.err(), Some(StartError::Listen { address: given, .. }) if given == address));
}

// T45
#[tokio::test]
async fn a_sidecar_that_goes_away_means_503_and_comes_back_without_a_restart() {
    let application = Application::start().await;
    let sidecar = Sidecar::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sidecar_address = listener.local_addr().unwrap();
    let service = || TowerToHyperService::new(IdempotencyServiceServer::new(sidecar.clone()));
    let start = |listener| {
        let stop = CancellationToken::new();
        let options = server::Options::http2(Duration::from_secs(1));
        (stop.clone(), tokio::spawn(serve(listener, service(), options, stop)))
    };
    let (stop, served) = start(listener);

    let options = Options { sidecar_url: format!("http://{sidecar_address}"), ..options(&application.url()) };
    let settings = options.validate().unwrap();
    let channel = channel(&settings);
    let gateway = Gateway::bind(settings, channel).await.unwrap();
    let address = gateway.local_addr();
    let shutdown = CancellationToken::new();
    let run = tokio::spawn(gateway.run(shutdown.clone()));

    assert_eq!(deliver(address, "evt_1").await.status, 200);
    stop.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap();
    let refused = deliver(address, "evt_2").await;
    assert_eq!(refused.said(), (503, r#"{"status":"unavailable"}"#));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(application.deliveries().len(), 1, "nothing is delivered without a lock");

    let listener = TcpListener::bind(sidecar_address).await.unwrap();
    let (stop, _served) = start(listener);
    timeout(PATIENCE, async { while deliver(address, "evt_2").await.status != 200 {} }).await.unwrap();
    assert_eq!(application.deliveries().len(), 2);
    shutdown.cancel();
    assert_eq!(timeout(PATIENCE, run).await.unwrap().unwrap(), Ok(()));
    stop.cancel();
}
