//! The domain: what an event is, what may be asked of it, and the rules by which it changes. No I/O, no clock, no
//! framework types: everything here can be tested as a table.

pub mod apply;
#[cfg(test)]
pub(crate) mod fixture;
mod key_digest;
pub mod metadata;
mod number;
mod text;
pub mod time;
pub mod transition;

use std::{fmt, num::NonZeroU32};

pub use key_digest::KeyDigest;
pub use number::{FencingToken, RowId};
pub use text::{Outcome, State};
pub use time::{Micros, Time};

/// A SHA-256 digest, as fingerprints and payload digests are.
pub type Digest = [u8; 32];

/// Names one event. The three parts together are unique (L1).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Separates customers, or live from test mode. Never empty: "default" where the caller gave none.
    pub tenant: String,
    /// Who sent the event.
    pub provider: String,
    /// The provider's identifier of the event.
    pub event_id: String,
}

/// What the processing of an event ended with, as the caller reported it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredResult {
    /// A status in the caller's own terms.
    pub code: i32,
    /// At most 64 KiB.
    pub body: bytes::Bytes,
    /// May be empty.
    pub content_type: String,
}

/// One event as the ledger holds it, with its latest attempt (S9).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    /// Its row in the ledger.
    pub row: RowId,
    /// Its name.
    pub key: Key,
    /// The provider's type of the event.
    pub event_type: String,
    /// Where it is.
    pub state: State,
    /// Attempts granted so far.
    pub attempt_count: i32,
    /// Attempts that the cap no longer counts, because an operator asked for another try after them (S7).
    pub attempts_forgiven: i32,
    /// Calls answered with anything but the lock, as far as they are flushed.
    pub duplicate_count: i64,
    /// Calls that came with another fingerprint or payload digest, as far as they are flushed.
    pub mismatch_count: i64,
    /// When the last of them came.
    pub last_mismatch_time: Option<Time>,
    /// The token of the latest grant or resolution. Strictly increases.
    pub fencing_token: FencingToken,
    /// When the event was first seen.
    pub create_time: Time,
    /// When its state, lock or token last changed.
    pub update_time: Time,
    /// When it reached its current completed, dead or unknown state.
    pub end_time: Option<Time>,
    /// After a failure: when the next attempt may be granted. None: at once.
    pub retry_time: Option<Time>,
    /// What must be the same for a call to mean this event (S8).
    pub fingerprint: Option<Digest>,
    /// JSON object of the call that created the event.
    pub metadata: Option<String>,
    /// JSON object that completions added; read through [`metadata::merged`].
    pub completion_metadata: Option<String>,
    /// What the latest ended attempt, or the operator, left.
    pub result: Option<StoredResult>,
    /// What the latest failed attempt reported.
    pub last_error: Option<String>,
    /// The latest attempt, unless a resolution or a burial after a failure has closed it: then all attempts are in the archive.
    pub latest: Option<Latest>,
}

/// The attempt that stands on the event's own row. Its number is `attempt_count`, its token the event's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Latest {
    /// Chosen by the caller, or by the service where the caller gave none.
    pub claim_id: String,
    /// Who holds the lock, for people.
    pub holder: String,
    /// When the lock was granted.
    pub start_time: Time,
    /// When it permits a takeover.
    pub lock_expire_time: Time,
    /// How the attempt ended, or [`Outcome::Running`].
    pub outcome: Outcome,
    /// SHA-256 of the payload that came with the claim.
    pub payload_digest: Option<Digest>,
}

impl Latest {
    /// The attempt that a claim is granted at `now`.
    pub fn granted(claim: &Claim, now: Time) -> Latest {
        Latest {
            claim_id: claim.claim_id.clone(),
            holder: claim.holder.clone(),
            start_time: now,
            lock_expire_time: now.plus(claim.lock_duration),
            outcome: Outcome::Running,
            payload_digest: claim.payload_digest,
        }
    }
}

impl Event {
    /// A new event with its first attempt.
    pub fn inserted(claim: &Claim, row: RowId, fencing_token: FencingToken, now: Time) -> Event {
        Event {
            row,
            key: claim.key.clone(),
            event_type: claim.event_type.clone(),
            state: State::Processing,
            attempt_count: 1,
            attempts_forgiven: 0,
            duplicate_count: 0,
            mismatch_count: 0,
            last_mismatch_time: None,
            fencing_token,
            create_time: now,
            update_time: now,
            end_time: None,
            retry_time: None,
            fingerprint: claim.fingerprint,
            metadata: claim.metadata.clone(),
            completion_metadata: None,
            result: None,
            last_error: None,
            latest: Some(Latest::granted(claim, now)),
        }
    }

    /// Whether a claim comes with another payload digest than the event's latest attempt.
    pub fn payload_differs(&self, claim: &Claim) -> bool {
        let known = self.latest.as_ref().and_then(|latest| latest.payload_digest);
        matches!((known, claim.payload_digest), (Some(known), Some(given)) if known != given)
    }

    /// How many attempts are in the archive rather than on the row.
    pub fn archived_count(&self) -> i32 {
        self.attempt_count - i32::from(self.latest.is_some())
    }

    /// Whether the archive is where the attempt that was granted this token has its record, if there ever was one.
    pub fn is_archived(&self, fencing_token: FencingToken) -> bool {
        self.archived_count() > 0 && (self.latest.is_none() || self.fencing_token != fencing_token)
    }

    /// Whether one more attempt would exceed the cap, if there is one (S7).
    pub fn capped(&self, attempts_max: Option<NonZeroU32>) -> bool {
        let counted = u32::try_from(self.attempt_count - self.attempts_forgiven).unwrap_or_default();
        attempts_max.is_some_and(|max| counted >= max.get())
    }

    /// The latest attempt in the form that the archive has.
    pub fn latest_attempt(&self) -> Option<Attempt> {
        let latest = self.latest.as_ref()?;
        let ended = latest.outcome != Outcome::Running;
        Some(Attempt {
            attempt: self.attempt_count,
            fencing_token: self.fencing_token,
            claim_id: latest.claim_id.clone(),
            holder: latest.holder.clone(),
            start_time: latest.start_time,
            end_time: ended.then(|| self.end_time.unwrap_or(self.update_time)),
            outcome: latest.outcome,
            error: if latest.outcome.is_failure() { self.last_error.clone() } else { None },
            payload_digest: latest.payload_digest,
            result: if latest.outcome.is_marked() { self.result.clone() } else { None },
        })
    }
}

/// One attempt: one lock granted, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Attempt {
    /// 1 for the first; dense per event (I10).
    pub attempt: i32,
    /// The token of this grant.
    pub fencing_token: FencingToken,
    /// The claim that it was granted to.
    pub claim_id: String,
    /// Who held the lock.
    pub holder: String,
    /// When the lock was granted.
    pub start_time: Time,
    /// When the attempt ended.
    pub end_time: Option<Time>,
    /// How.
    pub outcome: Outcome,
    /// What it reported when it failed.
    pub error: Option<String>,
    /// SHA-256 of the payload that came with the claim.
    pub payload_digest: Option<Digest>,
    /// What it left.
    pub result: Option<StoredResult>,
}

/// What an operator did by hand.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Resolution {
    /// The state it was taken from.
    pub from_state: State,
    /// The state it was put into.
    pub to_state: State,
    /// The token that the decision was made on.
    pub from_fencing_token: FencingToken,
    /// The token that it drew.
    pub fencing_token: FencingToken,
    /// Why.
    pub reason: String,
    /// Who.
    pub actor: String,
    /// When.
    pub time: Time,
}

/// CheckAndLock, validated.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The event.
    pub key: Key,
    /// The provider's type of the event.
    pub event_type: String,
    /// Never empty: chosen by the service where the caller gave none.
    pub claim_id: String,
    /// Who asks, for people.
    pub holder: String,
    /// How long the lock lasts (S6).
    pub lock_duration: Micros,
    /// What must be the same for the call to mean this event (S8).
    pub fingerprint: Option<Digest>,
    /// JSON object, kept only by the call that creates the event.
    pub metadata: Option<String>,
    /// SHA-256 of the payload as received.
    pub payload_digest: Option<Digest>,
    /// The sender's identifier of this delivery.
    pub delivery_id: Option<String>,
    /// At most this many attempts; None: no cap (S7).
    pub attempts_max: Option<NonZeroU32>,
    /// The caller waits on: an answer of "in progress" is not its last, and must not be counted as a duplicate or a
    /// mismatch.
    pub waiting: bool,
}

/// A payload that is at hand whole: its digest costs more than most of the rest of a duplicate, and is not always needed.
#[derive(Clone, Copy)]
pub struct Payload<'a> {
    /// As received.
    pub bytes: &'a [u8],
    /// SHA-256 of that.
    pub digest: &'a dyn Fn() -> Digest,
}

/// MarkCompleted or MarkFailed, validated.
#[derive(Clone, Debug)]
pub struct Mark {
    /// The event.
    pub key: Key,
    /// The token of the lock that the attempt was granted.
    pub fencing_token: FencingToken,
    /// Must match the attempt's as well, where given (S2).
    pub claim_id: Option<String>,
    /// How the attempt ended.
    pub ending: Ending,
    /// What it left.
    pub result: Option<StoredResult>,
    /// As in [`Claim`].
    pub attempts_max: Option<NonZeroU32>,
}

/// How an attempt ended, as its holder reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It took effect.
    Completed {
        /// JSON object, merged into the event's metadata by top-level key.
        metadata: Option<String>,
    },
    /// It did not, or nobody knows.
    Failed {
        /// What may be done next.
        kind: FailureKind,
        /// For people.
        error: Option<String>,
        /// No attempt is granted before this has passed. None: at once.
        retry_after: Option<Micros>,
    },
}

impl Ending {
    /// The outcome that this ending is recorded as.
    pub fn outcome(&self) -> Outcome {
        match self {
            Ending::Completed { .. } => Outcome::Completed,
            Ending::Failed { kind: FailureKind::Retryable, .. } => Outcome::FailedRetryable,
            Ending::Failed { kind: FailureKind::Terminal, .. } => Outcome::FailedTerminal,
            Ending::Failed { kind: FailureKind::Unknown, .. } => Outcome::FailedUnknown,
        }
    }
}

/// What may be done after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The next attempt may be granted.
    Retryable,
    /// Trying again cannot help.
    Terminal,
    /// It may have taken effect.
    Unknown,
}

/// ExtendLock, validated.
#[derive(Clone, Debug)]
pub struct Extend {
    /// The event.
    pub key: Key,
    /// The token of the lock.
    pub fencing_token: FencingToken,
    /// Must match as well, where given.
    pub claim_id: Option<String>,
    /// Counted from now; never shortens.
    pub lock_duration: Micros,
}

/// Resolve, validated.
#[derive(Clone, Debug)]
pub struct Resolve {
    /// The event.
    pub key: Key,
    /// The token that the decision was made on; None: any.
    pub fencing_token: Option<FencingToken>,
    /// Where the operator puts the event.
    pub to: Resolved,
    /// Permits to replay a completed event.
    pub force: bool,
    /// Why.
    pub reason: String,
    /// Who.
    pub actor: String,
    /// What a completed event is to answer.
    pub result: Option<StoredResult>,
}

/// The states that an operator may put an event into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// Try again.
    Pending,
    /// It did take effect.
    Completed,
    /// Never again.
    Dead,
}

impl Resolved {
    /// As a state.
    pub fn state(self) -> State {
        match self {
            Resolved::Pending => State::Pending,
            Resolved::Completed => State::Completed,
            Resolved::Dead => State::Dead,
        }
    }
}

/// A lock that was granted or extended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Grows with every grant of the same event.
    pub fencing_token: FencingToken,
    /// 1 for the first attempt.
    pub attempt: i32,
    /// In the database's time.
    pub expire_time: Time,
    /// What was left of it when the database answered.
    pub remaining: Micros,
    /// The claim that it was granted to.
    pub claim_id: String,
}

/// What CheckAndLock decided. Each is a normal answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The caller holds the lock.
    Acquired(Lock),
    /// Somebody else holds it, or a pause has not passed.
    InProgress {
        /// When asking again is worth it.
        retry_after: Micros,
    },
    /// The event is done.
    AlreadyCompleted,
    /// The event is held for an operator.
    Refused,
}

/// What CheckAndLock is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// What was decided.
    pub decision: Decision,
    /// The lock was granted by this call; else it is the one that its claim had already, or there is none.
    pub granted: bool,
    /// The event as it stands after the call.
    pub event: Event,
    /// The call came with another payload digest than the event's latest attempt before it: counted, never refused.
    pub payload_changed: bool,
    /// The database's clock when it answered.
    pub now: Time,
}

/// What MarkCompleted and MarkFailed are answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The event as it stands after the call.
    pub event: Event,
    /// This very ending had been recorded before.
    pub repeated: bool,
}

/// Why the ledger refuses a call. The ledger is well and nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The event was first claimed with another fingerprint (S8).
    #[error("the event was first claimed with another fingerprint")]
    FingerprintMismatch,
    /// The delivery id was seen before with another payload digest.
    #[error("the delivery id was seen before with another payload digest")]
    DeliveryMismatch,
    /// The claim id belongs to an attempt that has ended (S4).
    #[error("the claim id belongs to an attempt that has ended")]
    ClaimEnded,
    /// The token or the claim id is not the event's any more (S3).
    #[error("{loss}: the event is {state} with fencing token {fencing_token}")]
    LockLost {
        /// In which way.
        loss: Loss,
        /// The event's state.
        state: State,
        /// The event's token.
        fencing_token: FencingToken,
    },
    /// Another outcome was recorded for this attempt (S3).
    #[error("the attempt's outcome was recorded before, and it was {recorded}")]
    OutcomeConflict {
        /// What stands.
        recorded: Outcome,
    },
    /// The event's state does not permit the resolution.
    #[error("an event that is {from} cannot be resolved to {to}{obstacle}")]
    StateConflict {
        /// The event's state.
        from: State,
        /// What was asked for.
        to: State,
        /// What stands in the way.
        obstacle: Obstacle,
    },
    /// No such event.
    #[error("no such event")]
    NotFound,
}

/// What became of the lock that a call means, or what is wrong with the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The event has drawn another token: somebody took it over, or an operator decided on it.
    TakenOver,
    /// The token is the event's, and its attempt is not running any more.
    Ended,
    /// The token is the event's, and its attempt has another claim id than the call gives.
    OtherClaim,
    /// Nobody's lock: an operator decided on an event that has changed since.
    Changed,
    /// Nor here: the very decision was carried out before, without a token, and the event has changed since.
    Followed,
}

impl fmt::Display for Loss {
    /// The beginning of the sentence that tells of the refusal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Loss::TakenOver => "the lock was lost",
            Loss::Ended => {
                "the attempt with this fencing token is not running any more, so its lock cannot be extended"
            }
            Loss::OtherClaim => "the claim id is not that of the attempt with this fencing token",
            Loss::Changed => "the decision was made on another fencing token than the event has now",
            Loss::Followed => {
                "this very decision was carried out before, and the event has changed since; to make it again, name the fencing \
                 token that it is made on, or another reason"
            }
        })
    }
}

/// What an event's state has against a resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// It is completed, and taking that back was not forced.
    NotForced,
    /// It is completed, and a resolution can only take that back.
    Completed,
    /// Its lock is live, so that somebody may be at work.
    LockLive,
    /// It was resolved to this very state before, and with something else. What stands is what was recorded then.
    Resolved {
        /// By somebody else.
        actor: bool,
        /// For another reason.
        reason: bool,
        /// With another result.
        result: bool,
    },
}

impl fmt::Display for Obstacle {
    /// The end of the sentence that tells of the refusal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Obstacle::NotForced => f.write_str("; only with force"),
            Obstacle::Completed => f.write_str("; a completed event can only be replayed, by pending with force"),
            Obstacle::LockLive => f.write_str(" while its lock is live"),
            Obstacle::Resolved { actor, reason, result } => {
                let all = [(actor, "actor"), (reason, "reason"), (result, "result")];
                let other: Vec<&str> = all.iter().filter(|(differs, _)| *differs).map(|(_, what)| *what).collect();
                write!(
                    f,
                    ": it was before, with another {}, which stands; see its history",
                    other.join(" and another ")
                )
            }
        }
    }
}
