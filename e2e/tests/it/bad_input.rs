//! What is no webhook gets the documented answer, and leaves nothing behind.

use std::net::SocketAddr;

use anyhow::Result;
use http::Method;
use oncegate_e2e::{http_client, stripe};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::setup::{Everything, Ledger, SECRET, STRIPE, on_each_ledger, word};

on_each_ledger!(bad_input_gets_the_documented_answer_and_no_row);

/// One more than the largest body.
const TOO_LARGE: usize = 256 * 1024 + 1;

async fn bad_input_gets_the_documented_answer_and_no_row(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let gateway = everything.gateway;
    let good = stripe::event(&stripe::event_id(), "payment_intent.succeeded");

    for (method, path, status) in [
        (Method::GET, STRIPE, 405),
        (Method::PUT, STRIPE, 405),
        (Method::POST, "/webhooks/payments/paypal", 404),
        (Method::POST, "/webhooks/payments/stripe/", 404),
        (Method::POST, "/", 404),
        (Method::DELETE, "/webhooks/payments/health", 405),
    ] {
        let signature = stripe::sign(SECRET, &good);
        let headers = [(stripe::HEADER, signature.as_str())];
        let answer = http_client::send(gateway, method.clone(), path, &headers, good.clone()).await?;
        assert_eq!(answer.status, status, "{method} {path}");
    }

    for encoding in ["gzip", "br", "identity, gzip"] {
        let signature = stripe::sign(SECRET, &good);
        let headers = [(stripe::HEADER, signature.as_str()), ("content-encoding", encoding)];
        assert_eq!(http_client::post(gateway, STRIPE, &headers, good.clone()).await?.status, 415, "{encoding}");
    }

    // Signed, and still nothing that names an event once.
    for body in [
        &b"no JSON"[..],
        b"",
        b"[]",
        b"\"evt_1\"",
        b"{\"id\":\"evt_1\",\"id\":\"evt_2\"}",
        b"{\"id\":\"evt_1\"} trailing",
        b"{\"id\":\"\xff\"}",
    ] {
        let answer = everything.send(body).await?;
        assert_eq!(answer.status, 400, "{}", String::from_utf8_lossy(body));
        assert!(answer.body.len() < 100, "nothing is reflected");
    }

    assert_eq!(everything.send(&vec![b' '; TOO_LARGE]).await?.status, 413);
    assert_eq!(chunked(gateway, TOO_LARGE).await?, 413);

    assert_eq!(everything.events().await?, 0, "no row");
    assert!(everything.upstream.requests().is_empty());
    assert_eq!(word(&everything.send(&good).await?), "200 processed", "and no effect on others");
    Ok(())
}

/// The status of the answer to a body whose length is not said beforehand.
async fn chunked(gateway: SocketAddr, length: usize) -> Result<u16> {
    let mut stream = TcpStream::connect(gateway).await?;
    let head = format!(
        "POST {STRIPE} HTTP/1.1\r\nhost: gateway\r\nstripe-signature: t=1,v1=00\r\ntransfer-encoding: chunked\r\n\r\n{length:x}\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    // The gateway may answer and close before it has all.
    let _ = stream.write_all(&vec![b' '; length]).await;
    let _ = stream.write_all(b"\r\n0\r\n\r\n").await;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).trim_start_matches("HTTP/1.1 ").parse()?)
}
