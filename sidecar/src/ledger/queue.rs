//! The bounded queue in front of a ledger's writer (L3). Calls that arrive while a batch is under way wait here and go
//! into the next one; beyond the bound they are refused at once, for a call that waits until its deadline helps nobody.

use std::{future::Future, sync::Arc, time::Duration};

use oncegate_runtime::telemetry::{self, Link};
use tokio::sync::{mpsc, oneshot};
use tracing::{Instrument as _, Span};

use super::{Error, metrics::LedgerMetrics};
use crate::event::{Claim, Claimed, Event, Extend, Key, Lock, Mark, Marked, Resolve, StoredResult};

/// The longest that a call waits for the writer: within the callers' own deadline (2.5 s), so that they hear what is known.
const CALL_TIME_MAX: Duration = Duration::from_millis(2_200);

/// Where an answer goes, and the span of the call that it answers.
#[derive(Debug)]
pub struct Reply<T> {
    sender: oneshot::Sender<Result<T, Error>>,
    /// Boxed: mostly there is none.
    link: Option<Box<Link>>,
}

impl<T> Reply<T> {
    /// A reply, and the receiver of its answer.
    pub fn channel() -> (Reply<T>, oneshot::Receiver<Result<T, Error>>) {
        let (sender, answer) = oneshot::channel();
        (Reply { sender, link: telemetry::here().map(Box::new) }, answer)
    }

    /// Answers.
    ///
    /// # Errors
    /// The answer, when nobody waits for it any more.
    pub fn send(self, answer: Result<T, Error>) -> Result<(), Result<T, Error>> {
        self.sender.send(answer)
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// The payload beyond which a batch takes no more calls, in bytes as [`Op::bytes`] has them: results of 64 KiB each would make a
/// batch take seconds, and everybody waits for it.
pub const BATCH_BYTES_MAX: usize = 4 << 20;

/// What the writer is asked to do.
#[derive(Debug)]
pub enum Op {
    /// CheckAndLock. Dropped when its caller is gone before the batch is built.
    Claim(Claim, Reply<Claimed>),
    /// MarkCompleted or MarkFailed. Never dropped: it may be the only record of an effect.
    Mark(Mark, Reply<Marked>),
    /// ExtendLock.
    Extend(Extend, Reply<Lock>),
    /// Resolve.
    Resolve(Resolve, Reply<Event>),
    /// For the embedded store: write the counts that are kept in memory, and look for a step of Cleanup. In Postgres both have
    /// connections of their own.
    Flush,
    /// Write what is kept in memory, close the connection, and end.
    Close(oneshot::Sender<()>),
}

impl Op {
    /// The event that the call is about.
    pub fn key(&self) -> Option<&Key> {
        match self {
            Op::Claim(claim, _) => Some(&claim.key),
            Op::Mark(mark, _) => Some(&mark.key),
            Op::Extend(extend, _) => Some(&extend.key),
            Op::Resolve(resolve, _) => Some(&resolve.key),
            Op::Flush | Op::Close(_) => None,
        }
    }

    /// About how much payload it carries.
    pub fn bytes(&self) -> usize {
        let result = |result: &Option<StoredResult>| result.as_ref().map_or(0, |result| result.body.len());
        match self {
            Op::Claim(claim, _) => claim.metadata.as_ref().map_or(0, String::len),
            Op::Mark(mark, _) => result(&mark.result),
            Op::Resolve(resolve, _) => result(&resolve.result),
            Op::Extend(..) | Op::Flush | Op::Close(_) => 0,
        }
    }

    /// The span of the call, if it is recorded.
    fn link(&self) -> Option<&Link> {
        match self {
            Op::Claim(_, reply) => reply.link.as_deref(),
            Op::Mark(_, reply) => reply.link.as_deref(),
            Op::Extend(_, reply) => reply.link.as_deref(),
            Op::Resolve(_, reply) => reply.link.as_deref(),
            Op::Flush | Op::Close(_) => None,
        }
    }

    /// Whether nobody waits for the answer and nothing is lost by not doing it: only a claim that has not begun.
    pub fn is_abandoned(&self) -> bool {
        matches!(self, Op::Claim(_, reply) if reply.is_closed())
    }

    /// Answers with an error, whatever was asked.
    pub fn refuse(self, error: Error) {
        // A caller that has gone away does not want the answer.
        match self {
            Op::Claim(_, reply) => drop(reply.send(Err(error))),
            Op::Mark(_, reply) => drop(reply.send(Err(error))),
            Op::Extend(_, reply) => drop(reply.send(Err(error))),
            Op::Resolve(_, reply) => drop(reply.send(Err(error))),
            Op::Flush => {}
            Op::Close(reply) => {
                let _gone = reply.send(());
            }
        }
    }
}

/// The callers' end.
#[derive(Clone, Debug)]
pub struct Queue {
    ops: mpsc::Sender<Box<Op>>,
    metrics: Arc<LedgerMetrics>,
}

/// The span of a batch, linked to those of its calls: it works for all of them and belongs to none. There is none unless one of
/// the calls is recorded.
pub fn batch_span<'a>(ops: impl Iterator<Item = &'a Op> + Clone) -> Span {
    let mut links = ops.clone().filter_map(Op::link).peekable();
    if links.peek().is_none() {
        return Span::none();
    }
    let span = tracing::info_span!(
        parent: None,
        "ledger_batch",
        otel.name = telemetry::BATCH,
        otel.kind = "internal",
        oncegate.batch.calls = ops.count(),
    );
    links.for_each(|link| telemetry::link(&span, link));
    span
}

impl Queue {
    /// A queue of at most `capacity` calls, and the writer's end of it. Boxed: a call is large, and handed on several times.
    pub fn bounded(capacity: usize, metrics: Arc<LedgerMetrics>) -> (Queue, mpsc::Receiver<Box<Op>>) {
        let (ops, receiver) = mpsc::channel(capacity);
        // Weak: the writer ends when nobody is left who can ask.
        let watched = ops.downgrade();
        metrics.queued_by(move || watched.upgrade().map_or(0, |ops| ops.max_capacity() - ops.capacity()));
        (Queue { ops, metrics }, receiver)
    }

    /// Queues a call at once, and returns what waits for its answer, for [`CALL_TIME_MAX`] at most. Cancel-safe: what was
    /// queued is done (or, for a claim that has not begun, dropped) without the caller.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when the queue is full, [`Error::Unavailable`] when the writer has ended, and
    /// [`Error::OutcomeUnknown`] when it ended with the call under way, or the time is over.
    pub fn ask<T, O>(&self, op: O) -> impl Future<Output = Result<T, Error>> + use<T, O>
    where
        O: FnOnce(Reply<T>) -> Op,
    {
        let span = tracing::info_span!("ledger", otel.kind = "internal");
        // Here, not within the future: a call is large, and its future would hold room for it until its answer is there.
        let answer = span.in_scope(|| self.enter(op));
        async move {
            let answer = match answer {
                Ok(answer) => tokio::time::timeout(CALL_TIME_MAX, answer.instrument(span)).await,
                Err(error) => return Err(error),
            };
            // A call that has waited too long stays queued and may still happen: that is what the error says.
            answer.ok().and_then(Result::ok).unwrap_or(Err(Error::OutcomeUnknown))
        }
    }

    fn enter<T>(&self, op: impl FnOnce(Reply<T>) -> Op) -> Result<oneshot::Receiver<Result<T, Error>>, Error> {
        let (reply, answer) = Reply::channel();
        match self.ops.try_send(Box::new(op(reply))) {
            Ok(()) => Ok(answer),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.metrics.refused.add();
                Err(Error::overloaded())
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Error::unavailable()),
        }
    }

    /// Asks for a flush, unless the queue is too full to take it: then the next second's will do.
    pub fn flush(&self) {
        drop(self.ops.try_send(Box::new(Op::Flush)));
    }

    /// Waits for the writer's end, for whatever reason. Cancel-safe.
    pub async fn ended(&self) {
        self.ops.closed().await;
    }

    /// Waits until the writer has written everything queued before this call, and ended.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.ops.send(Box::new(Op::Close(done))).await.is_ok() {
            // An error means that the writer ended by itself.
            drop(closed.await);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::event::{
        Ending, FencingToken,
        fixture::{self, key},
    };

    fn claim(event_id: &str) -> Claim {
        fixture::claim(event_id, "claim")
    }

    fn mark(event_id: &str) -> Mark {
        Mark {
            key: key(event_id),
            fencing_token: FencingToken(1),
            claim_id: None,
            ending: Ending::Completed { metadata: None },
            result: None,
            attempts_max: None,
        }
    }

    #[tokio::test]
    async fn beyond_its_bound_a_call_is_refused_at_once_and_room_is_used_again() {
        let (queue, mut ops) = Queue::bounded(2, Arc::default());
        let mut waiting: Vec<_> =
            ["a", "b"].map(|event_id| Box::pin(queue.ask(|reply| Op::Claim(claim(event_id), reply)))).into();
        for ask in &mut waiting {
            assert!(ask.now_or_never().is_none(), "it waits for its answer");
        }
        let refused = queue.ask(|reply| Op::Claim(claim("c"), reply)).now_or_never().expect("not kept waiting");
        assert!(matches!(refused, Err(Error::Overloaded { retry_after }) if !retry_after.is_zero()), "{refused:?}");
        // The writer takes one: there is room for one more, and for no two.
        let taken = ops.recv().await.expect("two are queued");
        assert_eq!(taken.key(), Some(&key("a")));
        assert!(queue.ask(|reply| Op::Claim(claim("d"), reply)).now_or_never().is_none());
        let refused = queue.ask(|reply| Op::Claim(claim("e"), reply)).now_or_never().expect("not kept waiting");
        assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn a_claim_whose_caller_is_gone_is_abandoned_and_a_mark_never_is() {
        let (queue, mut ops) = Queue::bounded(2, Arc::default());
        assert!(queue.ask(|reply| Op::Claim(claim("a"), reply)).now_or_never().is_none());
        assert!(queue.ask(|reply| Op::Mark(mark("a"), reply)).now_or_never().is_none());
        // Both futures are dropped: their callers have gone away.
        let (claim, mark) = (ops.recv().await.expect("a claim"), ops.recv().await.expect("a mark"));
        assert!(claim.is_abandoned());
        assert!(!mark.is_abandoned(), "it may be the only record of an effect");
    }
}
