//! The state at one moment, and what can happen next.

use std::collections::BTreeSet;

use oncegate_sidecar::{
    cache::Entry,
    event::{Attempt, Event, FencingToken, Resolution, Resolved, Time},
};

use crate::history::History;

/// Which of the events.
pub type EventIndex = usize;
/// Which of the holders.
pub type HolderIndex = usize;

/// One moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// The database's clock.
    pub now: Time,
    /// The last token that the sequence gave out.
    pub token: FencingToken,
    /// What the ledger has of each event.
    pub rows: Vec<Row>,
    /// Who claims and marks.
    pub holders: Vec<Holder>,
    /// Calls that were sent. They stay here: whatever was sent may still arrive, even repeatedly.
    pub sent: BTreeSet<Call>,
    /// What Redis has of each event, and until when.
    pub redis: Vec<Option<(Entry, Time)>>,
    /// The first completion of each event that Redis has had, to which it may go back.
    pub earlier: Vec<Option<Entry>>,
    /// Events of which Redis may have lost a tombstone.
    pub lost: Vec<bool>,
    /// Entries that the sidecar is writing to Redis.
    pub fills: Vec<Fill>,
    /// Resolutions that the sidecar has committed but not answered: their tombstone is still to be written.
    pub tombstones: Vec<Option<Entry>>,
    /// How much of each bounded action has happened.
    pub spent: Spent,
    /// What has happened, for the properties.
    pub history: Vec<History>,
}

/// What the ledger has of one event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Row {
    /// None: it was never seen, or deleted.
    pub event: Option<Event>,
    /// Attempts that have ended.
    pub archive: Vec<Attempt>,
    /// The latest decision of an operator.
    pub resolution: Option<Resolution>,
    /// The token of the latest replay of a completed event.
    pub replayed: FencingToken,
}

/// One who processes events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Holder {
    /// What it is doing about each event.
    pub doing: Vec<Doing>,
}

/// What a holder is doing about one event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Doing {
    /// Nothing.
    #[default]
    Nothing,
    /// It waits for the answer to this claim.
    Asks(u8),
    /// It has the lock.
    Holds {
        /// The claim.
        claim: u8,
        /// The token.
        token: FencingToken,
    },
}

/// A call of a holder to the sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
    /// CheckAndLock.
    Claim {
        /// Who asks.
        holder: HolderIndex,
        /// About what.
        event: EventIndex,
        /// The claim id: no two calls share one, except copies.
        claim: u8,
    },
    /// MarkCompleted or MarkFailed.
    Mark {
        /// About what.
        event: EventIndex,
        /// The lock's claim id.
        claim: u8,
        /// The lock's token.
        token: FencingToken,
        /// Whether it is MarkCompleted.
        completed: bool,
    },
}

/// An entry on its way to Redis.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fill {
    /// Of which event.
    pub event: EventIndex,
    /// The entry.
    pub entry: Entry,
    /// When it ends.
    pub until: Time,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A holder asks for the lock.
    Ask(HolderIndex, EventIndex),
    /// A holder ends its attempt.
    End(HolderIndex, EventIndex, bool),
    /// A call arrives, the cache does not answer, and the ledger does.
    Arrive {
        /// The call.
        call: Call,
        /// Whether the answer gets to the holder.
        answered: bool,
    },
    /// A call arrives, and the transaction fails.
    Fails(Call),
    /// A claim arrives at a sidecar, and Redis answers it.
    FromCache {
        /// The call.
        call: Call,
        /// The sidecar knows everything replayed until now; otherwise, for a moment, nothing of it.
        informed: bool,
    },
    /// One of the fills reaches Redis.
    Fill(usize),
    /// An operator decides.
    Resolve {
        /// About what.
        event: EventIndex,
        /// What becomes of it.
        to: Resolved,
        /// Whether the operator insists.
        force: bool,
    },
    /// The tombstone of a resolution reaches Redis, and the operator gets the answer.
    Tombstone(EventIndex),
    /// Cleanup takes an event.
    Clean(EventIndex),
    /// The database's clock moves.
    Tick,
    /// A holder loses all it knows.
    CrashHolder(HolderIndex),
    /// The sidecar loses all it has in memory.
    CrashSidecar,
    /// Redis loses all it has.
    FlushRedis,
    /// Redis gets back, for ever, what it first had of an event: after a failover, from a snapshot, or through manual
    /// interference.
    RedisGoesBack(EventIndex),
}

/// How much of each bounded action has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Spent {
    /// Claims.
    pub asks: u8,
    /// Resolutions.
    pub resolutions: u8,
    /// Cleanups that took something.
    pub cleanups: u8,
    /// Crashes and flushes.
    pub crashes: u8,
}
