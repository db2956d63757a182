//! States and outcomes, and the one word that each has in SQL, logs and messages.

use std::fmt;

/// Where an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// An operator asked for another attempt. Leaves by CheckAndLock or Resolve.
    Pending,
    /// One caller holds the lock. Leaves by a Mark, by a takeover after expiry, or, expired at the cap, to dead.
    /// If the holder dies, the expiry lets the next caller in.
    Processing,
    /// Done. Leaves only by a forced Resolve, or by Cleanup, as the next ones do.
    Completed,
    /// The last attempt failed. Leaves by CheckAndLock once `retry_time` has passed, or by Resolve.
    Failed,
    /// The last attempt may have taken effect. Leaves only by Resolve.
    Unknown,
    /// Refused for good, or out of attempts. Leaves by Resolve, or by a late Mark where an expiry at the cap led here.
    Dead,
}

impl State {
    /// Every state, in the order of the API, which is that of the declaration.
    pub const ALL: [State; 6] =
        [State::Pending, State::Processing, State::Completed, State::Failed, State::Unknown, State::Dead];

    /// The word in SQL and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Processing => "processing",
            State::Completed => "completed",
            State::Failed => "failed",
            State::Unknown => "unknown",
            State::Dead => "dead",
        }
    }

    /// Whether Cleanup may delete an event that stands there: nobody is at work, and nobody is about to be.
    pub fn is_deletable(self) -> bool {
        match self {
            State::Pending | State::Processing => false,
            State::Completed | State::Failed | State::Unknown | State::Dead => true,
        }
    }

    /// The state that a word names.
    pub fn parse(word: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It has not.
    Running,
    /// Accepted MarkCompleted.
    Completed,
    /// Accepted MarkFailed, retryable.
    FailedRetryable,
    /// Accepted MarkFailed, terminal.
    FailedTerminal,
    /// Accepted MarkFailed, unknown.
    FailedUnknown,
    /// The lock expired and the event was taken over, resolved, or buried at the cap.
    LockExpired,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Outcome; 6] = [
        Outcome::Running,
        Outcome::Completed,
        Outcome::FailedRetryable,
        Outcome::FailedTerminal,
        Outcome::FailedUnknown,
        Outcome::LockExpired,
    ];

    /// The word in SQL and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Running => "running",
            Outcome::Completed => "completed",
            Outcome::FailedRetryable => "failed_retryable",
            Outcome::FailedTerminal => "failed_terminal",
            Outcome::FailedUnknown => "failed_unknown",
            Outcome::LockExpired => "lock_expired",
        }
    }

    /// The outcome that a word names.
    pub fn parse(word: &str) -> Option<Outcome> {
        Outcome::ALL.into_iter().find(|outcome| outcome.as_str() == word)
    }

    /// Whether the holder reported a failure.
    pub fn is_failure(self) -> bool {
        matches!(self, Outcome::FailedRetryable | Outcome::FailedTerminal | Outcome::FailedUnknown)
    }

    /// Whether the holder reported an end at all.
    pub fn is_marked(self) -> bool {
        self == Outcome::Completed || self.is_failure()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
