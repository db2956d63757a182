//! The lines of requests in the log, and that strangers cannot fill it (W14).

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use oncegate_gateway::config::Options;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};
use tracing::{Dispatch, subscriber::DefaultGuard};

use crate::{
    application::Reply,
    client::{PATIENCE, deliver, event, request, send, webhook},
    harness::Harness,
    providers::{PAYPAL_BODY, PayPal},
    sidecar::Scripted,
};

/// Lines a second for what strangers ask.
const STRANGERS_LINES: u64 = 20;

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

/// Until it is dropped.
struct Logging {
    _beside: Dispatch,
    _guard: DefaultGuard,
}

impl Log {
    fn begin() -> (Self, Logging) {
        let log = Self::default();
        let writer = log.clone();
        // As long as there is one subscriber in the process, a line that another test's thread comes to first is taken by tracing to
        // be of no interest to anybody: that thread has none.
        let beside = Dispatch::new(tracing_subscriber::registry());
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        (log, Logging { _beside: beside, _guard: tracing::subscriber::set_default(subscriber) })
    }

    /// The lines of requests that were answered so.
    fn answered(&self, answer: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().filter(|line| line.contains("oncegate_gateway::access"));
        lines.filter(|line| line.contains(&format!("answer=\"{answer}\""))).map(str::to_owned).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut *self.0.lock().unwrap(), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// As many lines as strangers may have had by now.
fn permitted(begun: Instant) -> u64 {
    STRANGERS_LINES * (begun.elapsed().as_secs() + 2)
}

fn assert_few(lines: &[String], begun: Instant) {
    let (count, most) = (lines.len() as u64, permitted(begun));
    assert!((1..=most).contains(&count), "{count} lines, at most {most}: {lines:#?}");
}

#[tokio::test]
async fn w14_what_is_refused_before_it_is_verified_cannot_fill_the_log() {
    let (log, _logging) = Log::begin();
    let paypal = PayPal::new();
    let harness = Harness::with(|options| paypal.options(options)).await;
    let begun = Instant::now();
    for _ in 0..150 {
        let answer = harness.send(paypal.webhook("CERT-html", PAYPAL_BODY)).await;
        assert_eq!(answer.said(), (503, r#"{"status":"unavailable"}"#));
    }
    assert_few(&log.answered("unavailable"), begun);
    // One event holds the whole budget for bodies.
    let small = |options| Options { gateway_body_bytes_max: 4 << 10, gateway_body_budget: 4 << 10, ..options };
    let harness = Harness::with(small).await;
    let body = |id: &str| format!(r#"{{"id":"{id}","x":"{}"}}"#, "y".repeat(3 << 10));
    harness.application.reply(Reply::Held);
    let held = tokio::spawn(send(harness.address, webhook(&body("evt_1"))));
    harness.application.arrived(1).await;
    let begun = Instant::now();
    for _ in 0..150 {
        let answer = harness.send(webhook(&body("evt_2"))).await;
        assert_eq!(answer.said(), (503, r#"{"status":"overloaded"}"#));
    }
    assert_few(&log.answered("overloaded"), begun);
    harness.application.release();
    assert_eq!(held.await.unwrap().status, 200);
}

#[tokio::test]
async fn what_is_refused_after_it_was_verified_has_a_line_each() {
    const COUNT: usize = 100;
    let (log, _logging) = Log::begin();
    let harness = Harness::with(|options| Options { gateway_deliveries_max: 1, ..options }).await;
    harness.application.reply(Reply::Held);
    let held = tokio::spawn(deliver(harness.address, "evt_1"));
    harness.application.arrived(1).await;
    for _ in 0..COUNT {
        assert_eq!(harness.deliver("evt_2").await.said(), (503, r#"{"status":"overloaded"}"#));
    }
    assert_eq!(log.answered("overloaded").len(), COUNT);
    harness.application.release();
    assert_eq!(held.await.unwrap().status, 200);
}

#[tokio::test]
async fn w14_whoever_hangs_up_unverified_cannot_fill_the_log() {
    let (log, _logging) = Log::begin();
    let harness = Harness::with(|options| Options { gateway_health_cache: Duration::ZERO, ..options }).await;
    // The page waits for its statistics.
    harness.sidecar.stats(Scripted::Hang);
    let begun = Instant::now();
    let page = request("GET", "/webhooks/payments/health", &[], "");
    for _ in 0..150 {
        let mut stream = TcpStream::connect(harness.address).await.unwrap();
        stream.write_all(page.as_bytes()).await.unwrap();
        drop(stream);
    }
    // One that was verified has its line, however many others hung up.
    harness.application.reply(Reply::Held);
    let mut provider = TcpStream::connect(harness.address).await.unwrap();
    provider.write_all(webhook(&event("evt_1")).as_bytes()).await.unwrap();
    harness.application.arrived(1).await;
    drop(provider);
    let verified = || log.answered("hung_up").iter().filter(|line| line.contains("event=")).count();
    let logged = async {
        while verified() == 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, logged).await.expect("who was verified is missed in the log");
    harness.application.release();
    // At the end no connection is left that could still have a line.
    harness.shutdown.cancel();
    assert_eq!(harness.ended().await, Ok(()));
    assert_eq!(verified(), 1);
    assert_few(&log.answered("hung_up"), begun);
}
