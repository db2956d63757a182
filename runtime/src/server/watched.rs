//! A stream that is watched: as it is read, whether anything came, and which heads went by; as it is written, whether the
//! peer takes anything.

use std::{
    collections::VecDeque,
    future::Future as _,
    io,
    pin::Pin,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::scan::{Framing, Scan};

/// What was seen of a connection's input. Written and read by one task, hence relaxed, and a lock that nobody waits for.
#[derive(Debug, Default)]
pub(super) struct Seen {
    bytes: AtomicUsize,
    /// Heads that were read and whose requests hyper has not made yet: a few of a pipeline, as its buffer is bounded.
    heads: Mutex<VecDeque<Framing>>,
}

impl Seen {
    /// Bytes received, saturating; only small numbers matter.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// The head of the next request.
    pub(super) fn next_head(&self) -> Option<Framing> {
        self.heads().pop_front()
    }

    fn heads(&self) -> MutexGuard<'_, VecDeque<Framing>> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The stream.
pub(super) struct Watched<T> {
    stream: T,
    seen: std::sync::Arc<Seen>,
    scan: Option<Scan>,
    write_timeout: Duration,
    /// Runs while a write waits for the peer.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<T> Watched<T> {
    /// Counts bytes and looks at heads.
    pub(super) fn http1(stream: T, seen: std::sync::Arc<Seen>, write_timeout: Duration) -> Self {
        Self { stream, seen, scan: Some(Scan::default()), write_timeout, stalled: None }
    }

    /// Counts bytes. In HTTP/2 lengths are framed and headers are not lines.
    pub(super) fn http2(stream: T, seen: std::sync::Arc<Seen>, write_timeout: Duration) -> Self {
        Self { stream, seen, scan: None, write_timeout, stalled: None }
    }

    /// What came of a write, unless the peer has taken nothing for too long: then an error, which ends the connection.
    fn unless_stalled<R>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let limit = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        let piece = &buf.filled()[before..];
        if !piece.is_empty() {
            this.seen.bytes.store(this.seen.bytes().saturating_add(piece.len()), Relaxed);
            if let Some(scan) = &mut this.scan {
                scan.advance(piece, |head| this.seen.heads().push_back(head));
            }
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.unless_stalled(cx, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Of a socket it does nothing, so that it says nothing about the peer.
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.unless_stalled(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
