//! Reading bodies from strangers, with bounds on the bytes of one, of all together and of each source, and on the time
//! (W11, W12, W15).
//!
//! hyper bounds neither the size of a body nor its time. A body that never ends costs its sender nothing: it fails no
//! signature (W14), and holds its bytes until a time-out. So nobody gets more than a share of the budget for bodies that
//! are not verified yet.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http_body::Body;
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, timeout_at};

use crate::{config::BodyLimits, failures::Source};

/// The unit of the budget: counting single bytes would gain nothing.
const KIB: usize = 1024;

/// The budget, rounded up as bodies are: the largest body that is permitted has to fit.
pub(crate) fn budget_kib(limits: &BodyLimits) -> usize {
    limits.budget_bytes.div_ceil(KIB)
}

/// The bytes of all bodies held at once, reading or read. Counted as they arrive: what somebody merely announces costs
/// nothing.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    kib: Arc<AtomicUsize>,
    /// None: sources cannot be told apart.
    unverified: Option<Arc<Unverified>>,
}

impl Budget {
    pub(crate) fn new(limits: &BodyLimits) -> Self {
        let unverified = |bytes: usize| Arc::new(Unverified { kib_max: bytes.div_ceil(KIB), kib: Mutex::default() });
        Self {
            kib: Arc::new(AtomicUsize::new(budget_kib(limits))),
            unverified: limits.bytes_per_source.map(unverified),
        }
    }

    /// What is left, in KiB.
    pub(crate) fn left_kib(&self) -> usize {
        self.kib.load(Relaxed)
    }

    fn reserve(&self, source: Option<Source>) -> Reservation {
        let share = |(unverified, source): (&Arc<Unverified>, Source)| Share::of(unverified.clone(), source);
        Reservation { budget: self.kib.clone(), kib: 0, share: self.unverified.as_ref().zip(source).map(share) }
    }
}

/// What each source holds of bodies that are not verified yet.
#[derive(Debug)]
struct Unverified {
    kib_max: usize,
    /// At most as many entries as there are such bodies.
    kib: Mutex<HashMap<Source, usize>>,
}

impl Unverified {
    fn kib(&self) -> MutexGuard<'_, HashMap<Source, usize>> {
        // A count is changed in one step.
        self.kib.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A body's part of its source's share. Given back when dropped.
#[derive(Debug)]
struct Share {
    unverified: Arc<Unverified>,
    source: Source,
    kib: usize,
}

impl Share {
    fn of(unverified: Arc<Unverified>, source: Source) -> Self {
        Self { unverified, source, kib: 0 }
    }

    /// Takes this much more; false if that would exceed the share.
    fn take(&mut self, kib: usize) -> bool {
        let mut held = self.unverified.kib();
        let all = held.get(&self.source).copied().unwrap_or(0).saturating_add(kib);
        if all > self.unverified.kib_max {
            return false;
        }
        held.insert(self.source, all);
        drop(held);
        self.kib += kib;
        true
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.kib == 0 {
            return;
        }
        let mut held = self.unverified.kib();
        if let Some(all) = held.get_mut(&self.source) {
            *all -= self.kib;
            if *all == 0 {
                held.remove(&self.source);
            }
        }
    }
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<AtomicUsize>,
    kib: usize,
    /// None: it counts against no source.
    share: Option<Share>,
}

impl Reservation {
    /// Grows to cover `bytes` in total, unless the source's share or the budget is used up.
    fn cover(&mut self, bytes: usize) -> Result<(), Stopped> {
        let missing = bytes.div_ceil(KIB).saturating_sub(self.kib);
        if missing == 0 {
            return Ok(());
        }
        if self.share.as_mut().is_some_and(|share| !share.take(missing)) {
            return Err(Stopped::OverShare);
        }
        let left = |left: usize| left.checked_sub(missing);
        self.budget.fetch_update(Relaxed, Relaxed, left).map_err(|_| Stopped::OverBudget)?;
        self.kib += missing;
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.fetch_add(self.kib, Relaxed);
    }
}

/// A body in memory, with its part of the budget.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) bytes: Bytes,
    digest: OnceLock<[u8; 32]>,
    /// Held for as long as the bytes are.
    reservation: Reservation,
}

impl Received {
    fn new(bytes: Bytes, reservation: Reservation) -> Self {
        Self { bytes, digest: OnceLock::new(), reservation }
    }

    /// SHA-256 of the bytes, worked out when somebody first asks for it.
    pub(crate) fn digest(&self) -> &[u8; 32] {
        self.digest.get_or_init(|| Sha256::digest(&self.bytes).into())
    }

    /// The body is genuine and no longer counts against its source's share: all of a provider's webhooks may come from one
    /// address, and the application may take its time.
    pub(crate) fn verified(&mut self) {
        self.reservation.share = None;
    }
}

/// Why a body was not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// More bytes than permitted.
    TooLarge,
    /// The budget is used up.
    OverBudget,
    /// Its source holds as much as it may.
    OverShare,
    /// Too slow.
    TimedOut,
    /// The sender went away, or its framing is broken.
    Broken,
}

/// Reads the whole of `body`, on the share of `source` if there is one. A body that arrives in one piece is not copied.
/// When the future is dropped, what was read is lost and its part of the budget is given back.
pub(crate) async fn read<B>(
    body: &mut B,
    limits: &BodyLimits,
    budget: &Budget,
    source: Option<Source>,
) -> Result<Received, Stopped>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut reservation = budget.reserve(source);
    // The clock is read only when there are no bytes to read: most bodies arrive together with their head.
    let mut deadlines: Option<(Instant, Instant)> = None;
    let mut first = Bytes::new();
    let mut joined: Option<BytesMut> = None;
    let mut length = 0_usize;
    loop {
        let frame = match poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx))).await {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                let (to_first, to_last) = *deadlines.get_or_insert_with(|| {
                    let now = Instant::now();
                    (now + limits.timeout.min(limits.first_byte_timeout), now + limits.timeout)
                });
                let deadline = if length == 0 { to_first } else { to_last };
                timeout_at(deadline, body.frame()).await.map_err(|_| Stopped::TimedOut)?
            }
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|_| Stopped::Broken)?;
        // Trailers mean nothing to us.
        let Ok(data) = frame.into_data() else { continue };
        if data.is_empty() {
            continue;
        }
        length = length.saturating_add(data.len());
        if length > limits.bytes_max {
            return Err(Stopped::TooLarge);
        }
        reservation.cover(length)?;
        // All bytes that were announced are here: there is nothing to wait for.
        let ended = body.is_end_stream();
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
        if ended {
            break;
        }
    }
    let bytes = joined.map_or(first, BytesMut::freeze);
    Ok(Received::new(bytes, reservation))
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
    use std::{convert::Infallible, task::Context};

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
        bytes_per_source: None,
        timeout: Duration::from_secs(5),
        first_byte_timeout: Duration::from_secs(2),
    };

    #[tokio::test]
    async fn one_piece_is_not_copied_and_several_are_joined() {
        let budget = Budget::new(&LIMITS);
        let whole = Bytes::from_static(b"hello");
        let received = read(&mut Full::new(whole.clone()), &LIMITS, &budget, None).await.unwrap();
        assert_eq!(received.bytes.as_ptr(), whole.as_ptr());
        let (sender, mut body) = pieces(&[b"he", b"", b"ll", b"o"]);
        drop(sender);
        assert_eq!(read(&mut body, &LIMITS, &budget, None).await.unwrap().bytes, "hello");
        assert!(read(&mut Full::new(Bytes::new()), &LIMITS, &budget, None).await.unwrap().bytes.is_empty());
    }

    #[tokio::test]
    async fn the_limit_is_exact_however_the_body_is_cut() {
        let budget = Budget::new(&LIMITS);
        static EXACT: [u8; 4 * KIB] = [7; 4 * KIB];
        assert_eq!(read(&mut Full::from(&EXACT[..]), &LIMITS, &budget, None).await.unwrap().bytes.len(), 4 * KIB);
        let (sender, mut body) = pieces(&[&EXACT, b"x"]);
        assert_eq!(read(&mut body, &LIMITS, &budget, None).await.unwrap_err(), Stopped::TooLarge);
        drop(sender);
        assert_eq!(budget.left_kib(), 8, "all given back");
    }

    #[tokio::test]
    async fn the_budget_counts_what_is_held_and_gets_it_back() {
        let budget = Budget::new(&LIMITS);
        static PIECE: [u8; 3 * KIB] = [7; 3 * KIB];
        let first = read(&mut Full::from(&PIECE[..]), &LIMITS, &budget, None).await.unwrap();
        let second = read(&mut Full::from(&PIECE[..]), &LIMITS, &budget, None).await.unwrap();
        assert_eq!(budget.left_kib(), 2);
        let over = read(&mut Full::from(&PIECE[..]), &LIMITS, &budget, None).await.unwrap_err();
        assert_eq!(over, Stopped::OverBudget);
        drop(first);
        assert!(read(&mut Full::from(&PIECE[..]), &LIMITS, &budget, None).await.is_ok());
        drop(second);
        assert_eq!(budget.left_kib(), 8);
    }

    #[tokio::test]
    async fn the_largest_body_fits_into_a_budget_of_its_size() {
        static LARGEST: [u8; KIB + 1] = [7; KIB + 1];
        let limits = BodyLimits { bytes_max: LARGEST.len(), budget_bytes: LARGEST.len(), ..LIMITS };
        let budget = Budget::new(&limits);
        let held = read(&mut Full::from(&LARGEST[..]), &limits, &budget, None).await.expect("there is room");
        assert_eq!((budget_kib(&limits), budget.left_kib()), (2, 0));
        drop(held);
        assert_eq!(budget.left_kib(), budget_kib(&limits));
    }

    #[tokio::test]
    async fn w15_of_what_is_not_verified_a_source_holds_its_share() {
        static PIECE: [u8; 2 * KIB] = [7; 2 * KIB];
        let budget = Budget::new(&BodyLimits { bytes_per_source: Some(4 * KIB), budget_bytes: 64 * KIB, ..LIMITS });
        let source = |last: u8| Some(Source::of([192, 0, 2, last].into()));
        let read = async |source| read(&mut Full::from(&PIECE[..]), &LIMITS, &budget, source).await;
        let first = read(source(1)).await.unwrap();
        let mut second = read(source(1)).await.unwrap();
        assert_eq!(read(source(1)).await.unwrap_err(), Stopped::OverShare);
        let other = read(source(2)).await.expect("somebody else's share is untouched");
        let nobodys: Vec<_> = vec![read(None).await.unwrap(), read(None).await.unwrap(), read(None).await.unwrap()];
        assert_eq!(budget.left_kib(), 64 - 12, "what was refused is given back");
        drop(first);
        let third = read(source(1)).await.expect("one has gone");
        assert_eq!(read(source(1)).await.unwrap_err(), Stopped::OverShare);
        second.verified();
        let fourth = read(source(1)).await.expect("one is genuine");
        assert_eq!(read(source(1)).await.unwrap_err(), Stopped::OverShare);
        assert_eq!(budget.left_kib(), 64 - 14, "which still takes room");
        drop((second, third, fourth, other, nobodys));
        assert_eq!(budget.left_kib(), 64);
        assert!(budget.unverified.unwrap().kib().is_empty(), "nothing is kept of who has gone");
    }

    #[tokio::test(start_paused = true)]
    async fn w15_a_body_that_never_ends_gives_its_part_of_a_share_back() {
        let budget = Budget::new(&BodyLimits { bytes_per_source: Some(4 * KIB), ..LIMITS });
        let source = Some(Source::of([192, 0, 2, 1].into()));
        static PIECE: [u8; 3 * KIB] = [7; 3 * KIB];
        for _ in 0..3 {
            let (_stalled, mut body) = pieces(&[&PIECE]);
            assert_eq!(read(&mut body, &LIMITS, &budget, source).await.unwrap_err(), Stopped::TimedOut);
        }
        // Where the budget is what is missing, a part of the share was taken already.
        let mut room = budget.reserve(None);
        room.cover(6 * KIB).unwrap();
        assert_eq!(read(&mut Full::from(&PIECE[..]), &LIMITS, &budget, source).await.unwrap_err(), Stopped::OverBudget);
        drop(room);
        assert!(budget.unverified.unwrap().kib().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_wants_is_read_up_to_its_bound_in_bytes_and_in_time() {
        static PIECE: [u8; KIB] = [7; KIB];
        let limit = Duration::from_secs(5);
        // One piece more, which shows that there is more than is allowed.
        let (_more, mut body) = pieces(&[&PIECE[..]; 20]);
        discard(&mut body, 4 * KIB, limit).await;
        assert_eq!(body.0.len(), 20 - 5);
        let begun = Instant::now();
        let (_stalled, mut body) = pieces(&[b"x"]);
        discard(&mut body, 4 * KIB, limit).await;
        assert_eq!((begun.elapsed(), body.0.len()), (limit, 0));
        // To the end, so that the connection can be used again.
        let (ended, mut body) = pieces(&[&PIECE[..]; 4]);
        drop(ended);
        discard(&mut body, 4 * KIB, limit).await;
        assert!(body.0.is_empty() && body.0.is_closed());
    }

    // T35
    #[tokio::test(start_paused = true)]
    async fn slow_bodies_are_given_up() {
        let budget = Budget::new(&LIMITS);
        let begun = Instant::now();
        let (_silent, mut body) = pieces(&[]);
        assert_eq!(read(&mut body, &LIMITS, &budget, None).await.unwrap_err(), Stopped::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 2, "the first byte has its own deadline");
        let begun = Instant::now();
        let (_stalled, mut body) = pieces(&[b"x"]);
        assert_eq!(read(&mut body, &LIMITS, &budget, None).await.unwrap_err(), Stopped::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 5);
    }
}
