//! What is counted in memory is written here: duplicates and mismatches of events, and processing times (L2, L5).
//!
//! Each second, on a connection of its own: a provider that repeats three days of events makes thousands of rows to add to,
//! each in a page of its own, and no grant waits for them. Its slot is its own as well, so that it and the writer do not wait
//! for each other's counts.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{PgConnection, postgres::PgBindIterExt as _};
use tokio::sync::{Notify, mpsc, oneshot};

use super::{
    bind::Bind as _,
    statement::{Session, Statement},
};
use crate::{
    event::{Event, Key, Time},
    ledger::{
        Error,
        place::Place,
        tally::{Count, Tally},
        timings::{PendingTimings, Timings},
    },
};

/// How often counts are written.
const INTERVAL: Duration = Duration::from_secs(1);
/// The longest wait, after a batch of calls, for counts that do not keep up.
const KEEP_UP_TIME_MAX: Duration = Duration::from_millis(50);

/// What waits to be written. Clones share it.
#[derive(Clone, Default)]
pub(super) struct PendingCounts {
    pub(super) tally: Tally,
    timings: Arc<Mutex<PendingTimings>>,
    /// Notified when some of it has been written, or could not be.
    tried: Arc<Notify>,
    /// Nothing of what was tried last could be written, and nobody knows when that will change.
    halted: Arc<AtomicBool>,
}

impl PendingCounts {
    fn timings(&self) -> MutexGuard<'_, PendingTimings> {
        // Numbers are added under it; nothing there can panic half-way.
        self.timings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the processing time of a completion that was just recorded on an event, if it was one.
    pub(super) fn completed(&self, event: &Event) {
        self.timings().record(event);
    }

    /// Waits a little while there are more counts than can soon be written: those beyond the room for them would be lost. Not
    /// while none can be written: every batch would then wait, and gain nothing by it (L2).
    pub(super) async fn keep_up(&self) {
        if self.tally.is_behind() && !self.halted.load(Ordering::Relaxed) {
            // It is about time, not about the counts: whoever could not write them has put them back.
            let _slow = tokio::time::timeout(KEEP_UP_TIME_MAX, self.tried.notified()).await;
        }
    }
}

/// Asks for the last counts to be written, and for the end.
pub(super) type Close = oneshot::Sender<()>;

/// Writes what is counted. One task, never cancelled: nobody else uses its connection.
pub(super) struct Flusher {
    session: Session,
    counts: PendingCounts,
    closes: mpsc::Receiver<Close>,
}

impl Drop for Flusher {
    /// However it ends: nobody waits any more for what it would have written.
    fn drop(&mut self) {
        self.counts.halted.store(true, Ordering::Relaxed);
        self.counts.tried.notify_waiters();
    }
}

impl Flusher {
    /// Ends when it is asked to, or when nobody is left who could ask.
    pub(super) fn new(session: Session, counts: PendingCounts, closes: mpsc::Receiver<Close>) -> Flusher {
        Flusher { session, counts, closes }
    }

    pub(super) async fn run(mut self) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut written = true;
        loop {
            let closing = tokio::select! {
                _ = tick.tick() => None,
                // Not while nothing can be written: there would be no end of trying.
                () = self.counts.tally.filled(), if written => None,
                close = self.closes.recv() => Some(close),
            };
            // Additions are not repeated: on a connection that died while nobody used it they would be lost.
            self.session.ask().await;
            written = self.flush().await;
            while written && self.counts.tally.is_full() {
                written = self.flush().await;
            }
            if let Some(close) = closing {
                self.session.close().await;
                if let Some(close) = close {
                    // Whoever asked may have gone away.
                    let _gone = close.send(());
                }
                return;
            }
        }
    }

    /// Writes what there is when it begins, and returns whether the last of the counts could be written. What comes meanwhile
    /// is left for the next time, or it would never end.
    async fn flush(&mut self) -> bool {
        let written = self.flush_counts().await;
        // After the counts, whatever became of those: times are in a table of their own, and whoever holds a row of it is
        // waited for.
        let timings = self.counts.timings().take();
        let (_, kept) = self.write(&FlushTimings, timings).await;
        self.counts.timings().restore(kept);
        written
    }

    async fn flush_counts(&mut self) -> bool {
        let (mut written, mut due) = (true, self.counts.tally.len());
        // Put back at the end: a row that somebody holds must not be waited for with every part of the rest.
        let mut unwritten = Vec::new();
        while written && due > 0 {
            let counts = self.counts.tally.take(Tally::FLUSH_MAX.min(due));
            due = due.saturating_sub(counts.len().max(1));
            let kept;
            (written, kept) = self.write(&Flush, counts).await;
            unwritten.extend(kept);
            self.counts.halted.store(!written, Ordering::Relaxed);
            self.counts.tried.notify_waiters();
        }
        self.counts.tally.restore(unwritten);
        written
    }

    /// Runs a statement that adds. Returns whether any of the items was written, and the items to keep because they were not.
    /// What may have been written is not kept: counting twice would be worse than losing a second.
    async fn write<S: Statement<Output = ()>>(&mut self, statement: &S, items: Vec<S::Item>) -> (bool, Vec<S::Item>) {
        let (mut written, mut kept) = (items.is_empty(), Vec::new());
        for (items, result) in self.session.run(statement, items).await {
            match result {
                Ok(()) => written = true,
                Err(Error::Unavailable { .. }) => kept.extend(items),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, items = items.len(), "counts are lost");
                }
            }
        }
        (written, kept)
    }
}

/// Adds counts to their events. Not repeatable: it adds.
struct Flush;

impl Statement for Flush {
    type Item = (Key, Count);
    type Output = ();
    const REPEATABLE: bool = false;

    async fn run(&self, connection: &mut PgConnection, slot: i32, items: &[(Key, Count)]) -> Result<(), sqlx::Error> {
        sqlx::query(include_str!("flush.sql"))
            .bind_keys(items.iter().map(|(key, _)| key))
            .bind(items.iter().map(|(_, count)| count.duplicates).bind_iter())
            .bind(items.iter().map(|(_, count)| count.mismatches).bind_iter())
            .bind(items.iter().map(|(_, count)| count.last_mismatch_time).bind_iter())
            .bind(slot)
            .bind(items.iter().map(|(_, count)| count.location.map(|location| location.row)).bind_iter())
            .bind(items.iter().map(|(_, count)| count.location.map(|location| location.create_time)).bind_iter())
            .execute(connection)
            .await?;
        Ok(())
    }
}

/// Adds processing times to the histograms. Not repeatable: it adds. Items sorted by place. Whoever holds one of their rows is
/// waited for once: waiting with every part would hold up the counts that come next.
struct FlushTimings;

impl Statement for FlushTimings {
    type Item = (Place, Timings);
    type Output = ();
    const REPEATABLE: bool = false;
    const PARTS: bool = false;

    async fn run(
        &self,
        connection: &mut PgConnection,
        slot: i32,
        items: &[(Place, Timings)],
    ) -> Result<(), sqlx::Error> {
        let rows: Vec<(&str, &str, Time, i16, i64)> = items
            .iter()
            .flat_map(|(Place { tenant, provider, hour }, timings)| {
                timings.buckets().map(move |(bucket, count)| (tenant.as_str(), provider.as_str(), *hour, bucket, count))
            })
            .collect();
        sqlx::query(include_str!("timings.sql"))
            .bind(rows.iter().map(|row| row.0).bind_iter())
            .bind(rows.iter().map(|row| row.1).bind_iter())
            .bind(rows.iter().map(|row| row.2).bind_iter())
            .bind(rows.iter().map(|row| row.3).bind_iter())
            .bind(rows.iter().map(|row| row.4).bind_iter())
            .bind(slot)
            .execute(connection)
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn counted(keys: usize) -> PendingCounts {
        let counts = PendingCounts::default();
        for number in 0..keys {
            let event_id = format!("evt_{number}");
            counts.tally.duplicate(&Key { tenant: "default".into(), provider: "stripe".into(), event_id }, None);
        }
        counts
    }

    #[tokio::test]
    async fn calls_wait_for_counts_only_when_those_fall_behind_and_not_for_ever() {
        assert!(counted(Tally::KEYS_MAX).keep_up().now_or_never().is_some());
        let counts = counted(4 * Tally::KEYS_MAX);
        // Until some were written,
        let mut waits = Box::pin(counts.keep_up());
        assert!(waits.as_mut().now_or_never().is_none());
        counts.tried.notify_waiters();
        assert!(waits.now_or_never().is_some());
        // or, if nobody does, until a call cannot wait longer.
        counts.keep_up().await;
        // None waits for what cannot be written.
        counts.halted.store(true, Ordering::Relaxed);
        assert!(counts.keep_up().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_full_tally_calls_for_a_flush_once() {
        assert!(counted(Tally::KEYS_MAX - 1).tally.filled().now_or_never().is_none());
        let counts = counted(Tally::KEYS_MAX + 1);
        assert!(counts.tally.filled().now_or_never().is_some());
        assert!(counts.tally.filled().now_or_never().is_none());
    }
}
