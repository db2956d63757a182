//! Peers that misbehave: exact bytes on the wire, HTTP/2 frame by frame, and what that costs the process at the other
//! end.

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
    time::timeout,
};

use crate::eventually::DEADLINE;

/// The memory that a process holds, in KiB.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("cannot read the process's status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    line.trim().trim_end_matches(" kB").parse().context("VmRSS is no number")
}

/// Connects and sends bytes. The other side may close before it has received all.
pub async fn say(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    let _ = timeout(DEADLINE, stream.write_all(bytes.as_ref())).await;
    Ok(stream)
}

/// What arrives until the other side closes or resets the connection; None if it has not within the limit.
pub async fn until_closed(stream: &mut TcpStream, limit: Duration) -> Option<Vec<u8>> {
    let mut answer = Vec::new();
    // A reset is an end like any other.
    timeout(limit, stream.read_to_end(&mut answer)).await.is_ok().then_some(answer)
}

/// The status of an HTTP/1 answer; 0 for none.
pub fn status_of(answer: &[u8]) -> u16 {
    let text = String::from_utf8_lossy(answer);
    text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or_default()
}

/// HTTP/2, frame by frame (RFC 9113, section 4.1).
pub mod http2 {
    use super::*;

    /// What a client says first.
    pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    /// Types of frames.
    pub const DATA: u8 = 0;
    /// See [`DATA`].
    pub const HEADERS: u8 = 1;
    /// See [`DATA`].
    pub const RST_STREAM: u8 = 3;
    /// See [`DATA`].
    pub const SETTINGS: u8 = 4;
    /// See [`DATA`].
    pub const PING: u8 = 6;
    /// See [`DATA`].
    pub const GOAWAY: u8 = 7;
    /// See [`DATA`].
    pub const CONTINUATION: u8 = 9;

    /// Flags of HEADERS and DATA.
    pub const END_STREAM: u8 = 1;
    /// Flag of HEADERS and CONTINUATION.
    pub const END_HEADERS: u8 = 4;
    /// Flag of SETTINGS and PING.
    pub const ACK: u8 = 1;

    /// One frame.
    pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("a frame is short").to_be_bytes();
        let mut frame = Vec::with_capacity(9 + payload.len());
        frame.extend_from_slice(&length[1..]);
        frame.extend_from_slice(&[kind, flags]);
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    /// A header without indexing and without Huffman's code (RFC 7541, section 6.2.2).
    pub fn field(name: &str, value: &str) -> Vec<u8> {
        let mut field = vec![0];
        for text in [name, value] {
            // A length with a prefix of seven bits (section 5.1).
            let mut rest = text.len();
            if rest < 127 {
                field.push(u8::try_from(rest).expect("below 127"));
            } else {
                field.push(127);
                rest -= 127;
                while rest >= 128 {
                    field.push(u8::try_from(rest % 128).expect("below 128") | 128);
                    rest /= 128;
                }
                field.push(u8::try_from(rest).expect("below 128"));
            }
            field.extend_from_slice(text.as_bytes());
        }
        field
    }

    /// The headers of a gRPC call.
    pub fn call(method: &str) -> Vec<u8> {
        [
            field(":method", "POST"),
            field(":scheme", "http"),
            field(":path", &format!("/oncegate.v1.IdempotencyService/{method}")),
            field(":authority", "sidecar"),
            field("content-type", "application/grpc"),
            field("te", "trailers"),
        ]
        .concat()
    }

    /// A connection that has sent its preface, with these settings.
    pub async fn begin(address: SocketAddr, settings: &[(u16, u32)]) -> Result<TcpStream> {
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend_from_slice(&name.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        say(address, [PREFACE, &frame(SETTINGS, 0, 0, &payload), &frame(SETTINGS, ACK, 0, &[])].concat()).await
    }

    /// The frames contained in bytes: kind, stream, payload.
    pub fn frames(mut bytes: &[u8]) -> Vec<(u8, u32, Vec<u8>)> {
        let mut frames = Vec::new();
        while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let Some((payload, after)) = rest.split_at_checked(length) else { break };
            frames.push((head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload.to_vec()));
            bytes = after;
        }
        frames
    }
}

/// A path to a server on which answers can be lost, while requests arrive and are carried out.
pub struct Lossy {
    address: SocketAddr,
    lost: Arc<AtomicBool>,
    server: JoinHandle<()>,
}

impl Lossy {
    /// A path to `target`.
    pub async fn to(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let lost = Arc::new(AtomicBool::new(false));
        let loses = Arc::clone(&lost);
        let server = tokio::spawn(async move {
            let mut ways = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let loses = Arc::clone(&loses);
                ways.spawn(async move {
                    let Ok(far) = TcpStream::connect(target).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (stream.into_split(), far.into_split());
                    tokio::select! {
                        () = carry(near_in, far_out, None) => {}
                        () = carry(far_in, near_out, Some(loses)) => {}
                    }
                });
            }
        });
        Ok(Self { address, lost, server })
    }

    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts or stops losing answers; a connection that has lost one ends when the next would be passed on.
    pub fn lose(&self, lose: bool) {
        self.lost.store(lose, Ordering::SeqCst);
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, lost: Option<Arc<AtomicBool>>) {
    let mut piece = vec![0; 16 * 1024];
    let mut has_lost = false;
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        match lost.as_ref().map(|lost| lost.load(Ordering::SeqCst)) {
            Some(true) => {
                has_lost = true;
                continue;
            }
            // With a gap in it, it is no longer a stream.
            Some(false) if has_lost => return,
            Some(false) | None => {}
        }
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
