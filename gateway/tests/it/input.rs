//! What is refused before it has any effect, and what is admitted.

use std::{io::Write as _, time::Duration};

use oncegate_gateway::config::Options;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    application::Reply,
    client::{PATIENCE, SECRET, STRIPE, event, request, signature, webhook},
    harness::Harness,
    sidecar::Call,
};

#[tokio::test]
async fn a_signed_event_is_locked_delivered_marked_and_answered() {
    let harness = Harness::start().await;
    let body = event("evt_1");
    let answer = harness.send(webhook(&body)).await;
    assert_eq!(answer.said(), (200, r#"{"status":"processed"}"#));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));

    let calls = harness.sidecar.calls();
    let [Call::Claim(claim, deadline), Call::Completed(mark)] = &calls[..] else { panic!("{calls:?}") };
    let key = claim.key.clone().unwrap();
    assert_eq!((&*key.tenant, &*key.provider, &*key.event_id), ("default", "stripe", "evt_1"));
    assert_eq!(claim.event_type, "charge.succeeded");
    assert_eq!(claim.lock_duration.unwrap().seconds, 300);
    assert_eq!(claim.wait_duration.unwrap().seconds, 10);
    // G4: the digest always, a fingerprint never.
    assert_eq!(claim.payload_digest, Sha256::digest(&body).to_vec());
    assert!(claim.fingerprint.is_empty());
    assert_eq!(claim.claim_id.len(), 36);
    // The deadline that goes along is the call's own and the wait.
    assert_eq!(deadline.as_deref(), Some("12500000u"));
    assert_eq!((mark.fencing_token, &mark.claim_id), (1, &claim.claim_id));
    assert_eq!(mark.result.clone().unwrap().code, 200);

    let deliveries = harness.application.deliveries();
    assert_eq!(deliveries.len(), 1);
    assert_eq!(deliveries[0].body, body);
    let headers = &deliveries[0].headers;
    assert_eq!(headers["idempotency-key"], "default/stripe/evt_1");
    assert_eq!(headers["oncegate-fencing-token"], "1");
    assert_eq!(headers["oncegate-attempt"], "1");
    assert_eq!(headers["content-type"], "application/json");
    assert!(headers.contains_key("stripe-signature"));
    let remaining: u64 = headers["oncegate-lock-remaining-ms"].to_str().unwrap().parse().unwrap();
    assert!((290_000..=300_000).contains(&remaining), "{remaining}");
    assert_eq!(harness.metric("oncegate_gateway_answers_total{answer=\"processed\"}"), 1);
}

// T36
#[tokio::test]
async fn bad_requests_get_their_answer_and_reach_nobody() {
    let harness = Harness::start().await;
    let body = event("evt_1");
    let signed = signature(SECRET, &body);
    let signed = ("stripe-signature", signed.as_str());
    let large = "x".repeat(256 * 1024 + 1);
    let chunked = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    let small_chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let both = [signed, ("content-length", "3"), ("transfer-encoding", "chunked")];
    let cases = [
        ("no such path", request("POST", "/webhooks/payments/other", &[signed], &body), 404, "not_found"),
        ("a longer path", request("POST", &format!("{STRIPE}/"), &[signed], &body), 404, "not_found"),
        ("another case", request("POST", "/Webhooks/payments/stripe", &[signed], &body), 404, "not_found"),
        ("a provider without a secret", request("POST", "/webhooks/payments/paypal", &[], &body), 404, "not_found"),
        ("another method", request("GET", STRIPE, &[], ""), 405, "method_not_allowed"),
        ("a made-up method", request("BREW", STRIPE, &[signed], &body), 405, "method_not_allowed"),
        ("a large body", request("POST", STRIPE, &[signed], &large), 413, "too_large"),
        (
            "large chunks",
            request("POST", STRIPE, &[signed, ("transfer-encoding", "chunked")], &chunked),
            413,
            "too_large",
        ),
        ("gzip", request("POST", STRIPE, &[signed, ("content-encoding", "gzip")], &body), 415, "encoded"),
        (
            "a coding below the chunks",
            request("POST", STRIPE, &[signed, ("transfer-encoding", "gzip, chunked")], &small_chunks),
            415,
            "encoded",
        ),
        (
            "a coding on a line of its own",
            request(
                "POST",
                STRIPE,
                &[signed, ("transfer-encoding", "GZip"), ("transfer-encoding", "chunked")],
                &small_chunks,
            ),
            415,
            "encoded",
        ),
        (
            "chunks within chunks",
            request("POST", STRIPE, &[signed, ("transfer-encoding", "chunked, chunked")], &small_chunks),
            415,
            "encoded",
        ),
        ("two lengths", request("POST", STRIPE, &both, &small_chunks), 400, "malformed_request"),
        ("no signature", request("POST", STRIPE, &[], &body), 401, "unauthorized"),
        ("a broken header", request("POST", STRIPE, &[("stripe-signature", "v1=00")], &body), 401, "unauthorized"),
        ("two headers", request("POST", STRIPE, &[signed, signed], &body), 401, "unauthorized"),
        ("another body", request("POST", STRIPE, &[signed], &event("evt_2")), 401, "unauthorized"),
        (
            "another secret",
            request("POST", STRIPE, &[("stripe-signature", &signature("whsec_x", &body))], &body),
            401,
            "unauthorized",
        ),
        ("an empty body", webhook(""), 400, "malformed_body"),
        ("no JSON", webhook("id=evt_1"), 400, "malformed_body"),
        ("a JSON array", webhook(r#"[{"id":"evt_1"}]"#), 400, "malformed_body"),
        ("two ids", webhook(r#"{"id":"evt_1","id":"evt_2"}"#), 400, "malformed_body"),
        ("a byte order mark", webhook("\u{feff}{\"id\":\"evt_1\"}"), 400, "malformed_body"),
        ("something after it", webhook(r#"{"id":"evt_1"};"#), 400, "malformed_body"),
        ("deep nesting", webhook(&format!("{{\"x\":{}{}}}", "[".repeat(200), "]".repeat(200))), 400, "malformed_body"),
    ];
    for (name, bytes, status, word) in cases {
        let answer = harness.send(bytes).await;
        assert_eq!(answer.said(), (status, &*format!(r#"{{"status":"{word}"}}"#)), "{name}");
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{name}");
        let challenge = (status == 401).then_some("Webhook-Signature");
        assert_eq!(answer.header("www-authenticate"), challenge, "{name}");
        if status == 405 {
            assert_eq!(answer.header("allow"), Some("POST"), "{name}");
        }
    }
    assert!(harness.sidecar.calls().is_empty(), "{:?}", harness.sidecar.calls());
    assert!(harness.application.deliveries().is_empty());
    assert_eq!(harness.metric("oncegate_gateway_refusals_total{verdict=\"bad_signature\"}"), 2);
}

#[tokio::test]
async fn good_requests_in_unusual_clothes_are_admitted() {
    let harness = Harness::start().await;
    let body = event("evt_1");
    let signed = signature(SECRET, &body);
    let signed = ("stripe-signature", signed.as_str());
    let chunks = format!("5\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n", &body[..5], body.len() - 5, &body[5..]);
    for (name, bytes) in [
        ("chunks", request("POST", STRIPE, &[signed, ("transfer-encoding", "chunked")], &chunks)),
        ("chunks in capitals", request("POST", STRIPE, &[signed, ("transfer-encoding", "Chunked")], &chunks)),
        ("a query", request("POST", &format!("{STRIPE}?a=b"), &[signed], &body)),
        ("identity", request("POST", STRIPE, &[signed, ("content-encoding", "identity")], &body)),
        ("another content type", request("POST", STRIPE, &[signed, ("content-type", "text/plain")], &body)),
        ("a header in capitals", request("POST", STRIPE, &[("STRIPE-SIGNATURE", signed.1)], &body)),
    ] {
        assert_eq!(harness.send(bytes).await.status, 200, "{name}");
    }
    for delivery in harness.application.deliveries() {
        assert_eq!(delivery.body, body, "G3: the same bytes go on");
    }
}

// T36
#[tokio::test]
async fn the_largest_body_is_admitted() {
    let harness = Harness::start().await;
    let frame = r#"{"id":"evt_1","x":""}"#;
    let body = frame.replace("\"\"}", &format!("\"{}\"}}", "y".repeat(256 * 1024 - frame.len())));
    assert_eq!(body.len(), 256 * 1024);
    assert_eq!(harness.send(webhook(&body)).await.status, 200);
    assert_eq!(harness.application.deliveries()[0].body, body);
}

#[tokio::test]
async fn unknown_types_and_unusable_ids_have_a_name_of_their_own() {
    let harness = Harness::start().await;
    let body = r#"{"object":"event"}"#;
    assert_eq!(harness.send(webhook(body)).await.status, 200);
    let claim = harness.sidecar.claims().remove(0);
    assert_eq!(claim.event_type, "unknown");
    assert_eq!(claim.key.unwrap().event_id, format!("sha256:{}", hex::encode(Sha256::digest(body))));
}

#[tokio::test]
async fn a_connection_is_kept_after_a_refusal_that_leaves_nothing_unread() {
    let harness = Harness::start().await;
    let body = event("evt_1");
    let keep = |text: String| text.replace("connection: close\r\n", "");
    let mut stream = TcpStream::connect(harness.address).await.unwrap();
    let unsigned = keep(request("POST", STRIPE, &[], &body));
    // Three on one connection, and the last one asks to close it.
    stream.write_all(unsigned.as_bytes()).await.unwrap();
    read_answer(&mut stream, "401").await;
    stream.write_all(keep(webhook(&body)).as_bytes()).await.unwrap();
    read_answer(&mut stream, "200").await;
    stream.write_all(webhook(&body).as_bytes()).await.unwrap();
    read_answer(&mut stream, "200").await;
}

#[tokio::test]
async fn a_connection_stays_in_step_after_a_transfer_coding_that_is_refused() {
    let harness = Harness::start().await;
    let body = event("evt_1");
    let signed = signature(SECRET, &body);
    let chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let coded =
        request("POST", STRIPE, &[("stripe-signature", &signed), ("transfer-encoding", "gzip, chunked")], &chunks);
    // Both in one piece: the second one is found where the first one's chunks end.
    let both = coded.replace("connection: close\r\n", "") + &webhook(&body);
    let mut stream = TcpStream::connect(harness.address).await.unwrap();
    stream.write_all(both.as_bytes()).await.unwrap();
    let mut answers = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answers)).await.unwrap().unwrap();
    let statuses: Vec<&str> = answers.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(statuses, ["415", "200"], "{answers}");
    assert_eq!(harness.application.deliveries().len(), 1);

    // Where the chunks are not on the outside nobody can tell where the body ends: the connection is closed.
    let unending =
        request("POST", STRIPE, &[("stripe-signature", &signed), ("transfer-encoding", "chunked, gzip")], &body);
    let answer = harness.send(unending.replace("connection: close\r\n", "") + &webhook(&body)).await;
    assert_eq!(answer.status, 400);
    assert_eq!(harness.application.deliveries().len(), 1);
}

async fn read_answer(stream: &mut TcpStream, status: &str) {
    let mut answer = Vec::new();
    timeout(PATIENCE, async {
        while !answer.ends_with(b"\"}") {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "closed early");
        }
    })
    .await
    .unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
}

// T35
#[tokio::test]
async fn slow_bodies_are_given_up() {
    let harness = Harness::with(|options| Options {
        gateway_body_first_byte_timeout: Duration::from_millis(100),
        gateway_body_timeout: Duration::from_millis(300),
        ..options
    })
    .await;
    let body = event("evt_1");
    let whole = webhook(&body);
    for sent in [whole.len() - body.len(), whole.len() - 1] {
        let answer = harness.send(&whole[..sent]).await;
        assert_eq!(answer.said(), (408, r#"{"status":"too_slow"}"#));
    }
    assert!(harness.sidecar.calls().is_empty());
}

#[tokio::test]
async fn a_used_up_byte_budget_refuses_before_the_lock_and_recovers() {
    let harness =
        Harness::with(|options| Options { gateway_body_bytes_max: 4 * 1024, gateway_body_budget: 4 * 1024, ..options })
            .await;
    let body = |id: &str| format!(r#"{{"id":"{id}","x":"{}"}}"#, "y".repeat(3 * 1024));
    harness.application.reply(Reply::Held);
    let address = harness.address;
    let held = webhook(&body("evt_1"));
    let held = tokio::spawn(async move { crate::client::send(address, held).await });
    harness.application.arrived(1).await;
    let refused = harness.send(webhook(&body("evt_2"))).await;
    assert_eq!(refused.said(), (503, r#"{"status":"overloaded"}"#));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(harness.sidecar.claims().len(), 1);
    harness.application.release();
    assert_eq!(held.await.unwrap().status, 200);
    assert_eq!(harness.send(webhook(&body("evt_2"))).await.status, 200);
}

/// A gateway behind our own proxy, with room for eight of the largest bodies: a source's quarter is two.
async fn with_room_for_eight_bodies() -> Harness {
    Harness::with(|options| Options {
        gateway_trusted_hops: 1,
        gateway_body_bytes_max: BODY_BYTES as u64,
        gateway_body_budget: 8 * BODY_BYTES as u64,
        // Nothing here ends by itself.
        gateway_body_timeout: 3 * PATIENCE,
        ..options
    })
    .await
}

const BODY_BYTES: usize = 8 * 1024;

/// A webhook as that proxy passes it on.
fn from(source: &str, body: &str) -> String {
    let signed = signature(SECRET, body);
    request("POST", STRIPE, &[("stripe-signature", &signed), ("x-forwarded-for", source)], body)
}

async fn until(holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, waiting).await.expect("in time");
}

#[tokio::test]
async fn w15_a_source_that_never_ends_its_bodies_keeps_nobody_else_out() {
    let harness = with_room_for_eight_bodies().await;
    let held = || 64 - harness.metric("oncegate_gateway_body_budget_left_bytes") / 1_024;
    let refused = || harness.metric("oncegate_gateway_answers_total{answer=\"overloaded\"}");
    // Well formed, as far as anybody can tell without its last byte.
    let stalled = from("192.0.2.1", &"y".repeat(BODY_BYTES));
    let mut stalling = Vec::new();
    for number in 1..=8 {
        let mut stream = TcpStream::connect(harness.address).await.unwrap();
        stream.write_all(&stalled.as_bytes()[..stalled.len() - 1]).await.unwrap();
        stalling.push(stream);
        // Each of them is either held or refused.
        until(|| held() / 8 + refused() == number).await;
    }
    let deliver = async |source, id| harness.send(from(source, &event(id))).await;
    assert_eq!(deliver("198.51.100.1", "evt_1").await.said(), (200, r#"{"status":"processed"}"#));
    assert_eq!((held(), refused()), (16, 6));
    // Only that source is sent away.
    let told = deliver("192.0.2.1", "evt_2").await;
    assert_eq!(told.said(), (503, r#"{"status":"overloaded"}"#));
    assert_eq!(told.header("retry-after"), Some("1"));
    // The proxy itself does not count as a source.
    assert_eq!(harness.send(webhook(&event("evt_3"))).await.status, 200);
    drop(stalling);
    until(|| held() == 0).await;
    assert_eq!(deliver("192.0.2.1", "evt_2").await.status, 200);
}

#[tokio::test]
async fn w15_what_is_verified_is_of_no_sources_share() {
    let harness = with_room_for_eight_bodies().await;
    // All of a provider's webhooks may come from one address, and the application may take its time.
    let mut held = Vec::new();
    for number in 1..=6 {
        harness.application.reply(Reply::Held);
        let body = format!(r#"{{"id":"evt_{number}","x":"{}"}}"#, "y".repeat(BODY_BYTES - 1_024));
        let (address, webhook) = (harness.address, from("192.0.2.1", &body));
        held.push(tokio::spawn(async move { crate::client::send(address, webhook).await }));
        harness.application.arrived(number).await;
    }
    for held in held {
        harness.application.release();
        assert_eq!(held.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn too_many_deliveries_are_refused_before_the_lock() {
    let harness = Harness::with(|options| Options { gateway_deliveries_max: 1, ..options }).await;
    harness.application.reply(Reply::Held);
    let address = harness.address;
    let held = tokio::spawn(crate::client::deliver(address, "evt_1"));
    harness.application.arrived(1).await;
    let refused = harness.deliver("evt_2").await;
    assert_eq!(refused.said(), (503, r#"{"status":"overloaded"}"#));
    assert_eq!(harness.sidecar.claims().len(), 1);
    harness.application.release();
    assert_eq!(held.await.unwrap().status, 200);
    assert_eq!(harness.deliver("evt_2").await.status, 200);
}

// T39
#[tokio::test]
async fn g3_secrets_are_read_again_when_their_file_changes() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"whsec_old\n").unwrap();
    let path = file.path().to_owned();
    let harness = Harness::with(|options| Options {
        stripe_webhook_secret: None,
        stripe_webhook_secret_file: Some(path.clone()),
        gateway_secret_reload: Duration::from_millis(20),
        ..options
    })
    .await;
    let body = event("evt_1");
    let signed = |secret: &str| request("POST", STRIPE, &[("stripe-signature", &signature(secret, &body))], &body);
    assert_eq!(harness.send(signed("whsec_old")).await.status, 200);
    assert_eq!(harness.send(signed("whsec_new")).await.status, 401);
    // Swapped like Kubernetes does it: another file takes the name.
    let replace = |text: &str| {
        let mut next = tempfile::NamedTempFile::new_in(path.parent().unwrap()).unwrap();
        next.write_all(text.as_bytes()).unwrap();
        next.persist(&path).unwrap();
    };
    replace("whsec_new,whsec_newer\n");
    timeout(PATIENCE, async { while harness.send(signed("whsec_new")).await.status != 200 {} }).await.unwrap();
    assert_eq!(harness.send(signed("whsec_newer")).await.status, 200);
    assert_eq!(harness.send(signed("whsec_old")).await.status, 401);
    // A bad file changes nothing and raises an alarm (W5).
    let failed = "oncegate_gateway_secret_reloads_total{result=\"failed\"}";
    assert_eq!(harness.metric(failed), 0);
    replace(" \n");
    timeout(PATIENCE, async {
        while harness.metric(failed) == 0 {
            assert_eq!(harness.send(signed("whsec_new")).await.status, 200);
        }
    })
    .await
    .unwrap();
    assert_eq!(harness.send(signed("whsec_new")).await.status, 200);
    replace("whsec_newer");
    timeout(PATIENCE, async { while harness.send(signed("whsec_new")).await.status != 401 {} }).await.unwrap();
    assert_eq!(harness.send(signed("whsec_newer")).await.status, 200);
}

#[tokio::test]
async fn w14_failures_beyond_the_limit_get_429_and_a_valid_signature_never_does() {
    let harness = Harness::with(|options| Options { gateway_failures_per_minute: 3, ..options }).await;
    let forged = || {
        let body = event("evt_forged");
        request("POST", STRIPE, &[("stripe-signature", &signature("whsec_other", &body))], &body)
    };
    for _ in 0..3 {
        assert_eq!(harness.send(forged()).await.status, 401);
    }
    let limited = harness.send(forged()).await;
    assert_eq!(limited.said(), (429, r#"{"status":"too_many_failures"}"#));
    assert_eq!(limited.header("connection"), Some("close"));
    assert!((1..=20).contains(&limited.header("retry-after").unwrap().parse::<u64>().unwrap()));
    // Refused before its body, for which nobody waits.
    let headless = request("POST", STRIPE, &[("content-length", "100000")], "");
    assert_eq!(harness.send(headless).await.status, 429);
    // From the same address, and in the middle of it.
    for number in 0..5 {
        assert_eq!(harness.deliver(&format!("evt_{number}")).await.status, 200);
        assert_eq!(harness.send(forged()).await.status, 429);
    }
    assert_eq!(harness.metric("oncegate_gateway_answers_total{answer=\"too_many_failures\"}"), 7);
    assert_eq!(harness.application.deliveries().len(), 5);
}
