//! A stream that is watched as it is read: whether anything arrived, and which heads passed.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::scan::{Framing, Scan};

/// What was seen of a connection's input. Written and read by one task, hence relaxed ordering and an uncontended lock.
#[derive(Debug, Default)]
pub(super) struct Seen {
    bytes: AtomicUsize,
    /// Heads that were read but whose requests hyper has not produced yet: a few pipelined ones, since its buffer is
    /// bounded.
    heads: Mutex<VecDeque<Framing>>,
    /// A request has reached the service.
    asked: AtomicBool,
}

impl Seen {
    /// Bytes received, saturating; only small numbers matter.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// The head of the request that now reaches the service.
    pub(super) fn next_head(&self) -> Option<Framing> {
        self.asked.store(true, Relaxed);
        self.heads().pop_front()
    }

    /// Whether any request has reached the service. Only for HTTP/1, where requests have heads.
    pub(super) fn asked(&self) -> bool {
        self.asked.load(Relaxed)
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
}

impl<T> Watched<T> {
    /// Counts bytes and looks at heads.
    pub(super) fn http1(stream: T, seen: std::sync::Arc<Seen>) -> Self {
        Self { stream, seen, scan: Some(Scan::default()) }
    }

    /// Counts bytes. In HTTP/2 lengths are framed and headers are not lines.
    pub(super) fn http2(stream: T, seen: std::sync::Arc<Seen>) -> Self {
        Self { stream, seen, scan: None }
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
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
