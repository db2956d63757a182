//! The one thread that writes (L3, L7). It takes what has queued up, does it in one transaction, and answers only when
//! the commit is durable: calls that arrive while the disk is waited for go into the next transaction together.
//!
//! It is a thread of its own, not a task: it waits for the disk, and a caller that is cancelled must not take
//! a transaction along.

use std::{mem, sync::Arc, time::Duration};

use oncegate_runtime::throttle::Throttle;
use rusqlite::Connection;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use super::{
    FileLock,
    clock::Clock,
    error::Fault,
    transaction::{ClaimOutcome, Transaction},
};
use crate::{
    event::{Event, FencingToken, Lock, Marked, Micros, Refusal},
    ledger::metrics::LedgerMetrics,
    ledger::{
        Error,
        damage::Damage,
        filter::{CleanupProgress, CleanupScope},
        load::Load,
        queue::{BATCH_BYTES_MAX, Op, batch_span},
        tally::Tally,
    },
};

/// A step of Cleanup, and where its answer goes. Steps have a channel of their own, of which one is taken between two batches,
/// so that a long Cleanup does not take the places of calls.
#[derive(Debug)]
pub(super) struct CleanupStep {
    pub(super) scope: CleanupScope,
    pub(super) progress: CleanupProgress,
    pub(super) reply: oneshot::Sender<Result<CleanupProgress, Error>>,
}

/// For how long a step of Cleanup may keep calls waiting, its commit aside.
const STEP_TIME_MAX: Duration = Duration::from_millis(20);

/// How far the clock may be ahead of the machine's before somebody has to know.
const AHEAD_MAX: Micros = Micros(60_000_000);

/// The thread's own.
pub(super) struct Writer {
    pub(super) conn: Connection,
    pub(super) clock: Arc<Clock>,
    /// The last fencing token that was given out.
    pub(super) token: FencingToken,
    pub(super) tally: Tally,
    pub(super) metrics: Arc<LedgerMetrics>,
    /// What Cleanup goes by.
    pub(super) load: Arc<Load>,
    pub(super) faults: Throttle,
    pub(super) damage: Damage,
    /// That the clock is far ahead has been logged.
    pub(super) is_ahead: bool,
    pub(super) batch_max: usize,
    pub(super) ops: mpsc::Receiver<Box<Op>>,
    pub(super) cleanups: mpsc::Receiver<CleanupStep>,
    /// Held for as long as the connection is open. Declared after it, and so released after it.
    pub(super) _lock: FileLock,
}

/// What the thread is to do next.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) calls: Vec<Op>,
    pub(super) flush: bool,
    pub(super) close: Option<oneshot::Sender<()>>,
}

/// How a call ended.
enum Outcome {
    Claim(Box<ClaimOutcome>),
    Mark(Result<Marked, Refusal>),
    Extend(Result<Lock, Refusal>),
    Resolve(Result<Event, Refusal>),
}

impl Writer {
    /// Works until it is told to close, or nobody can ask any more.
    pub(super) fn run(mut self) {
        let mut closing = None;
        // The last flush has left enough for another: it does not wait for the next second, and no call waits for all of them.
        let mut goes_on = false;
        // Not between the seconds while nothing can be written: each batch would wait for another try, and win nothing (L2).
        let mut written = true;
        while closing.is_none() {
            let Some(batch) = self.next(goes_on) else { break };
            closing = batch.close;
            self.calls(batch.calls);
            if batch.flush {
                self.look_at_clock();
            }
            let is_due = batch.flush || (written && self.tally.is_full());
            if is_due {
                written = self.flush();
            }
            goes_on = is_due && written && self.tally.is_full();
            if let Ok(step) = self.cleanups.try_recv() {
                self.cleanup(step, STEP_TIME_MAX);
            }
        }
        // All that was counted until now. With what keeps coming there might be no end.
        let mut due = self.tally.len();
        while due > 0 && self.flush() {
            due = due.saturating_sub(Tally::KEYS_MAX);
        }
        // Whoever asks from here on, or has asked already, is refused; then the file is released, and only then is that said.
        self.ops.close();
        while let Ok(op) = self.ops.try_recv() {
            op.refuse(Error::unavailable());
        }
        drop(self);
        if let Some(closed) = closing {
            // A caller that has gone away does not want to know.
            let _ = closed.send(());
        }
    }

    /// What is to be done next: waits for a call, unless there is something to go on with. None when nobody can ask any more.
    fn next(&mut self, goes_on: bool) -> Option<Batch> {
        let first = if goes_on {
            match self.ops.try_recv() {
                Ok(first) => first,
                Err(TryRecvError::Empty) => return Some(Batch::default()),
                Err(TryRecvError::Disconnected) => return None,
            }
        } else {
            self.ops.blocking_recv()?
        };
        Some(self.batch(first))
    }

    /// The first call and those that came in while the last batch was under way, up to the bounds on their number and payload.
    pub(super) fn batch(&mut self, first: Box<Op>) -> Batch {
        let mut batch = Batch::default();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(op) = next {
            match *op {
                Op::Flush => batch.flush = true,
                Op::Close(reply) => {
                    batch.close = Some(reply);
                    break;
                }
                // Its caller would not use the lock, and everybody else would wait for it to expire.
                op if op.is_abandoned() => {}
                op => {
                    bytes += op.bytes();
                    batch.calls.push(op);
                }
            }
            let is_full = batch.calls.len() >= self.batch_max || bytes > BATCH_BYTES_MAX;
            next = if is_full { None } else { self.ops.try_recv().ok() };
        }
        batch
    }

    pub(super) fn calls(&mut self, calls: Vec<Op>) {
        if calls.is_empty() {
            return;
        }
        // A stack: the first half goes first.
        let mut waiting = vec![calls];
        // Calls that met damage, each with the fault, and whether any other could be done.
        let mut damaged = Vec::new();
        let mut done = false;
        while let Some(mut calls) = waiting.pop() {
            match self.transact(&calls) {
                Ok(outcomes) => {
                    done = true;
                    for (call, outcome) in calls.into_iter().zip(outcomes) {
                        self.answer(call, outcome);
                    }
                }
                // One bad item does not fail the others: it is found by halving.
                Err(fault) if fault.is_of_an_item() && calls.len() > 1 => {
                    let second = calls.split_off(calls.len() / 2);
                    waiting.extend([second, calls]);
                }
                Err(fault @ Fault::Damaged(_)) => {
                    self.report(&fault, calls.len());
                    damaged.push((calls, fault));
                    if Damage::ends_batch(done, damaged.len()) {
                        waiting.drain(..).for_each(|rest| refuse(rest, &Error::unavailable()));
                    }
                }
                Err(fault) => {
                    self.report(&fault, calls.len());
                    refuse(calls, &fault.answer());
                }
            }
        }
        let nothing_is_read = self.damage.reads_nothing(done, damaged.len());
        for (calls, fault) in damaged {
            refuse(calls, &if nothing_is_read { fault.answer() } else { fault.answer_alone() });
        }
    }

    /// All of them in one transaction, or none.
    fn transact(&mut self, calls: &[Op]) -> Result<Vec<Outcome>, Fault> {
        let (metrics, load) = (Arc::clone(&self.metrics), Arc::clone(&self.load));
        let _counted = metrics.batch(calls.len());
        let _timed = load.batch(calls.len());
        batch_span(calls.iter()).in_scope(|| self.attempt(calls))
    }

    fn attempt(&mut self, calls: &[Op]) -> Result<Vec<Outcome>, Fault> {
        // Claims are mostly duplicates when a provider repeats itself: looked at first without the right to write, a batch of
        // nothing else takes no write lock (L2).
        if calls.iter().all(|call| matches!(call, Op::Claim(..))) {
            match self.within(false, |transaction| each(transaction, calls)) {
                Err(Fault::NeedsWrite) => {}
                done => return done,
            }
        }
        self.within(true, |transaction| each(transaction, calls))
    }

    /// Runs a transaction to its commit, or leaves nothing of it.
    fn within<T>(
        &mut self,
        immediate: bool,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let done =
            Transaction::begin(&self.conn, &self.clock, &mut self.token, immediate).and_then(|mut transaction| {
                let done = work(&mut transaction)?;
                transaction.commit()?;
                Ok(done)
            });
        // After some errors of the disk SQLite has rolled back by itself. Nothing is done after a first error.
        if done.is_err() && !self.conn.is_autocommit() {
            // Were this to fail, the next BEGIN would, and say so to its callers.
            if let Err(error) = self.conn.execute_batch("rollback") {
                tracing::error!(error = &error as &dyn std::error::Error, "cannot roll back");
            }
        }
        done
    }

    fn answer(&mut self, call: Op, outcome: Outcome) {
        // A caller that has gone away does not want the answer.
        match (call, outcome) {
            (Op::Claim(claim, reply), Outcome::Claim(outcome)) => {
                if outcome.tallied.duplicate {
                    self.tally.duplicate(&claim.key, None);
                }
                if outcome.tallied.mismatch {
                    self.tally.mismatch(&claim.key, outcome.now);
                }
                drop(reply.send(outcome.answer.map_err(Error::from)));
            }
            (Op::Mark(_, reply), Outcome::Mark(answer)) => drop(reply.send(answer.map_err(Error::from))),
            (Op::Extend(_, reply), Outcome::Extend(answer)) => drop(reply.send(answer.map_err(Error::from))),
            (Op::Resolve(_, reply), Outcome::Resolve(answer)) => drop(reply.send(answer.map_err(Error::from))),
            (call, _) => call.refuse(Error::Internal("a call was answered with another's outcome".into())),
        }
    }

    /// Writes the counts that are kept in memory, as many as one transaction may have. Returns whether it could write any.
    pub(super) fn flush(&mut self) -> bool {
        if self.tally.is_empty() {
            return true;
        }
        let mut waiting = vec![self.tally.take(Tally::KEYS_MAX)];
        let (mut written, mut kept, mut damaged) = (false, Vec::new(), Vec::new());
        while let Some(mut counts) = waiting.pop() {
            let done = self
                .within(true, |transaction| counts.iter().try_for_each(|(key, count)| transaction.flush(key, count)));
            match done {
                Ok(()) => written = true,
                // An event that cannot be read would keep the counts of all others from being written, for ever.
                Err(Fault::Damaged(_)) if counts.len() > 1 => {
                    let second = counts.split_off(counts.len() / 2);
                    waiting.extend([second, counts]);
                }
                Err(fault) => {
                    self.report(&fault, counts.len());
                    let is_damage = matches!(fault, Fault::Damaged(_));
                    if is_damage {
                        damaged.extend(counts);
                    } else if !matches!(fault, Fault::Commit(_)) {
                        // After a commit it is unknown whether they were written. Better not counted than counted twice.
                        kept.extend(counts);
                    }
                    if !is_damage || Damage::ends_batch(written, damaged.len()) {
                        kept.extend(waiting.drain(..).flatten());
                    }
                }
            }
        }
        // Those of one event that cannot be read are lost; where nothing can be read, they are not.
        if !written && damaged.len() > 1 {
            kept.extend(damaged);
        }
        self.tally.restore(kept);
        written
    }

    pub(super) fn cleanup(&mut self, step: CleanupStep, time_max: Duration) {
        let CleanupStep { scope, mut progress, reply } = step;
        if reply.is_closed() {
            return;
        }
        let done = self.within(!scope.dry_run, |transaction| transaction.cleanup(&scope, &mut progress, time_max));
        let answer = match done {
            Ok(()) => Ok(progress),
            Err(fault) => {
                self.report(&fault, 1);
                Err(fault.answer())
            }
        };
        drop(reply.send(answer));
    }

    /// Counts a transaction that failed, and says why: a disk that is full would say so thousands of times a second.
    fn report(&self, fault: &Fault, items: usize) {
        self.metrics.failed(fault.into());
        if let Some(unreported) = self.faults.pass() {
            tracing::error!(
                error = fault as &dyn std::error::Error,
                items,
                unreported,
                "a transaction of the embedded database failed"
            );
        }
    }

    /// Logs once that the clock is far ahead of the machine's, which was set back: nothing else shows it.
    fn look_at_clock(&mut self) {
        let ahead = self.clock.ahead();
        if (ahead > AHEAD_MAX) != mem::replace(&mut self.is_ahead, ahead > AHEAD_MAX) && self.is_ahead {
            tracing::warn!(
                seconds = ahead.0 / 1_000_000,
                "the embedded database's clock is ahead of the machine's, which was set back: times are as many seconds late, \
                 and Cleanup counts its days from the machine's"
            );
        }
    }
}

fn refuse(calls: Vec<Op>, error: &Error) {
    for call in calls {
        call.refuse(error.clone());
    }
}

fn each(transaction: &mut Transaction<'_>, calls: &[Op]) -> Result<Vec<Outcome>, Fault> {
    let mut outcomes = Vec::with_capacity(calls.len());
    for call in calls {
        outcomes.push(match call {
            Op::Claim(claim, _) => Outcome::Claim(Box::new(transaction.claim(claim)?)),
            Op::Mark(mark, _) => Outcome::Mark(transaction.mark(mark)?),
            Op::Extend(extend, _) => Outcome::Extend(transaction.extend(extend)?),
            Op::Resolve(resolve, _) => Outcome::Resolve(transaction.resolve(resolve)?),
            Op::Flush | Op::Close(_) => return Err(Fault::Defect("a batch of calls has something else in it")),
        });
    }
    Ok(outcomes)
}
