//! Reading bodies of strangers: bounded in bytes each, in bytes all together, and in time (W11, W12).
//!
//! hyper bounds neither size nor time of a body.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body::Body;
use http_body_util::BodyExt as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::config::BodyLimits;

/// What the budget counts in: a semaphore holds at most 2^61 permits, and a permit a byte would be pedantic.
const KIB: usize = 1024;

/// The bytes of all bodies held at once, reading or read. Counted as they arrive: what somebody merely announces costs
/// nothing.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    kib: Arc<Semaphore>,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { kib: Arc::new(Semaphore::new(bytes / KIB)) }
    }

    /// What is left, in KiB.
    pub(crate) fn left_kib(&self) -> usize {
        self.kib.available_permits()
    }

    fn reserve(&self) -> Reservation {
        Reservation { budget: self.kib.clone(), held: None }
    }
}

/// A share of the budget, given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
}

impl Reservation {
    /// Covers `bytes` in all; false when the budget does not.
    fn cover(&mut self, bytes: usize) -> bool {
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = bytes.div_ceil(KIB).saturating_sub(held);
        if missing == 0 {
            return true;
        }
        let Ok(missing) = u32::try_from(missing) else { return false };
        match self.budget.clone().try_acquire_many_owned(missing) {
            Ok(more) => {
                match &mut self.held {
                    Some(held) => held.merge(more),
                    None => self.held = Some(more),
                }
                true
            }
            Err(_) => false,
        }
    }
}

/// A body in memory, with its share of the budget.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) bytes: Bytes,
    /// Held for as long as the bytes are.
    _reservation: Reservation,
}

/// Why a body was not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// More bytes than permitted.
    TooLarge,
    /// The budget is used up.
    OverBudget,
    /// Too slow.
    TimedOut,
    /// The sender went away, or its framing is broken.
    Broken,
}

/// Reads `body` as a whole. One that arrives in one piece is not copied. Cancel-safe in so far as nothing is lost but
/// what was read.
pub(crate) async fn read<B>(body: &mut B, limits: &BodyLimits, budget: &Budget) -> Result<Received, Stopped>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut reservation = budget.reserve();
    let started = Instant::now();
    let whole = started + limits.timeout;
    let mut deadline = whole.min(started + limits.first_byte_timeout);
    let mut first = Bytes::new();
    let mut joined: Option<BytesMut> = None;
    let mut length = 0_usize;
    // The last frame of a body may be there already: the clock is asked only while there is nothing to read.
    while let Some(frame) = timeout_at(deadline, body.frame()).await.map_err(|_| Stopped::TimedOut)? {
        let frame = frame.map_err(|_| Stopped::Broken)?;
        // Trailers mean nothing to us.
        let Ok(data) = frame.into_data() else { continue };
        if data.is_empty() {
            continue;
        }
        deadline = whole;
        length = length.saturating_add(data.len());
        if length > limits.bytes_max {
            return Err(Stopped::TooLarge);
        }
        if !reservation.cover(length) {
            return Err(Stopped::OverBudget);
        }
        match &mut joined {
            Some(joined) => joined.extend_from_slice(&data),
            None if first.is_empty() => first = data,
            None => {
                let rest = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
                let mut both = BytesMut::with_capacity(length.saturating_add(rest).min(limits.bytes_max));
                both.extend_from_slice(&first);
                both.extend_from_slice(&data);
                joined = Some(both);
            }
        }
    }
    let bytes = joined.map_or(first, BytesMut::freeze);
    Ok(Received { bytes, _reservation: reservation })
}

/// Reads and forgets what a refused request still sends, up to `bytes_max` and for at most `limit`. Closing a connection
/// with unread bytes resets it, and the sender may then never see the answer.
pub(crate) async fn discard<B>(body: B, bytes_max: usize, limit: Duration)
where
    B: Body<Data = Bytes>,
{
    let mut body = pin!(body);
    let deadline = Instant::now() + limit;
    let mut length = 0_usize;
    while length <= bytes_max {
        match timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => length = length.saturating_add(frame.data_ref().map_or(0, Bytes::len)),
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        pin::Pin,
        task::{Context, Poll},
    };

    use http_body::Frame;
    use http_body_util::Full;
    use tokio::sync::mpsc;

    use super::*;

    /// A body whose pieces come from a channel.
    struct Pieces(mpsc::UnboundedReceiver<Bytes>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
        }
    }

    fn pieces(pieces: &[&'static [u8]]) -> (mpsc::UnboundedSender<Bytes>, Pieces) {
        let (sender, receiver) = mpsc::unbounded_channel();
        for piece in pieces {
            sender.send(Bytes::from_static(piece)).unwrap();
        }
        (sender, Pieces(receiver))
    }

    const LIMITS: BodyLimits = BodyLimits {
        bytes_max: 4 * KIB,
        budget_bytes: 8 * KIB,
        timeout: Duration::from_secs(5),
        first_byte_timeout: Duration::from_secs(2),
    };

    #[tokio::test]
    async fn one_piece_is_not_copied_and_several_are_joined() {
        let budget = Budget::new(LIMITS.budget_bytes);
        let whole = Bytes::from_static(b"hello");
        let received = read(&mut Full::new(whole.clone()), &LIMITS, &budget).await.unwrap();
        assert_eq!(received.bytes.as_ptr(), whole.as_ptr());
        let (sender, mut body) = pieces(&[b"he", b"", b"ll", b"o"]);
        drop(sender);
        assert_eq!(read(&mut body, &LIMITS, &budget).await.unwrap().bytes, "hello");
        assert!(read(&mut Full::new(Bytes::new()), &LIMITS, &budget).await.unwrap().bytes.is_empty());
    }

    #[tokio::test]
    async fn the_limit_is_exact_however_the_body_is_cut() {
        let budget = Budget::new(LIMITS.budget_bytes);
        static EXACT: [u8; 4 * KIB] = [7; 4 * KIB];
        assert_eq!(read(&mut Full::from(&EXACT[..]), &LIMITS, &budget).await.unwrap().bytes.len(), 4 * KIB);
        let (sender, mut body) = pieces(&[&EXACT, b"x"]);
        assert_eq!(read(&mut body, &LIMITS, &budget).await.unwrap_err(), Stopped::TooLarge);
        drop(sender);
        assert_eq!(budget.left_kib(), 8, "all given back");
    }

    #[tokio::test]
    async fn the_budget_counts_what_is_held_and_gets_it_back() {
        let budget = Budget::new(LIMITS.budget_bytes);
        static PIECE: [u8; 3 * KIB] = [7; 3 * KIB];
        let first = read(&mut Full::from(&PIECE[..]), &LIMITS, &budget).await.unwrap();
        let second = read(&mut Full::from(&PIECE[..]), &LIMITS, &budget).await.unwrap();
        assert_eq!(budget.left_kib(), 2);
        let over = read(&mut Full::from(&PIECE[..]), &LIMITS, &budget).await.unwrap_err();
        assert_eq!(over, Stopped::OverBudget);
        drop(first);
        assert!(read(&mut Full::from(&PIECE[..]), &LIMITS, &budget).await.is_ok());
        drop(second);
        assert_eq!(budget.left_kib(), 8);
    }

    // T35
    #[tokio::test(start_paused = true)]
    async fn slow_bodies_are_given_up() {
        let budget = Budget::new(LIMITS.budget_bytes);
        let begun = Instant::now();
        let (_silent, mut body) = pieces(&[]);
        assert_eq!(read(&mut body, &LIMITS, &budget).await.unwrap_err(), Stopped::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 2, "the first byte has its own deadline");
        let begun = Instant::now();
        let (_stalled, mut body) = pieces(&[b"x"]);
        assert_eq!(read(&mut body, &LIMITS, &budget).await.unwrap_err(), Stopped::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 5);
    }
}
