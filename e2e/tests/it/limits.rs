//! Limits and peers that are slow or hostile, against the built program on its real listeners: each is refused or closed by
//! its deadline, memory stays flat, and others are served meanwhile.

mod http1;
mod http2;

use std::{
    future::Future,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use oncegate_e2e::{stripe, wire::resident_kib};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::setup::{Everything, word};

/// What the process may hold more than before, in KiB, whatever the peers did. A debug build, allocator's arenas and page
/// cache of the embedded store included; the peers of these tests would take ten times as much if it were kept for them.
const GROWTH_KIB_MAX: u64 = 96 * 1024;

/// Runs something hostile while honest webhooks are sent, and checks that they were answered in time, and the memory.
async fn meanwhile<T>(everything: &Everything, hostile: impl Future<Output = Result<T>>) -> Result<T> {
    let pid = everything.program.pid()?;
    honest(everything).await?;
    let before = resident_kib(pid)?;
    let mut most = before;
    let mut hostile = std::pin::pin!(hostile);
    let result = loop {
        tokio::select! {
            result = &mut hostile => break result?,
            served = honest(everything) => served?,
        }
        most = most.max(resident_kib(pid)?);
    };
    honest(everything).await?;
    most = most.max(resident_kib(pid)?);
    ensure!(most - before < GROWTH_KIB_MAX, "memory grew from {before} to {most} KiB");
    Ok(result)
}

async fn honest(everything: &Everything) -> Result<()> {
    let began = Instant::now();
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    let answer = everything.send(&body).await?;
    ensure!(word(&answer) == "200 processed", "{}", word(&answer));
    ensure!(began.elapsed() < Duration::from_secs(5), "an honest webhook took {:?}", began.elapsed());
    tokio::time::sleep(Duration::from_millis(20)).await;
    Ok(())
}

/// What a peer that does not read may be taken from: what the buffers of both ends hold, and then no more.
const TAKEN_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A connection whose near side takes next to nothing.
async fn unread(address: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4_096)?;
    Ok(socket.connect(address).await?)
}

/// Sends the piece over and over, and reads nothing, until the far side takes no more for a second or ends the connection;
/// how much it took.
async fn until_it_stalls(mut stream: TcpStream, piece: &[u8]) -> Result<usize> {
    let mut taken = 0;
    while taken < TAKEN_BYTES_MAX {
        match timeout(Duration::from_secs(1), stream.write(&piece[taken % piece.len()..])).await {
            Ok(Ok(length)) => taken += length,
            Ok(Err(_)) | Err(_) => return Ok(taken),
        }
    }
    bail!("{taken} bytes were taken of a peer that reads nothing");
}
