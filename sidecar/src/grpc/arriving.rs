//! The message of a call while it arrives. Whoever can open a connection can begin thousands of messages and never end them, and
//! nothing else bounds those: they have no place among the calls yet, and a peer that answers pings keeps its connection.

use std::{
    error::Error,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use oncegate_api::reason;
use tokio::time::Sleep;
use tonic::{Code, Status};

use super::status::retryable;

/// How long a message may take to arrive, from when it was first waited for: 100 KiB a second for the largest.
pub(super) const TIME_MAX: Duration = Duration::from_secs(10);

/// The bytes of all messages, of all connections, that have arrived in part: the largest results of all calls that may be on the
/// ledger.
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// When a call may be tried again that was refused for what others send.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Watches of health at once, in all connections: strangers may begin them, and they have no end.
const WATCHES_MAX: usize = 1_024;

/// What is held for callers that have no place among the calls.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Of messages that have arrived in part.
    bytes: AtomicUsize,
    watches: AtomicUsize,
}

impl Held {
    /// A place for a watch, for as long as it is kept.
    pub(super) fn watch(self: &Arc<Self>) -> Result<Watch, Status> {
        let watch = Watch(self.clone());
        if self.watches.fetch_add(1, Relaxed) < WATCHES_MAX {
            return Ok(watch);
        }
        let message = format!("{WATCHES_MAX} watches are there already; ask with Check");
        Err(retryable(Code::Unavailable, reason::OVERLOADED, message, RETRY_AFTER))
    }
}

/// The place of a watch.
pub(super) struct Watch(Arc<Held>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.watches.fetch_sub(1, Relaxed);
    }
}

/// The body of a request, within its time and the bytes that all of them may have.
pub(super) struct Arriving<B> {
    body: B,
    held: Arc<Held>,
    /// Of this one.
    bytes: usize,
    is_timed: bool,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> Arriving<B> {
    /// `is_timed`: there is one message, which is waited for. Not so where a caller may ask again in a while.
    pub(super) fn new(body: B, held: &Arc<Held>, is_timed: bool) -> Self {
        Self { body, held: held.clone(), bytes: 0, is_timed, timer: None }
    }

    /// Accounts for what has arrived; false: there is too much.
    fn hold(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        self.held.bytes.fetch_add(bytes, Relaxed).saturating_add(bytes) <= BYTES_MAX
    }
}

impl<B> Drop for Arriving<B> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.held.bytes.fetch_sub(self.bytes, Relaxed);
        }
    }
}

impl<B> Body for Arriving<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Data = Bytes;
    /// A [`Status`], where it is this that refuses: it becomes the call's.
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            let Some(frame) = frame.transpose().map_err(Into::into)? else { return Poll::Ready(None) };
            // With the last one the call begins: most messages are one frame, and account for nothing.
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            if bytes > 0 && !self.body.is_end_stream() && !self.hold(bytes) {
                return Poll::Ready(Some(Err(too_much().into())));
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.is_timed {
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(TIME_MAX)));
            ready!(timer.as_mut().poll(cx));
            return Poll::Ready(Some(Err(too_slow().into())));
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn too_slow() -> Status {
    let message = format!("the message did not arrive within {} s; the call did not happen", TIME_MAX.as_secs());
    retryable(Code::DeadlineExceeded, reason::DEADLINE_EXCEEDED, message, RETRY_AFTER)
}

fn too_much() -> Status {
    let message = format!("more than {BYTES_MAX} bytes of messages have arrived in part; the call did not happen");
    retryable(Code::Unavailable, reason::OVERLOADED, message, RETRY_AFTER)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::{StreamExt as _, stream};
    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;

    /// A message of these frames, which then goes on or has ended.
    fn message(
        frames: &[usize],
        ended: bool,
        held: &Arc<Held>,
        is_timed: bool,
    ) -> Arriving<impl Body<Data = Bytes, Error = Infallible> + Unpin + use<>> {
        let frames: Vec<_> = frames.iter().map(|bytes| Ok(Frame::data(Bytes::from(vec![b'x'; *bytes])))).collect();
        let frames = stream::iter(frames);
        let frames = if ended { frames.boxed() } else { frames.chain(stream::pending()).boxed() };
        Arriving::new(StreamBody::new(frames), held, is_timed)
    }

    fn code(error: Box<dyn Error + Send + Sync>) -> Code {
        error.downcast::<Status>().expect("a status").code()
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_does_not_end_is_given_up() {
        let held = Arc::default();
        let begun = tokio::time::Instant::now();
        let error = message(&[5, 100], false, &held, true).collect().await.expect_err("no end");
        assert_eq!((code(error), begun.elapsed().as_secs()), (Code::DeadlineExceeded, TIME_MAX.as_secs()));
        assert_eq!(message(&[5, 100], true, &held, true).collect().await.expect("an end").to_bytes().len(), 105);
        // Where a caller may ask again, it is waited for.
        let waited = tokio::time::timeout(100 * TIME_MAX, message(&[5], false, &held, false).collect()).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(held.bytes.load(Relaxed), 0, "what is given up is forgotten");
    }

    #[test]
    fn watches_have_a_bound() {
        let held = Arc::<Held>::default();
        let mut watches: Vec<_> = (0..WATCHES_MAX).map(|_| held.watch().expect("a place")).collect();
        for _ in 0..2 {
            assert_eq!(held.watch().map(drop).expect_err("beyond it").code(), Code::Unavailable);
        }
        watches.pop();
        assert!(held.watch().is_ok());
    }

    #[tokio::test]
    async fn all_messages_together_have_a_bound() {
        let held = Arc::default();
        const FRAME: usize = 1024 * 1024;
        let mut unended = Vec::new();
        for _ in 0..BYTES_MAX / FRAME {
            let mut message = message(&[FRAME], false, &held, true);
            message.frame().await.expect("a frame").expect("within the bound");
            unended.push(message);
        }
        let mut another = message(&[1], false, &held, true);
        assert_eq!(code(another.frame().await.expect("a frame").expect_err("beyond it")), Code::Unavailable);
        drop((another, unended.pop()));
        message(&[FRAME], false, &held, true).frame().await.expect("a frame").expect("there is room again");
    }
}
