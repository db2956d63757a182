//! The gateway's listener and the admin one.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use oncegate_e2e::{
    http_client, stripe,
    wire::{say, status_of, until_closed},
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet};

use super::{meanwhile, unread, until_it_stalls};
use crate::setup::{Everything, Ledger, SECRET, STRIPE, on_each_ledger};

/// Connections of the test of slow peers, from the environment (`ONCEGATE_SLOW_PEERS`).
fn slow_peers() -> usize {
    std::env::var("ONCEGATE_SLOW_PEERS").ok().and_then(|peers| peers.parse().ok()).unwrap_or(2_000)
}

/// By when the slowest of them is closed: its deadline of three seconds, the half second after which a peer looks again, and what
/// two thousand peers and their machine take.
const LATEST: Duration = Duration::from_secs(10);

/// Deadlines short enough for a test, long enough for honest requests on a busy machine.
fn deadlines(command: oncegate_e2e::program::Oncegate) -> oncegate_e2e::program::Oncegate {
    command
        .env("GATEWAY_FIRST_BYTE_TIMEOUT", "2s")
        .env("GATEWAY_HEADER_TIMEOUT", "3s")
        .env("GATEWAY_BODY_FIRST_BYTE_TIMEOUT", "2s")
        .env("GATEWAY_BODY_TIMEOUT", "3s")
}

fn head(length: &str) -> String {
    // Signed in form: the body is waited for before the signature is looked at.
    format!("POST {STRIPE} HTTP/1.1\r\nhost: gateway\r\nstripe-signature: t=1,v1={}\r\n{length}\r\n", "0".repeat(64))
}

/// T35
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_slow_peers_are_closed_by_their_deadlines_and_others_are_served() -> Result<()> {
    let everything = Everything::start_as(Ledger::Sqlite, deadlines).await?;
    let gateway = everything.gateway;
    let hostile = async {
        let mut peers = JoinSet::new();
        for number in 0..slow_peers() {
            // What overflows the queue of the listener is known to nobody but the peer.
            if number % 100 == 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            peers.spawn(async move {
                let mut stream = TcpStream::connect(gateway).await?;
                let began = Instant::now();
                let (said, then): (String, &[u8]) = match number % 4 {
                    // Connects and is silent.
                    0 => (String::new(), b""),
                    // A head, a byte at a time.
                    1 => ("POST / HTTP/1.1\r\nhost: ".to_owned(), b"x"),
                    // A body that never begins.
                    2 => (head("content-length: 1000\r\n"), b""),
                    // A body, a byte at a time.
                    _ => (head("content-length: 1000\r\n") + "{", b" "),
                };
                stream.write_all(said.as_bytes()).await?;
                let mut answer = Vec::new();
                loop {
                    let more = until_closed(&mut stream, Duration::from_millis(500)).await;
                    if let Some(more) = more {
                        answer.extend(more);
                        break;
                    }
                    ensure!(began.elapsed() < LATEST, "peer {number} is still connected");
                    // May fail: then the next look sees the end.
                    let _ = stream.write_all(then).await;
                }
                Ok((number % 4, began.elapsed(), status_of(&answer)))
            });
        }
        let mut closed = [0_usize; 4];
        while let Some(peer) = peers.join_next().await {
            let (kind, after, status) = peer??;
            closed[kind] += 1;
            // Bodies that are too slow are told so, if the answer was not lost with what was still under way.
            ensure!(matches!((kind, status), (0 | 1, 0 | 408) | (2 | 3, 408 | 0)), "kind {kind}: {status}");
            ensure!(after > Duration::from_secs(1), "kind {kind} was closed before its deadline: {after:?}");
        }
        Ok(closed)
    };
    let closed = meanwhile(&everything, hostile).await?;
    assert_eq!(closed.iter().sum::<usize>(), slow_peers());
    Ok(())
}

on_each_ledger!(bodies_beyond_every_limit_are_refused_and_closed);

/// T36. What is more than the limit, or not what it says, is refused, and nothing of it is kept.
async fn bodies_beyond_every_limit_are_refused_and_closed(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let before = everything.events().await?;
    let large = vec![b' '; 256 * 1024 + 1];
    let chunk = |bytes: &[u8]| [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n0\r\n\r\n"].concat();
    let with = |length: &str, body: &[u8]| [head(length).as_bytes(), body].concat();
    let chunked = "transfer-encoding: chunked\r\n";
    let gzip = "content-encoding: gzip\r\ncontent-length: 1000000\r\n";
    for (what, request, statuses) in [
        ("256 KiB and a byte, declared", with(&format!("content-length: {}\r\n", large.len()), &large), &[413][..]),
        ("256 KiB and a byte, in chunks", with(chunked, &chunk(&large)), &[413]),
        ("10 GiB declared, nothing sent", with("content-length: 10737418240\r\n", b""), &[413]),
        ("2^64 bytes declared", with("content-length: 18446744073709551616\r\n", b""), &[400]),
        ("2^64 - 1 bytes declared", with("content-length: 18446744073709551615\r\n", b""), &[413, 400, 431]),
        ("a negative length", with("content-length: -1\r\n", b""), &[400]),
        ("a length with a sign", with("content-length: +2\r\n", b"{}"), &[400]),
        ("a gzip bomb", with(gzip, &[0x1f, 0x8b, 8, 0]), &[415, 413]),
        (
            "gzip in chunks",
            with("connection: close\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n", &chunk(b"\x1f\x8b")),
            &[415],
        ),
        ("both lengths", with("content-length: 2\r\ntransfer-encoding: chunked\r\n", &chunk(b"{}")), &[400]),
        (
            "both, the other way round",
            with("transfer-encoding: chunked\r\ncontent-length: 2\r\n", &chunk(b"{}")),
            &[400],
        ),
        ("two different lengths", with("content-length: 2\r\ncontent-length: 3\r\n", b"{} "), &[400]),
        ("two lengths in one", with("content-length: 2, 3\r\n", b"{} "), &[400]),
        ("an unknown transfer coding", with("transfer-encoding: gzip\r\n", b""), &[400, 501]),
        ("chunked, and not last", with("transfer-encoding: chunked, gzip\r\n", b""), &[400, 501]),
        ("a chunk's length that is none", with(chunked, b"zz\r\n"), &[400]),
        ("a chunk of 2^64 bytes", with(chunked, b"10000000000000000\r\n"), &[400]),
        ("a chunk without its end", with(chunked, b"1\r\nxyz"), &[400]),
        ("a chunk extension of 64 KiB", with(chunked, &[b"1;x=", &[b'y'; 64 * 1024][..]].concat()), &[400]),
        ("headers of 64 KiB", with(&format!("x: {}\r\ncontent-length: 2\r\n", "y".repeat(64 * 1024)), b"{}"), &[431]),
        ("a thousand headers", with(&("x: y\r\n".repeat(1_000) + "content-length: 2\r\n"), b"{}"), &[431]),
        ("a target of 64 KiB", format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(64 * 1024)).into_bytes(), &[414, 431]),
        ("a header with a NUL", with("x: a\0b\r\ncontent-length: 2\r\n", b"{}"), &[400]),
        ("a folded header", with("x: a\r\n b\r\ncontent-length: 2\r\n", b"{}"), &[400]),
        ("HTTP/2 without being asked", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &[400, 505, 0]),
        ("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), &[400]),
    ] {
        let mut stream = say(everything.gateway, &request).await?;
        let answer =
            until_closed(&mut stream, Duration::from_secs(8)).await.with_context(|| format!("{what}: open"))?;
        assert!(statuses.contains(&status_of(&answer)), "{what}: {}", String::from_utf8_lossy(&answer));
        assert!(answer.len() < 1_024, "{what}: nothing is reflected");
    }
    assert_eq!(everything.events().await?, before, "no row");
    assert!(everything.upstream.requests().is_empty());
    Ok(())
}

/// T36, again and again: what each leaves behind is nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_flat_under_bodies_that_are_too_large() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let gateway = everything.gateway;
    let hostile = async {
        // 600 MiB in all, 16 at a time: ten gigabytes declared and two megabytes sent, in chunks or not.
        for round in 0..20 {
            let mut peers = JoinSet::new();
            for number in 0..16 {
                peers.spawn(async move {
                    let length = match number % 2 {
                        0 => "content-length: 10737418240\r\n",
                        _ => "transfer-encoding: chunked\r\n",
                    };
                    let mut request = head(length).into_bytes();
                    for _ in 0..30 {
                        request.extend_from_slice(b"10000\r\n");
                        request.extend_from_slice(&[b' '; 0x10000]);
                        request.extend_from_slice(b"\r\n");
                    }
                    let mut stream = say(gateway, &request).await?;
                    let answer = until_closed(&mut stream, Duration::from_secs(10)).await.context("open")?;
                    // A reset can overtake the answer.
                    ensure!(matches!(status_of(&answer), 413 | 0), "{}", status_of(&answer));
                    Ok(())
                });
            }
            while let Some(peer) = peers.join_next().await {
                peer?.with_context(|| format!("round {round}"))?;
            }
        }
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

/// A cap on connections is a cap: the next one waits until another has gone, and then is served.
#[tokio::test]
async fn beyond_the_cap_a_connection_waits_for_its_turn() -> Result<()> {
    let everything = Everything::start_as(Ledger::Sqlite, |command| {
        deadlines(command).env("GATEWAY_CONNECTIONS_MAX", "8").env("GATEWAY_FIRST_BYTE_TIMEOUT", "1s")
    })
    .await?;
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(everything.gateway).await?);
    }
    let began = Instant::now();
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(everything.send(&body).await?.status, 200);
    assert!(began.elapsed() > Duration::from_millis(500), "the cap did not hold");
    for mut stream in silent {
        assert_eq!(until_closed(&mut stream, Duration::from_secs(5)).await, Some(Vec::new()), "closed by its deadline");
    }
    Ok(())
}

/// Whoever fills the admin listener with silence keeps no probe out for long.
#[tokio::test]
async fn probes_are_answered_behind_silent_connections() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let mut silent = Vec::new();
    for number in 0..64 {
        silent.push(say(everything.admin, if number % 2 == 0 { "" } else { "GET /livez HTTP/1.1\r\n" }).await?);
    }
    let began = Instant::now();
    assert_eq!(http_client::get(everything.admin, "/livez").await?.status, 200);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    for mut stream in silent {
        until_closed(&mut stream, Duration::from_secs(8)).await.context("a silent connection is still open")?;
    }
    for request in [
        format!("GET /metrics HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(64 * 1024)),
        "GET /livez HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".to_owned(),
    ] {
        let mut stream = say(everything.admin, &request).await?;
        let answer = until_closed(&mut stream, Duration::from_secs(8)).await.context("open")?;
        assert!(matches!(status_of(&answer), 400 | 431), "{}", String::from_utf8_lossy(&answer));
    }
    Ok(())
}

/// Requests one after the other without reading an answer: the gateway stops reading, keeps little, and others are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_never_reads_is_not_written_to_without_end() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let gateway = everything.gateway;
    let hostile = async {
        let mut peers = JoinSet::new();
        for _ in 0..16 {
            peers.spawn(async move {
                let requests = "GET /webhooks/payments/health HTTP/1.1\r\nhost: gateway\r\n\r\n".repeat(1_000);
                until_it_stalls(unread(gateway).await?, requests.as_bytes()).await
            });
        }
        while let Some(peer) = peers.join_next().await {
            ensure!(peer?? > 0, "nothing was taken at all");
        }
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

/// T42, in depth: a body may be deep, and is then refused, without a stack that overflows.
#[tokio::test]
async fn deep_and_doubled_json_is_refused() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let deep =
        |open: &str, close: &str| format!("{{\"x\":{}{},\"id\":\"evt_1\"}}", open.repeat(10_000), close.repeat(10_000));
    for body in [
        deep("[", "]"),
        deep("{\"a\":", "}"),
        "[".repeat(200_000),
        "{\"a\":".repeat(40_000),
        r#"{"id":"evt_1","id":"evt_1"}"#.to_owned(),
        r#"{"id":"evt_1","\u0069d":"evt_2"}"#.to_owned(),
    ] {
        let answer = everything.send(body.as_bytes()).await?;
        assert_eq!(answer.status, 400, "{}", &body[..body.len().min(60)]);
    }
    // Signed with the other's secret it is not even read.
    let forged = stripe::sign("whsec_of_somebody_else", deep("[", "]").as_bytes());
    assert_ne!(forged, stripe::sign(SECRET, b""));
    let answer = crate::setup::send_signed(everything.gateway, &forged, deep("[", "]").as_bytes()).await?;
    assert_eq!(answer.status, 401);
    assert_eq!(everything.events().await?, 0);
    Ok(())
}
