//! A stream that is watched: as it is read, whether anything came, and whether a `Content-Length` line went by; as it is
//! written, whether the peer takes anything.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// What was seen of a connection's input. Written by the reading side and read by the same task, hence relaxed.
#[derive(Debug, Default)]
pub(super) struct Seen {
    bytes: AtomicUsize,
    /// `Content-Length` lines that no request has accounted for yet.
    content_lengths: AtomicUsize,
}

impl Seen {
    /// Bytes received, saturating; only small numbers matter.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// A request that shows one `Content-Length` accounts for one line.
    pub(super) fn account_for_content_length(&self) {
        self.content_lengths.store(self.content_lengths.load(Relaxed).saturating_sub(1), Relaxed);
    }

    /// Whether there are lines that no request has accounted for. Forgets them.
    pub(super) fn take_content_lengths(&self) -> bool {
        self.content_lengths.swap(0, Relaxed) > 0
    }
}

/// The stream.
pub(super) struct Watched<T> {
    stream: T,
    seen: std::sync::Arc<Seen>,
    scan: Option<LineScan>,
    write_timeout: Duration,
    /// Runs while a write waits for the peer.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<T> Watched<T> {
    /// Counts bytes and looks for `Content-Length` lines.
    pub(super) fn http1(stream: T, seen: std::sync::Arc<Seen>, write_timeout: Duration) -> Self {
        Self { stream, seen, scan: Some(LineScan::default()), write_timeout, stalled: None }
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

/// Finds a line that begins with `content-length:` in a stream that arrives in pieces.
///
/// It does not know heads from bodies. That is enough: the finding counts only for a request with
/// `Transfer-Encoding` (`framing`), and such a line inside a body makes that request suspect as well.
#[derive(Debug, Default)]
struct LineScan {
    /// How much of [`LINE`] has been matched.
    matched: usize,
}

/// The first byte occurs only at the start, so a mismatch never has to look back further than one byte.
const LINE: &[u8] = b"\ncontent-length:";

impl LineScan {
    /// How many such lines end in `piece`.
    fn count(&mut self, mut piece: &[u8]) -> usize {
        let mut found = 0;
        loop {
            if self.matched == 0 {
                let Some(newline) = memchr::memchr(LINE[0], piece) else { return found };
                piece = &piece[newline + 1..];
                self.matched = 1;
            }
            while let Some((byte, rest)) = piece.split_first() {
                if byte.to_ascii_lowercase() != LINE[self.matched] {
                    break;
                }
                piece = rest;
                self.matched += 1;
                if self.matched == LINE.len() {
                    found += 1;
                    break;
                }
            }
            if piece.is_empty() && self.matched < LINE.len() {
                return found;
            }
            self.matched = 0;
        }
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
                let lines = this.seen.content_lengths.load(Relaxed).saturating_add(scan.count(piece));
                this.seen.content_lengths.store(lines, Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_length_lines_are_counted_however_they_are_cut() {
        let head = b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\ncontent\nConTent-Length:\ncontent-length: 3\r\n\r\nabc";
        for cut in 0..=head.len() {
            let mut scan = LineScan::default();
            assert_eq!(scan.count(&head[..cut]) + scan.count(&head[cut..]), 3, "cut at {cut}");
        }
        let mut scan = LineScan::default();
        assert_eq!(head.iter().map(|byte| scan.count(std::slice::from_ref(byte))).sum::<usize>(), 3);
    }

    #[test]
    fn other_lines_are_not_counted() {
        for text in [
            "POST / HTTP/1.1\r\nX-Content-Length: 3\r\n\r\n",
            "content-length: 3",
            "\nContent-Lengths: 3",
            "\n\n\ncontent-lengt",
            "\n\"content-length\": 3",
            "",
        ] {
            assert_eq!(LineScan::default().count(text.as_bytes()), 0, "{text:?}");
        }
    }
}
