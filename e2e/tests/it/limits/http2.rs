//! The sidecar's listener: HTTP/2, frame by frame.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use oncegate_api::v1::{
    CheckAndLockRequest, Decision, EventKey, HistoryRequest, MarkCompletedRequest,
    idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::wire::{
    http2::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, begin, call,
        field, frame, frames,
    },
    say, until_closed,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};

use super::{meanwhile, unread, until_it_stalls};
use crate::setup::{Everything, Ledger, on_each_ledger};

/// After so long a peer is asked whether it is alive, and has so long to answer (`oncegate_runtime::server::Http2`).
const KEEP_ALIVE: Duration = Duration::from_secs(20 + 10);

/// How long a connection may take to say its preface.
const FIRST_BYTES: Duration = Duration::from_secs(5);

/// No flood takes longer to be stopped, or to be let pass.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a flood came to.
struct Flooded {
    answer: Vec<u8>,
    /// A write failed before the last piece: the far side had ended the connection by then.
    cut: bool,
}

/// Sends pieces until the far side ends the connection, or all are sent; then waits for the far side to end it, which nobody
/// on this side does. Reads meanwhile.
async fn flood(address: SocketAddr, pieces: impl Iterator<Item = Vec<u8>>) -> Result<Flooded> {
    let (mut reader, mut writer) = begin(address, &[]).await?.into_split();
    let answer = tokio::spawn(async move {
        let mut answer = Vec::new();
        // Ends with the connection; a reset is an end as well.
        let _ = reader.read_to_end(&mut answer).await;
        answer
    });
    let mut cut = false;
    for piece in pieces {
        let written = timeout(PATIENCE, writer.write_all(&piece)).await.context("neither taken nor refused")?;
        if written.is_err() {
            cut = true;
            break;
        }
    }
    let answer = timeout(PATIENCE, answer).await.context("the flood did not end the connection")??;
    Ok(Flooded { answer, cut })
}

fn goaway(answer: &[u8]) -> Option<u32> {
    let frames = frames(answer);
    let (.., payload) = frames.iter().find(|(kind, ..)| *kind == GOAWAY)?;
    Some(u32::from_be_bytes([payload[4], payload[5], payload[6], payload[7]]))
}

/// `ENHANCE_YOUR_CALM` (RFC 9113, section 7).
const CALM: u32 = 0xb;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_resets_end_the_connection() -> Result<()> {
    // 256 streams, and four times as many resets.
    let limits = [("SIDECAR_CALLS_MAX", "64"), ("SIDECAR_WAITING_MAX", "64")];
    let everything = Everything::start_with(Ledger::Sqlite, &limits).await?;
    let address = everything.sidecar;
    let hostile = async {
        for _ in 0..20 {
            // POST, http and / as the static table has them (RFC 7541, appendix A). Twenty thousand short ones at a time: more
            // arrive at once than a connection may reset before anybody has looked at them.
            let headers = [0x83, 0x86, 0x84];
            let pieces = (0..3_u32).map(move |piece| {
                let one = |number: u32| {
                    let stream = number * 2 + 1;
                    let reset = frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
                    [frame(HEADERS, END_HEADERS, stream, &headers), reset].concat()
                };
                (piece * 20_000..(piece + 1) * 20_000).flat_map(one).collect()
            });
            let Flooded { answer, cut } = flood(address, pieces).await?;
            // Told so; or cut off, and the word was lost with what was still under way.
            match goaway(&answer) {
                Some(why) => ensure!(why == CALM, "{why}"),
                None => ensure!(cut, "60,000 streams that were reset at once were taken"),
            }
        }
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

/// Callers that share a connection and give up at once, all before the service has looked at one of their calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_call_survives_five_hundred_cancelled_ones_on_its_connection() -> Result<()> {
    const CALLS: usize = 500;
    let everything = Everything::start(Ledger::Sqlite).await?;
    let claim = |event_id: String, claim_id: &str, wait: i64| CheckAndLockRequest {
        key: Some(EventKey { provider: "stripe".into(), event_id, ..EventKey::default() }),
        event_type: "payment_intent.succeeded".into(),
        claim_id: claim_id.into(),
        wait_duration: Some(prost_types::Duration { seconds: wait, nanos: 0 }),
        ..CheckAndLockRequest::default()
    };
    let mut holder = everything.client().await?;
    let granted = holder.check_and_lock(claim("evt_held".into(), "holder", 0)).await?.into_inner();
    let lock = granted.lock.context("the event is new")?;

    // The test stands between the client and the service, so that it knows what is under way.
    let between = TcpListener::bind("127.0.0.1:0").await?;
    let address = between.local_addr()?;
    let (client, accepted) =
        tokio::join!(IdempotencyServiceClient::connect(format!("http://{address}")), between.accept());
    let (client, near) = (client?, accepted?.0);
    let far = TcpStream::connect(everything.sidecar).await?;
    let ((mut said_by_client, mut to_client), (mut said_by_service, mut to_service)) =
        (near.into_split(), far.into_split());
    tokio::spawn(async move { tokio::io::copy(&mut said_by_service, &mut to_client).await });

    let mut patient = client.clone();
    let waiting = tokio::spawn(async move { patient.check_and_lock(claim("evt_held".into(), "patient", 20)).await });
    let mut said = Vec::new();
    let count = |said: &[u8], kind: u8| {
        frames(said.get(PREFACE.len()..).unwrap_or_default()).iter().filter(|frame| frame.0 == kind).count()
    };
    while count(&said, DATA) < 1 {
        ensure!(said_by_client.read_buf(&mut said).await? > 0, "the client has hung up");
    }
    to_service.write_all(&said).await?;
    let passed_on = said.len();

    let mut cancelled = JoinSet::new();
    for number in 0..CALLS {
        let mut client = client.clone();
        cancelled.spawn(async move { client.check_and_lock(claim(format!("evt_{number}"), "impatient", 0)).await });
    }
    while count(&said, HEADERS) < 1 + CALLS {
        ensure!(said_by_client.read_buf(&mut said).await? > 0, "the client has hung up");
    }
    cancelled.shutdown().await;
    while count(&said, RST_STREAM) < CALLS {
        ensure!(said_by_client.read_buf(&mut said).await? > 0, "the client has hung up");
    }
    // All of it is there before the service looks at any of it.
    everything.program.freeze()?;
    to_service.write_all(&said[passed_on..]).await?;
    everything.program.thaw()?;
    tokio::spawn(async move { tokio::io::copy(&mut said_by_client, &mut to_service).await });

    // Answered after all of that, on the same connection.
    let mut client = client;
    client.check_and_lock(claim("evt_after".into(), "after", 0)).await.context("the connection has ended")?;
    let done = MarkCompletedRequest {
        key: Some(EventKey { provider: "stripe".into(), event_id: "evt_held".into(), ..EventKey::default() }),
        fencing_token: lock.fencing_token,
        claim_id: "holder".into(),
        ..MarkCompletedRequest::default()
    };
    holder.mark_completed(done).await?;
    let answer = waiting.await?.context("the waiting call was ended with the others")?.into_inner();
    assert_eq!(answer.decision(), Decision::AlreadyCompleted);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_without_end_end_the_connection() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let address = everything.sidecar;
    let hostile = async {
        for kind in ["empty", "small", "large"] {
            let first = frame(HEADERS, 0, 1, &call("CheckAndLock"));
            let more = match kind {
                "empty" => Vec::new(),
                "small" => field("x", "y"),
                _ => field("x", &"y".repeat(16_000)),
            };
            // At most 800 MiB.
            let rest = (0..50_000).map(move |_| frame(CONTINUATION, 0, 1, &more));
            let Flooded { answer, cut } =
                flood(address, std::iter::once(first).chain(rest)).await.with_context(|| kind.to_owned())?;
            ensure!(cut || goaway(&answer).is_some(), "{kind}: all of it was taken");
            let frames = frames(&answer);
            ensure!(!frames.iter().any(|(kind, ..)| *kind == DATA), "{kind}: answered as a call");
        }
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

/// What asks for an answer each: the answers must not pile up for a peer that does not read them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_and_pings_without_end_do_not_pile_up() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let address = everything.sidecar;
    let hostile = async {
        let mut peers = JoinSet::new();
        for (kind, payload) in [(SETTINGS, &b""[..]), (SETTINGS, &[0, 3, 0, 0, 0, 1]), (PING, b"01234567")] {
            let pieces = frame(kind, 0, 0, payload).repeat(1_000);
            let piece = pieces.clone();
            peers.spawn(async move {
                let mut stream = unread(address).await?;
                stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await?;
                until_it_stalls(stream, &piece).await.with_context(|| format!("frames of type {kind}"))?;
                anyhow::Ok(())
            });
            // Who reads the answers may go on.
            peers.spawn(async move {
                let (mut reader, mut writer) = begin(address, &[]).await?.into_split();
                let mut nowhere = tokio::io::sink();
                let answers = tokio::io::copy(&mut reader, &mut nowhere);
                let asks = async { while writer.write_all(&pieces).await.is_ok() {} };
                let _ = timeout(Duration::from_secs(2), async { tokio::join!(answers, asks) }).await;
                Ok(())
            });
        }
        while let Some(peer) = peers.join_next().await {
            peer??;
        }
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

/// Calls whose answers may not be sent, as many as a connection permits, on many connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_of_zero_hold_up_nobody_else() -> Result<()> {
    const INITIAL_WINDOW_SIZE: u16 = 4;
    let everything = Everything::start(Ledger::Sqlite).await?;
    let address = everything.sidecar;
    let hostile = async {
        let mut stalled = Vec::new();
        for _ in 0..20 {
            let mut stream = begin(address, &[(INITIAL_WINDOW_SIZE, 0)]).await?;
            for number in 0..200_u32 {
                let headers = frame(HEADERS, END_HEADERS, number * 2 + 1, &call("History"));
                // An empty message: everything there is.
                let body = frame(DATA, END_STREAM, number * 2 + 1, &[0, 0, 0, 0, 0]);
                stream.write_all(&[headers, body].concat()).await?;
            }
            // All of them are answered, as far as that is permitted.
            let mut answered = BTreeSet::new();
            let mut seen = Vec::new();
            timeout(PATIENCE, async {
                while answered.len() < 200 {
                    ensure!(stream.read_buf(&mut seen).await? > 0, "the connection was closed");
                    let found = frames(&seen);
                    ensure!(!found.iter().any(|(kind, ..)| *kind == DATA), "more was sent than is permitted");
                    answered.extend(found.iter().filter(|(kind, ..)| *kind == HEADERS).map(|(_, stream, _)| *stream));
                }
                anyhow::Ok(())
            })
            .await
            .context("the calls were not answered")??;
            stalled.push(stream);
        }
        // And other calls are answered.
        let mut client = IdempotencyServiceClient::connect(format!("http://{address}")).await?;
        client.history(HistoryRequest::default()).await?;
        // Who is asked whether it is alive and does not answer loses what it holds up.
        for mut stream in stalled {
            until_closed(&mut stream, KEEP_ALIVE + PATIENCE).await.context("a stalled connection is still open")?;
        }
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

/// Silence, half a preface, no preface, and a preface with nothing behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_silent_connections_are_closed_by_their_deadline() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let address = everything.sidecar;
    let hostile = async {
        let mut peers = JoinSet::new();
        for number in 0..2_000 {
            // What overflows the queue of the listener is known to nobody but the peer.
            if number % 100 == 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            peers.spawn(async move {
                let said = [&b""[..], &PREFACE[..1], &PREFACE[..23], b"GET / HTTP/1.1\r\n\r\n"][number % 4];
                let mut stream = say(address, said).await?;
                let began = Instant::now();
                let answer = until_closed(&mut stream, FIRST_BYTES * 3).await;
                ensure!(answer.is_some(), "{number} is still connected");
                // What is no preface is refused at once; who says nothing has its time.
                let early = number % 4 != 3 && began.elapsed() < FIRST_BYTES - Duration::from_secs(1);
                ensure!(!early, "{number} was closed after {:?}", began.elapsed());
                Ok(())
            });
        }
        while let Some(peer) = peers.join_next().await {
            peer??;
        }
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

/// On a connection whose peer is alive, and so is kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_never_end_are_given_up() -> Result<()> {
    const CALLS: usize = 200;
    let everything = Everything::start(Ledger::Sqlite).await?;
    let address = everything.sidecar;
    let hostile = async {
        let mut stream = begin(address, &[]).await?;
        for number in 0..CALLS {
            let id = u32::try_from(number)? * 2 + 1;
            // Of a megabyte nearly. All of them fit into the window that a connection begins with.
            let begun = [&[0, 0, 15, 0, 0][..], &[b'x'; 100]].concat();
            let call = [frame(HEADERS, END_HEADERS, id, &call("CheckAndLock")), frame(DATA, 0, id, &begun)].concat();
            stream.write_all(&call).await?;
        }
        let answered = |frames: &[(u8, u32, Vec<u8>)]| {
            let answered: BTreeSet<_> =
                frames.iter().filter(|(kind, ..)| *kind == HEADERS).map(|(_, stream, _)| *stream).collect();
            answered.len() == CALLS
        };
        until_all(&mut stream, answered).await.context("each is answered")?;
        Ok(())
    };
    meanwhile(&everything, hostile).await
}

on_each_ledger!(metadata_messages_and_streams_have_their_limits);

async fn metadata_messages_and_streams_have_their_limits(ledger: Ledger) -> Result<()> {
    let limits = [("SIDECAR_CALLS_MAX", "64"), ("SIDECAR_WAITING_MAX", "64")];
    let everything = Everything::start_with(ledger, &limits).await?;
    let mut client = IdempotencyServiceClient::connect(format!("http://{}", everything.sidecar)).await?;
    // Metadata of 64 KiB.
    let mut request = tonic::Request::new(HistoryRequest::default());
    request.metadata_mut().insert("x-large", "y".repeat(64 * 1024).parse()?);
    let status = client.history(request).await.expect_err("headers beyond the limit");
    assert!(!matches!(status.code(), tonic::Code::Ok | tonic::Code::Internal), "{status:?}");
    // A message of more than a megabyte.
    let key = Some(EventKey { provider: "stripe".into(), event_id: "evt_1".into(), ..Default::default() });
    let large = CheckAndLockRequest { key, event_type: "y".repeat(1024 * 1024 + 1), ..Default::default() };
    let status = client.check_and_lock(large).await.expect_err("a message beyond the limit");
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status:?}");
    // One that says that it is four gigabytes.
    let mut stream = begin(everything.sidecar, &[]).await?;
    let headers = frame(HEADERS, END_HEADERS, 1, &call("CheckAndLock"));
    stream.write_all(&[headers, frame(DATA, 0, 1, &[0, 0xff, 0xff, 0xff, 0xff])].concat()).await?;
    until(&mut stream, HEADERS).await.context("refused without waiting for the rest")?;

    // More streams than permitted, which are the calls at the ledger, those that wait, and 64 to read: those beyond are refused,
    // and the connection goes on.
    let mut stream = begin(everything.sidecar, &[]).await?;
    for number in 0..400_u32 {
        // Each is under way until its message has come.
        stream.write_all(&frame(HEADERS, END_HEADERS, number * 2 + 1, &call("CheckAndLock"))).await?;
    }
    stream.write_all(&frame(PING, 0, 0, b"01234567")).await?;
    let seen = until(&mut stream, PING).await?;
    let announced = seen.iter().find(|(kind, ..)| *kind == SETTINGS).context("settings")?;
    assert!(announced.2.chunks(6).any(|setting| setting == [0, 3, 0, 0, 1, 0]), "256 streams: {announced:?}");
    // REFUSED_STREAM (RFC 9113, section 7): nothing was done, the caller may ask again.
    let refused = seen.iter().filter(|(kind, _, why)| *kind == RST_STREAM && why == &7_u32.to_be_bytes()).count();
    assert_eq!(refused, 144, "those beyond 256");
    Ok(())
}

/// Reads until a frame of a kind has come.
async fn until(stream: &mut TcpStream, wanted: u8) -> Result<Vec<(u8, u32, Vec<u8>)>> {
    until_all(stream, |frames| frames.iter().any(|(kind, ..)| *kind == wanted)).await
}

/// Reads until frames fulfil a condition.
async fn until_all(
    stream: &mut TcpStream,
    wanted: impl Fn(&[(u8, u32, Vec<u8>)]) -> bool,
) -> Result<Vec<(u8, u32, Vec<u8>)>> {
    let mut seen = Vec::new();
    let read = async {
        loop {
            let found = frames(&seen);
            if wanted(&found) {
                return Ok(found);
            }
            if stream.read_buf(&mut seen).await? == 0 {
                bail!("the connection was closed");
            }
        }
    };
    timeout(PATIENCE, read).await.context("no such frame in time")?
}
