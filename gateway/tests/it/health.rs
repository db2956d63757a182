//! The health page.

use std::time::Duration;

use oncegate_api::v1::{Counts, State, StateCount, StatsResponse};
use oncegate_gateway::config::Options;
use tokio::io::AsyncWriteExt as _;

use crate::{
    client::request,
    harness::Harness,
    sidecar::{Call, Scripted, unavailable},
};

const PATH: &str = "/webhooks/payments/health";

fn stats() -> StatsResponse {
    let states =
        [(State::Completed, 5), (State::Failed, 1), (State::Unknown, 2), (State::Dead, 3), (State::Processing, 4)];
    let states = states.map(|(state, count)| StateCount { state: state.into(), count }).to_vec();
    StatsResponse { total: Some(Counts { total: 15, states, ..Counts::default() }), ..StatsResponse::default() }
}

fn asked(harness: &Harness) -> usize {
    harness.sidecar.calls().iter().filter(|call| matches!(call, Call::Stats(_))).count()
}

#[tokio::test]
async fn g1_status_timestamp_and_statistics() {
    let harness = Harness::start().await;
    for method in ["GET", "POST"] {
        harness.sidecar.stats(Scripted::Answer(stats()));
        let answer = harness.send(request(method, PATH, &[], "")).await;
        assert_eq!(answer.status, 200);
        let page: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(page["status"], "ok");
        let statistics = serde_json::json!({"total": 15, "completed": 5, "failed": 6, "processing": 4});
        assert_eq!(page["statistics"], statistics);
        let timestamp = page["timestamp"].as_str().unwrap();
        assert!(timestamp.ends_with('Z') && timestamp.len() == 20, "{timestamp}");
    }
    let refused = harness.send(request("DELETE", PATH, &[], "")).await;
    assert_eq!((refused.status, refused.header("allow")), (405, Some("GET, HEAD, POST")));
    assert!(harness.send(request("HEAD", PATH, &[], "")).await.body.is_empty());
}

#[tokio::test]
async fn the_page_asks_for_no_percentiles_which_it_does_not_show() {
    let harness = Harness::start().await;
    harness.sidecar.stats(Scripted::Answer(stats()));
    harness.send(request("GET", PATH, &[], "")).await;
    let calls = harness.sidecar.calls();
    assert!(calls.iter().any(|call| matches!(call, Call::Stats(asked) if asked.without_percentiles)), "{calls:?}");
}

#[tokio::test]
async fn many_readers_cause_one_call() {
    let harness = Harness::start().await;
    harness.sidecar.stats(Scripted::Answer(stats()));
    let readers: Vec<_> =
        (0..20).map(|_| tokio::spawn(crate::client::send(harness.address, request("GET", PATH, &[], "")))).collect();
    for reader in readers {
        assert_eq!(reader.await.unwrap().status, 200);
    }
    assert_eq!(asked(&harness), 1);
}

#[tokio::test]
async fn readers_that_hang_up_cause_no_more_calls_than_those_who_wait() {
    let harness = Harness::start().await;
    harness.sidecar.stats(Scripted::Late(Duration::from_millis(500), stats()));
    for number in 0..20 {
        let mut stream = tokio::net::TcpStream::connect(harness.address).await.unwrap();
        stream.write_all(request("GET", PATH, &[], "").as_bytes()).await.unwrap();
        if number == 0 {
            harness.sidecar.until(|calls| calls.iter().any(|call| matches!(call, Call::Stats(_)))).await;
        }
        // The reader hangs up.
        drop(stream);
    }
    let answer = harness.send(request("GET", PATH, &[], "")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(asked(&harness), 1);
}

#[tokio::test]
async fn without_a_sidecar_the_page_says_so() {
    let harness = Harness::with(|options| Options { gateway_health_cache: Duration::ZERO, ..options }).await;
    harness.sidecar.stats(unavailable(Duration::from_secs(1)));
    let answer = harness.send(request("GET", PATH, &[], "")).await;
    assert_eq!(answer.status, 503);
    let page: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!((&page["status"], &page["statistics"]), (&"unavailable".into(), &serde_json::Value::Null));
}
