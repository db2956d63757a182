//! The ledger: the store that decides. One trait, two implementations, one conformance suite that both pass.

pub mod check;
mod damage;
pub mod durability;
pub mod filter;
pub mod load;
pub mod metrics;
mod place;
pub mod postgres;
pub mod queue;
pub mod sqlite;
mod stretches;
pub mod tally;
pub mod timings;
mod walk;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{broadcast, watch};

use crate::event::{
    Attempt, Claim, Claimed, Digest, Event, Extend, FencingToken, Key, KeyDigest, Lock, Mark, Marked, Refusal,
    Resolution, Resolve, State, Time,
};
use durability::Durability;
use filter::{CleanupProgress, CleanupScope, HistoryFilter, Page, StatsFilter, StatsReport};

/// The most replayed events that are remembered individually.
pub const REPLAYS_MAX: usize = 100_000;

/// Why the ledger did not answer. Classified by SQLSTATE or error kind, never by text.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The ledger is well and refuses the call.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The ledger cannot be reached or cannot write; nothing happened.
    #[error("the ledger is unavailable")]
    Unavailable {
        /// When asking again is worth it.
        retry_after: Duration,
    },
    /// Too many calls are under way; nothing happened.
    #[error("too many calls are under way")]
    Overloaded {
        /// When asking again is worth it.
        retry_after: Duration,
    },
    /// The ledger did not say in time, or went away while the call was under way; it may or may not have happened.
    #[error(
        "the ledger did not say in time what became of the call, or went away meanwhile: it may or may not have happened"
    )]
    OutcomeUnknown,
    /// A defect: the ledger refused a statement that it should have taken. Or the event has a value that this version cannot
    /// read. A call that writes may have happened all the same.
    #[error("the ledger failed: {0}")]
    Internal(String),
}

impl Error {
    /// The ledger cannot be reached, cannot write, or is closed: worth asking again after a second, when a connection may have
    /// been made anew, a disk emptied, or another node taken over.
    pub fn unavailable() -> Error {
        Error::Unavailable { retry_after: Duration::from_secs(1) }
    }

    /// Somebody else has held what the call needs for longer than it may wait: worth asking again after 500 ms, which is how
    /// long a statement waits for a row.
    pub fn contended() -> Error {
        Error::Unavailable { retry_after: Duration::from_millis(500) }
    }

    /// The event changed each time that the call was judged: worth asking again after 100 ms, when whoever changes it is done.
    pub fn changed() -> Error {
        Error::Unavailable { retry_after: Duration::from_millis(100) }
    }

    /// The event has a value that this version does not know, as a newer one may have written: only that one can decide on it.
    pub fn unreadable() -> Error {
        Error::Internal("the event has a value that this version cannot read".into())
    }

    /// All places are taken: worth asking again after 250 ms, when those who were there are served.
    pub fn overloaded() -> Error {
        Error::Overloaded { retry_after: Duration::from_millis(250) }
    }
}

/// The store that decides who may process an event.
///
/// Every method is safe to cancel: the work is done by a task of the ledger's own. A cancelled claim that has not
/// begun is dropped; everything else goes on and takes effect (L3).
#[async_trait]
pub trait Ledger: Send + Sync + 'static {
    /// CheckAndLock, without waiting.
    async fn claim(&self, claim: Claim) -> Result<Claimed, Error>;
    /// MarkCompleted and MarkFailed.
    async fn mark(&self, mark: Mark) -> Result<Marked, Error>;
    /// ExtendLock.
    async fn extend(&self, extend: Extend) -> Result<Lock, Error>;
    /// Resolve.
    async fn resolve(&self, resolve: Resolve) -> Result<Event, Error>;
    /// Where these events are now, for waiters on what other processes do (L9). Absent ones are left out,
    /// and so are those in a state that this version does not know: they must not keep it from the others.
    async fn peek(&self, keys: Vec<Key>) -> Result<Vec<(Key, State, FencingToken)>, Error>;
    /// One event with its attempts and resolutions, oldest first.
    async fn history_of(&self, key: Key) -> Result<Option<EventHistory>, Error>;
    /// Events, newest first.
    async fn history(&self, filter: HistoryFilter) -> Result<Page, Error>;
    /// Counts (L5).
    async fn stats(&self, filter: StatsFilter) -> Result<StatsReport, Error>;
    /// The database's clock.
    async fn now(&self) -> Result<Time, Error>;
    /// The time that Cleanup counts its days from: the database's clock, set right where it is known to run ahead.
    async fn cleanup_now(&self) -> Result<Time, Error> {
        self.now().await
    }
    /// One bounded step of Cleanup: deletes (or counts) within at most the next `batch_size` rows after the cursor that
    /// `progress` holds, adds to its totals, and says by `progress.done` whether that was all.
    async fn cleanup_step(&self, scope: &CleanupScope, progress: &mut CleanupProgress) -> Result<(), Error>;
    /// Counts a duplicate that was answered without asking the ledger.
    fn count_duplicate(&self, key: &Key);
    /// What the ledger's connection stands on; None while it is down (C6).
    fn standing(&self) -> watch::Receiver<Option<Standing>>;
    /// What an acknowledged completion survives (I5); None while the ledger is down, or where nothing is known.
    fn durability(&self) -> Option<Durability> {
        None
    }
    /// Why it is down, where that is known, as of the last [`Ledger::check`].
    fn trouble(&self) -> Option<Trouble> {
        None
    }
    /// Tells other processes on the same ledger that an event has changed, some time soon. Losing it costs them one
    /// interval of their net (L9).
    fn announce(&self, announcement: Announcement);
    /// What other processes announce.
    fn announcements(&self) -> broadcast::Receiver<Heard>;
    /// The replays of completed events, whoever made them: those committed since the read that gave `after`, or, without it,
    /// all that something cached under `standing` may be older than. Read from the node that `standing` names, or not at all
    /// (C7).
    async fn replays(&self, standing: &Standing, after: Option<Arc<str>>) -> Result<Replayed, Error>;
    /// How long the writer's batches take, which Cleanup goes by; None where nobody is to be left any time.
    fn load(&self) -> Option<Arc<load::Load>> {
        None
    }
    /// Periodic upkeep that keeps queries fast; called each second. Any process may do it, and nothing but their speed depends
    /// on it.
    async fn maintain(&self) -> Result<(), Error> {
        Ok(())
    }
    /// Whether the ledger answers, for `grpc.health.v1` and never for readiness (W23); bounded by the ledger's own time-outs.
    async fn check(&self) -> Result<(), Error>;
    /// Writes what is kept in memory (duplicate counts), closes connections. Calls after it are unavailable.
    async fn close(&self);
    /// Waits until nothing can be decided here any more, whatever the database does: the ledger was closed, or a task of its own is
    /// gone, which takes a panic. Cancel-safe.
    async fn ended(&self);
}

/// Why a ledger is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Commits would wait for a standby, and none is connected.
    NoStandby,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::NoStandby => f.write_str(
                "synchronous_standby_names names standbys and none of them is connected; every commit would wait for one",
            ),
        }
    }
}

/// What the ledger's connection stands on: what caches are keyed by.
#[derive(Clone, PartialEq, Eq)]
pub struct Standing {
    /// The database and its timeline: another one after a restore or a promotion (C3).
    pub identity: Arc<str>,
    /// Counts the connections: another one means that anything may have happened in between.
    pub generation: u64,
    /// The secret that cached values are authenticated with (C3).
    pub cache_key: Arc<[u8]>,
}

impl std::fmt::Debug for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standing")
            .field("identity", &self.identity)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// An event has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Which.
    pub digest: KeyDigest,
    /// Its token after the change.
    pub fencing_token: FencingToken,
    /// An operator decided on it: what is cached of it up to this token is void.
    pub resolved: bool,
}

/// What other processes announce, as it is heard here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// An event has changed.
    Changed(Announcement),
    /// Nobody was listening for a while: anything may have changed.
    Missed,
}

/// What was replayed by force, as far as caches have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// The database's clock.
    pub now: Time,
    /// Events, each with the token that its replay drew.
    pub events: Vec<(KeyDigest, FencingToken)>,
    /// Beyond [`REPLAYS_MAX`]: replays with this token or a lower one may be missing. Otherwise [`FencingToken::NONE`].
    pub floor: FencingToken,
    /// Where to read on.
    pub bookmark: Option<Arc<str>>,
}

/// One event with all that was done on it.
#[derive(Clone, Debug, PartialEq)]
pub struct EventHistory {
    /// The event.
    pub event: Event,
    /// The latest attempts, at most [`Self::ATTEMPTS_MAX`], oldest first. Of their results' bodies the latest
    /// [`Self::BODIES_BYTES_MAX`].
    pub attempts: Vec<Attempt>,
    /// The numbers of the attempts whose result's body is left out.
    pub bodies_omitted: BTreeSet<i32>,
    /// The latest resolutions, at most [`Self::RESOLUTIONS_MAX`], oldest first.
    pub resolutions: Vec<Resolution>,
}

impl EventHistory {
    /// Resolutions that are read: of an event that is replayed again and again.
    pub const RESOLUTIONS_MAX: i32 = 500;

    /// Attempts that are read. An event without a cap, or one that is replayed again and again, may have any number, of
    /// 64 KiB each.
    pub const ATTEMPTS_MAX: i32 = 500;

    /// Bytes of bodies of attempts' results that are held. They go into one message with all errors, of 2 KiB each, and
    /// resolutions, and clients take 4 MiB unless told otherwise.
    pub const BODIES_BYTES_MAX: usize = 2 << 20;
}

/// The attempts of one event while they are read, the latest first.
#[derive(Debug, Default)]
struct Attempts {
    found: Vec<Attempt>,
    bytes: usize,
    bodies_omitted: BTreeSet<i32>,
}

impl Attempts {
    /// Adds attempts that are earlier than those it has.
    fn extend(&mut self, earlier: impl IntoIterator<Item = Attempt>) {
        let most = usize::try_from(EventHistory::ATTEMPTS_MAX).unwrap_or(usize::MAX);
        for mut attempt in earlier.into_iter().take(most.saturating_sub(self.found.len())) {
            if let Some(result) = attempt.result.as_mut().filter(|result| !result.body.is_empty()) {
                self.bytes += result.body.len();
                if self.bytes > EventHistory::BODIES_BYTES_MAX {
                    result.body = Bytes::new();
                    self.bodies_omitted.insert(attempt.attempt);
                }
            }
            self.found.push(attempt);
        }
    }

    fn history(mut self, event: Event, resolutions: Vec<Resolution>) -> EventHistory {
        self.found.reverse();
        EventHistory { event, attempts: self.found, bodies_omitted: self.bodies_omitted, resolutions }
    }
}

/// A delivery id that was given with a payload digest: what DELIVERY_MISMATCH is decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) name: DeliveryName,
    pub(crate) payload_digest: Digest,
}

/// What tells deliveries apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DeliveryName {
    pub(crate) tenant: String,
    pub(crate) provider: String,
    pub(crate) delivery_id: String,
}

impl Delivery {
    /// The delivery that a claim names, if it can be compared at all.
    pub(crate) fn of(claim: &Claim) -> Option<Delivery> {
        let (delivery_id, payload_digest) = (claim.delivery_id.clone()?, claim.payload_digest?);
        let (tenant, provider) = (claim.key.tenant.clone(), claim.key.provider.clone());
        Some(Delivery { name: DeliveryName { tenant, provider, delivery_id }, payload_digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{RowId, StoredResult, fixture::claim};

    #[test]
    fn of_the_results_of_many_attempts_the_bodies_of_the_latest_are_held() {
        let event = Event::inserted(&claim("evt_1", "claim"), RowId(1), FencingToken(1), Time(1));
        let of = |number: i32| {
            let bytes = if number % 100 == 0 { 0 } else { 64 << 10 };
            let result = StoredResult { code: 502, body: vec![7; bytes].into(), content_type: String::new() };
            Attempt { attempt: number, result: Some(result), ..event.latest_attempt().unwrap() }
        };
        let mut attempts = Attempts::default();
        // As they are read: the one on the event's row, then those in the archive.
        attempts.extend(Some(of(603)));
        attempts.extend((1..603).rev().map(of));
        let history = attempts.history(event.clone(), Vec::new());
        let numbers: Vec<i32> = history.attempts.iter().map(|attempt| attempt.attempt).collect();
        assert_eq!(numbers, (104..=603).collect::<Vec<_>>());
        let body = |attempt: &Attempt| attempt.result.as_ref().unwrap().body.len();
        assert_eq!(history.attempts.iter().map(body).sum::<usize>(), EventHistory::BODIES_BYTES_MAX);
        // What has no body lacks none.
        let omitted: BTreeSet<i32> = (104..571).filter(|number| number % 100 != 0).collect();
        assert_eq!(history.bodies_omitted, omitted);
    }
}
