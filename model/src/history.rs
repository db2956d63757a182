//! What has happened to one event, as seen by an observer who knows nothing of the rules, and the judgement on it.

use std::collections::BTreeSet;

use oncegate_sidecar::event::{Event, FencingToken, State, Time};

use crate::world::Row;

/// A violated invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Violation {
    /// I1.
    TokenOrder,
    /// I2.
    TwoHolders,
    /// I3.
    StaleMark,
    /// I4.
    SecondCompletion,
    /// S4.
    GhostLock,
    /// I9 and I6: somebody was told "completed" about an event that is not, or no longer.
    ToldCompleted,
    /// Cleanup took an event that it must not take.
    OpenDeleted,
}

/// A grant as answered to its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Grant {
    token: FencingToken,
    claim: u8,
    until: Time,
    ended: bool,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct History {
    /// The highest token ever granted or drawn by a resolution.
    highest: FencingToken,
    /// The latest grant, unless an operator has closed it or Cleanup taken the event.
    current: Option<Grant>,
    /// Tokens of the grants since the event was made.
    granted: Vec<FencingToken>,
    /// Claims whose attempt has ended.
    ended: BTreeSet<u8>,
    /// The token under which the event is completed, if it is.
    completed: Option<FencingToken>,
    /// Every token under which it was completed.
    completions: BTreeSet<FencingToken>,
    /// An operator was told that completions up to this token are no longer answered from the cache.
    replayed: FencingToken,
    /// A lock was taken over after its expiry.
    pub takeover: bool,
    /// A Mark was accepted after its lock's expiry.
    pub late_mark: bool,
    /// A completed event was replayed and completed again.
    pub replay: bool,
    /// A grant followed a cleanup.
    pub reborn: bool,
    /// A claim was answered from the cache.
    pub cached: bool,
    /// An expiry at the cap.
    pub buried: bool,
    cleaned: bool,
    replays: bool,
    violations: BTreeSet<Violation>,
}

impl History {
    /// Whether an invariant was broken.
    pub fn has(&self, violation: Violation) -> bool {
        self.violations.contains(&violation)
    }

    /// Whether the event is completed.
    pub fn is_completed(&self) -> bool {
        self.completed.is_some()
    }

    fn check(&mut self, holds: bool, violation: Violation) {
        if !holds {
            self.violations.insert(violation);
        }
    }

    /// The ledger has committed a grant.
    pub(crate) fn granted(&mut self, claim: u8, token: FencingToken, until: Time, now: Time) {
        // The same lock, reported once more (S4).
        if let Some(current) = self.current
            && current.claim == claim
            && current.token == token
            && !current.ended
        {
            return;
        }
        self.check(token > self.highest, Violation::TokenOrder);
        self.check(!self.ended.contains(&claim), Violation::GhostLock);
        self.check(self.completed.is_none(), Violation::SecondCompletion);
        if let Some(current) = self.current {
            self.check(current.ended || current.until <= now, Violation::TwoHolders);
            self.takeover |= !current.ended && current.claim != claim;
            if current.claim != claim {
                self.ended.insert(current.claim);
            }
        }
        self.reborn |= self.cleaned;
        self.highest = self.highest.max(token);
        self.granted.push(token);
        self.current = Some(Grant { token, claim, until, ended: false });
    }

    /// The ledger has committed a Mark.
    pub(crate) fn marked(&mut self, claim: u8, token: FencingToken, completed: bool, now: Time) {
        let current = self.current.filter(|current| current.token == token && current.claim == claim);
        self.check(current.is_some_and(|current| !current.ended), Violation::StaleMark);
        self.check(self.completed.is_none(), Violation::SecondCompletion);
        self.late_mark |= current.is_some_and(|current| current.until <= now);
        self.ended.insert(claim);
        if let Some(current) = &mut self.current {
            current.ended = true;
        }
        if completed {
            self.replay |= self.replays;
            self.completed = Some(token);
            self.completions.insert(token);
        }
    }

    /// The ledger has committed an operator's decision.
    pub(crate) fn resolved(&mut self, before: State, after: &Event, forced: bool) {
        self.check(after.fencing_token > self.highest, Violation::TokenOrder);
        self.highest = self.highest.max(after.fencing_token);
        if before == State::Completed {
            // This state can only be left by an operator who uses force (I4).
            self.check(forced, Violation::SecondCompletion);
            self.replays = true;
        }
        self.completed = (after.state == State::Completed).then_some(after.fencing_token);
        self.completions.extend(self.completed);
        if let Some(current) = self.current.take() {
            self.ended.insert(current.claim);
        }
    }

    /// The operator was told that the decision stands.
    pub(crate) fn told_of_resolution(&mut self, token: FencingToken) {
        self.replayed = self.replayed.max(token);
    }

    /// A caller was told by the ledger that the event is completed.
    pub(crate) fn told_completed(&mut self) {
        self.check(self.completed.is_some(), Violation::ToldCompleted);
    }

    /// A caller was told by the cache that the event is completed, under this token.
    pub(crate) fn told_from_cache(&mut self, token: FencingToken) {
        self.cached = true;
        let holds = self.may_be_cached(token);
        self.check(holds, Violation::ToldCompleted);
    }

    /// Whether the cache may say that the event was completed under this token: it was, and no operator who replayed it
    /// has been told that this is done.
    pub fn may_be_cached(&self, token: FencingToken) -> bool {
        self.completed == Some(token) || (self.completions.contains(&token) && token > self.replayed)
    }

    /// Cleanup has deleted the event.
    pub(crate) fn deleted(&mut self, state: State) {
        self.check(!matches!(state, State::Pending | State::Processing), Violation::OpenDeleted);
        self.cleaned = true;
        self.current = None;
        self.completed = None;
        self.replays = false;
        self.granted.clear();
        self.completions.clear();
        // The knowledge of ended claims goes with the archive (S4).
        self.ended.clear();
    }

    /// I10: attempts are numbered without gaps, and match the grants.
    pub fn attempts_are_dense(&self, row: &Row) -> bool {
        let Some(event) = &row.event else { return row.archive.is_empty() };
        let attempts: Vec<_> = row.archive.iter().cloned().chain(event.latest_attempt()).collect();
        attempts.iter().map(|attempt| attempt.fencing_token).eq(self.granted.iter().copied())
            && attempts.iter().map(|attempt| attempt.attempt).eq(1..=event.attempt_count)
    }
}
