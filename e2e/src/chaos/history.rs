//! What callers saw: for every operation when it began, when it was answered, and how, or that this is unknown.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use oncegate_api::v1::State;

/// How an attempt is reported to have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// MarkCompleted.
    Completed,
    /// MarkFailed, retryable.
    Retryable,
    /// MarkFailed, terminal.
    Terminal,
    /// MarkFailed, unknown.
    Unknown,
}

impl Ending {
    /// The ledger's word for it.
    pub fn outcome(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Retryable => "failed_retryable",
            Self::Terminal => "failed_terminal",
            Self::Unknown => "failed_unknown",
        }
    }
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// CheckAndLock.
    Claim {
        /// The caller's own name of the attempt.
        claim_id: String,
    },
    /// ExtendLock.
    Extend {
        /// The token that the caller believes it holds.
        token: i64,
        /// And its claim.
        claim_id: String,
    },
    /// MarkCompleted and MarkFailed.
    Mark {
        /// The token that the caller believes it holds.
        token: i64,
        /// And its claim.
        claim_id: String,
        /// How the attempt ended.
        ending: Ending,
    },
    /// Resolve, whatever the token.
    Resolve {
        /// The state asked for.
        to: State,
        /// Whether a completed event may be replayed.
        force: bool,
        /// The reason that the ledger records.
        reason: String,
    },
    /// A signed webhook to a gateway.
    Webhook {
        /// Which one.
        gateway: usize,
    },
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The lock.
    Acquired {
        /// Its token.
        token: i64,
        /// Its attempt.
        attempt: i32,
        /// Its end, in microseconds of the database's clock.
        expires: i64,
    },
    /// Somebody else holds the lock, or a pause has not passed.
    InProgress,
    /// Done before.
    AlreadyCompleted {
        /// The token that it was completed with.
        token: i64,
    },
    /// Dead or unknown.
    Refused,
    /// The lock was extended.
    Extended {
        /// Its end, in microseconds of the database's clock.
        expires: i64,
    },
    /// The mark is recorded.
    Marked {
        /// It had already been recorded before.
        repeated: bool,
    },
    /// The resolution stands.
    Resolved {
        /// The event's token after it.
        token: i64,
    },
    /// LOCK_LOST.
    LockLost {
        /// The event's token.
        token: i64,
        /// The event's state, in the ledger's word.
        state: String,
    },
    /// CLAIM_ENDED.
    ClaimEnded,
    /// FINGERPRINT_MISMATCH.
    FingerprintMismatch,
    /// OUTCOME_CONFLICT.
    OutcomeConflict,
    /// STATE_CONFLICT.
    StateConflict,
    /// EVENT_NOT_FOUND.
    NotFound,
    /// Certainly nothing happened: the service said so.
    Nothing,
    /// An answer that no well-formed call may get.
    Defect(String),
    /// The gateway's answer.
    Answered {
        /// Its status.
        status: u16,
        /// Its answer in a word.
        word: String,
    },
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The event.
    pub event: String,
    /// What was asked for.
    pub call: Call,
    /// The path that it took: calls on one path are answered from the same sidecar's memory.
    pub way: Arc<str>,
    /// Its position in the order of beginnings and answers.
    pub invoked: usize,
    /// When that was.
    pub at: Duration,
    /// Its end, in the same order, with the reply. None: the outcome is unknown, and it may take effect at any later
    /// time.
    pub returned: Option<(usize, Duration, Reply)>,
}

impl Operation {
    /// What came back, if anything did.
    pub fn reply(&self) -> Option<&Reply> {
        self.returned.as_ref().map(|(_, _, reply)| reply)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>6} {:>10.6}  {:?} {}", self.invoked, self.at.as_secs_f64(), self.call, self.way)?;
        match &self.returned {
            Some((place, at, reply)) => write!(f, "\n{:>6} {:>10.6}      {reply:?}", place, at.as_secs_f64()),
            None => f.write_str("\n                       unknown"),
        }
    }
}

/// What reached the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The event.
    pub event: String,
    /// The attempt's token.
    pub token: i64,
    /// Its position in the same order as the operations.
    pub place: usize,
    /// When that was.
    pub at: Duration,
    /// Whether the application applied the effect.
    pub applied: bool,
}

impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let applied = if self.applied { "applied" } else { "not applied" };
        write!(f, "{:>6} {:>10.6}  delivered with {}, {applied}", self.place, self.at.as_secs_f64(), self.token)
    }
}

/// The record, shared by everybody who adds to it.
#[derive(Clone, Debug)]
pub struct Recorder {
    start: Instant,
    record: Arc<Mutex<Record>>,
}

#[derive(Debug, Default)]
struct Record {
    places: usize,
    operations: Vec<Operation>,
    given_up: usize,
    deliveries: Vec<Delivery>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { start: Instant::now(), record: Arc::default() }
    }
}

impl Recorder {
    fn record(&self) -> MutexGuard<'_, Record> {
        // Held for a push: whoever panicked with it left nothing half-done.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation begins. Returns its number.
    pub fn invoke(&self, event: &str, call: Call) -> usize {
        self.invoke_by("", event, call)
    }

    /// An operation begins, on a path to one sidecar. Returns its number.
    pub fn invoke_by(&self, way: &str, event: &str, call: Call) -> usize {
        let at = self.start.elapsed();
        let mut record = self.record();
        record.places += 1;
        let invoked = record.places;
        record.operations.push(Operation {
            event: event.to_owned(),
            call,
            way: way.into(),
            invoked,
            at,
            returned: None,
        });
        record.operations.len() - 1
    }

    /// The operation of this number was answered.
    pub fn answer(&self, number: usize, reply: Reply) {
        let at = self.start.elapsed();
        let mut record = self.record();
        record.places += 1;
        let place = record.places;
        record.operations[number].returned = Some((place, at, reply));
    }

    /// Nobody waits for this operation's answer any more: its end stays unknown.
    pub fn give_up(&self) {
        self.record().given_up += 1;
    }

    /// Whether the record so far can prove anything: some operation has an unknown end, and something has reached the
    /// application. A few seconds of faults may have affected nobody.
    pub fn has_met_faults(&self) -> bool {
        let record = self.record();
        record.given_up > 0 && !record.deliveries.is_empty()
    }

    /// Something reached the application.
    pub fn deliver(&self, event: &str, token: i64, applied: bool) {
        let at = self.start.elapsed();
        let mut record = self.record();
        record.places += 1;
        let place = record.places;
        record.deliveries.push(Delivery { event: event.to_owned(), token, place, at, applied });
    }

    /// Everything so far.
    pub fn operations(&self) -> Vec<Operation> {
        self.record().operations.clone()
    }

    /// Everything so far that reached the application.
    pub fn deliveries(&self) -> Vec<Delivery> {
        self.record().deliveries.clone()
    }
}
