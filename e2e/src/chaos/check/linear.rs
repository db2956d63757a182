//! I13: the calls on one event could have happened one after the other, each between its beginning and its answer.
//!
//! Checked by stateright's tester against the event's states, which are specified independently here. Time is left out of them:
//! where the rules ask whether a lock has expired or a pause has passed, either is possible, and the callers' answers show
//! which it was (I2 checks the expiries against the database's times). An operation of unknown outcome stays in flight for
//! ever: the tester may place it anywhere after its beginning, or nowhere. What such an operation did is taken from the
//! ledger's archive, and one that left no trace there did nothing: this only makes the check stricter, and keeps the search
//! small.
//!
//! One outdated answer is permitted, because it is documented: after a completed event was replayed by force, a sidecar other
//! than the one that did it may call it completed until it has read about that, for [`BEHIND_MAX`] at most (C7). [`stale`] says
//! how often, and how late.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use oncegate_api::v1::State;
use stateright::semantics::{ConsistencyTester as _, LinearizabilityTester, SequentialSpec};

use super::{Findings, One, Violation};
use crate::chaos::history::{Call, Operation, Reply};

/// How long a sidecar's cache may lag behind a replay that somebody knows of. Not a guess: after this it stops answering by
/// itself.
const BEHIND_MAX: Duration = Duration::from_secs(2);

/// Steps of the search after which a history counts as undecided.
const STEPS_MAX: u64 = 200_000;

/// How one event's history turned out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is linearizable.
    Linearizable,
    /// It is not.
    Broken(Violation),
    /// The search was given up, or gateways, whose calls are not in the record, took part.
    Undecided,
}

/// A call, the tokens that it can have drawn if its answer is unknown, and whether its answer may come from a cache that lags
/// behind.
#[derive(Clone, Debug)]
struct Step {
    call: Call,
    drawn: Vec<i64>,
    behind: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Latest {
    claim_id: String,
    outcome: &'static str,
}

#[derive(Clone, Debug)]
struct Machine {
    /// Empty: the event is unknown.
    state: &'static str,
    token: i64,
    attempts: i32,
    latest: Option<Latest>,
    archive: BTreeMap<i64, Latest>,
    resolved: bool,
    /// Completions that were undone by force.
    undone: Vec<i64>,
    steps: Arc<AtomicU64>,
}

impl Machine {
    fn new(steps: Arc<AtomicU64>) -> Self {
        Self {
            state: "",
            token: 0,
            attempts: 0,
            latest: None,
            archive: BTreeMap::new(),
            resolved: false,
            undone: Vec::new(),
            steps,
        }
    }

    fn exhausted(&self) -> bool {
        self.steps.fetch_add(1, Relaxed) >= STEPS_MAX
    }

    /// The latest attempt is replaced by something else.
    fn archive(&mut self) {
        if let Some(mut latest) = self.latest.take() {
            if latest.outcome == "running" {
                latest.outcome = "lock_expired";
            }
            self.archive.insert(self.token, latest);
        }
    }

    fn own(&self, claim_id: &str) -> Option<&Latest> {
        self.latest.as_ref().filter(|latest| latest.claim_id == claim_id)
    }

    fn ended(&self, claim_id: &str) -> bool {
        match self.own(claim_id) {
            Some(latest) => latest.outcome != "running",
            None => self.archive.values().any(|archived| archived.claim_id == claim_id),
        }
    }

    /// Whether a claim can be granted a new token, assuming that any lock has expired and any pause has passed.
    fn grantable(&self, claim_id: &str) -> bool {
        !self.ended(claim_id) && matches!(self.state, "" | "pending" | "processing" | "failed")
    }

    fn grant(&mut self, claim_id: &str, token: i64) {
        self.archive();
        self.state = "processing";
        self.token = token;
        self.attempts += 1;
        self.latest = Some(Latest { claim_id: claim_id.to_owned(), outcome: "running" });
        self.resolved = false;
    }

    /// Whether this token and claim are the current, running attempt's.
    fn holds(&self, token: i64, claim_id: &str) -> bool {
        token == self.token && self.own(claim_id).is_some_and(|latest| latest.outcome == "running")
    }

    fn end(&mut self, outcome: &'static str) {
        if let Some(latest) = &mut self.latest {
            latest.outcome = outcome;
        }
        self.state = match outcome {
            "completed" => "completed",
            "failed_retryable" => "failed",
            "failed_terminal" => "dead",
            _ => "unknown",
        };
    }

    fn resolve(&mut self, to: &'static str, token: i64) {
        if self.state == "completed" {
            self.undone.push(self.token);
        }
        self.archive();
        self.state = to;
        self.token = token;
        self.resolved = true;
    }

    fn resolvable(&self, to: &str, force: bool) -> bool {
        match self.state {
            "" => false,
            "completed" => to == "pending" && force,
            // Processing: assuming that the lock has expired.
            _ => true,
        }
    }

    fn lost(&self, reply: &Reply) -> bool {
        matches!(reply, Reply::LockLost { token, state } if *token == self.token && state == self.state)
    }

    fn claimed(&mut self, claim_id: &str, behind: bool, reply: &Reply) -> bool {
        match reply {
            // Changes nothing; `fingerprints` checks whether it was right.
            Reply::FingerprintMismatch => !self.state.is_empty(),
            Reply::ClaimEnded => self.ended(claim_id),
            _ if self.ended(claim_id) => false,
            Reply::Acquired { token, attempt, .. } if *token == self.token => {
                self.holds(*token, claim_id) && *attempt == self.attempts
            }
            Reply::Acquired { token, attempt, .. } => {
                let granted = self.grantable(claim_id) && *token > self.token && *attempt == self.attempts + 1;
                if granted {
                    self.grant(claim_id, *token);
                }
                granted
            }
            Reply::InProgress => matches!(self.state, "processing" | "failed") && self.own(claim_id).is_none(),
            Reply::AlreadyCompleted { token } => {
                (self.state == "completed" && *token == self.token) || (behind && self.undone.contains(token))
            }
            Reply::Refused => matches!(self.state, "unknown" | "dead"),
            _ => false,
        }
    }

    fn marked(&mut self, token: i64, claim_id: &str, outcome: &'static str, reply: &Reply) -> bool {
        if self.state.is_empty() {
            return *reply == Reply::NotFound;
        }
        if self.holds(token, claim_id) {
            // A batch that the ledger ran twice may report its own work as repeated.
            let accepted = matches!(reply, Reply::Marked { .. });
            if accepted {
                self.end(outcome);
            }
            return accepted;
        }
        let recorded = if token == self.token { self.latest.as_ref() } else { self.archive.get(&token) };
        match recorded {
            Some(recorded) if recorded.claim_id != claim_id => self.lost(reply),
            Some(recorded) if recorded.outcome == outcome => *reply == Reply::Marked { repeated: true },
            Some(_) if token == self.token => *reply == Reply::OutcomeConflict,
            _ => self.lost(reply),
        }
    }

    fn resolved(&mut self, to: &'static str, force: bool, reply: &Reply) -> bool {
        match reply {
            Reply::NotFound => self.state.is_empty(),
            // The decision has already been made.
            Reply::Resolved { token } if *token == self.token => self.resolved && self.state == to,
            Reply::Resolved { token } => {
                let possible = self.resolvable(to, force) && *token > self.token;
                if possible {
                    self.resolve(to, *token);
                }
                possible
            }
            // Each call has a reason of its own, so that none is the one that stands, unless it is that one again.
            Reply::StateConflict => {
                self.state == "processing" || self.state == "completed" || self.resolved && self.state == to
            }
            _ => false,
        }
    }
}

impl SequentialSpec for Machine {
    type Op = Step;
    type Ret = Reply;

    /// What an operation of unknown outcome does, if assumed to have happened here.
    fn invoke(&mut self, step: &Step) -> Reply {
        // The token that it drew: tokens of one event grow, so it is the first one larger than the event's.
        let drawn = step.drawn.iter().copied().find(|token| *token > self.token);
        match (&step.call, drawn) {
            (Call::Claim { claim_id }, Some(token)) if self.grantable(claim_id) => self.grant(claim_id, token),
            (Call::Mark { token, claim_id, ending }, _) if self.holds(*token, claim_id) => self.end(ending.outcome()),
            (Call::Resolve { to, force, .. }, Some(token)) if self.resolvable(word(*to), *force) => {
                self.resolve(word(*to), token);
            }
            _ => {}
        }
        Reply::Nothing
    }

    fn is_valid_step(&mut self, step: &Step, reply: &Reply) -> bool {
        if self.exhausted() {
            return false;
        }
        match &step.call {
            Call::Claim { claim_id } => self.claimed(claim_id, step.behind, reply),
            Call::Extend { token, claim_id } => match reply {
                Reply::Extended { .. } => self.holds(*token, claim_id),
                Reply::NotFound => self.state.is_empty(),
                _ => !self.holds(*token, claim_id) && self.lost(reply),
            },
            Call::Mark { token, claim_id, ending } => self.marked(*token, claim_id, ending.outcome(), reply),
            Call::Resolve { to, force, .. } => self.resolved(word(*to), *force, reply),
            Call::Webhook { .. } => false,
        }
    }
}

fn word(state: State) -> &'static str {
    match state {
        State::Pending => "pending",
        State::Completed => "completed",
        State::Dead => "dead",
        State::Processing => "processing",
        State::Failed => "failed",
        State::Unknown => "unknown",
        State::Unspecified => "",
    }
}

/// The tokens that an operation of unknown outcome can have drawn.
fn drawn(one: &One<'_>, call: &Call) -> Vec<i64> {
    let Some(row) = one.row else { return Vec::new() };
    match call {
        Call::Claim { claim_id } => {
            row.attempts.iter().filter(|attempt| attempt.claim_id == *claim_id).map(|attempt| attempt.token).collect()
        }
        Call::Resolve { reason, .. } => row
            .resolutions
            .iter()
            .filter(|resolution| resolution.reason == *reason)
            .map(|resolution| resolution.token)
            .collect(),
        Call::Extend { .. } | Call::Mark { .. } | Call::Webhook { .. } => Vec::new(),
    }
}

/// Whether an operation of unknown outcome can have done anything.
fn matters(one: &One<'_>, call: &Call, drawn: &[i64]) -> bool {
    match call {
        Call::Claim { .. } | Call::Resolve { .. } => !drawn.is_empty(),
        Call::Mark { token, ending, .. } => one.row.is_some_and(|row| {
            row.attempts.iter().any(|attempt| attempt.token == *token && attempt.outcome == ending.outcome())
        }),
        // It only moves the expiry, which is left out.
        Call::Extend { .. } | Call::Webhook { .. } => false,
    }
}

/// Whether a call with this answer may have changed the event.
fn changes(reply: &Reply) -> bool {
    matches!(reply, Reply::Acquired { .. } | Reply::Marked { .. } | Reply::Resolved { .. })
}

/// Checks one event.
pub fn check(one: &One<'_>) -> Verdict {
    if one.through_gateways() {
        return Verdict::Undecided;
    }
    // Beginnings and answers by position, each operation as a thread of its own, from which the tester takes the order.
    let mut moments: Vec<(usize, usize, &Operation)> = Vec::new();
    for (number, operation) in one.operations.iter().enumerate() {
        // The search tries the lowest thread that fits first. Operations that only read the event are best placed as early as
        // they fit: there they block nothing, while later they may no longer fit.
        let saw = matches!(operation.reply(), Some(reply) if !changes(reply));
        let thread = if saw { number } else { number + one.operations.len() };
        match operation.reply() {
            Some(Reply::Nothing) => {}
            Some(_) => {
                moments.push((operation.invoked, thread, operation));
                moments.push((operation.returned.as_ref().map_or(0, |(place, ..)| *place), thread, operation));
            }
            None if matters(one, &operation.call, &drawn(one, &operation.call)) => {
                moments.push((operation.invoked, thread, operation));
            }
            None => {}
        }
    }
    moments.sort_by_key(|(place, ..)| *place);
    let steps = Arc::new(AtomicU64::new(0));
    let mut tester = LinearizabilityTester::new(Machine::new(Arc::clone(&steps)));
    for (place, thread, operation) in moments {
        let told = match operation.reply() {
            _ if place == operation.invoked => {
                let drawn = if operation.returned.is_none() { drawn(one, &operation.call) } else { Vec::new() };
                let behind = may_be_behind(one, operation);
                tester.on_invoke(thread, Step { call: operation.call.clone(), drawn, behind })
            }
            Some(reply) => tester.on_return(thread, reply.clone()),
            None => continue,
        };
        if let Err(error) = told {
            return broken(one, error);
        }
    }
    if tester.is_consistent() {
        Verdict::Linearizable
    } else if steps.load(Relaxed) >= STEPS_MAX {
        Verdict::Undecided
    } else {
        broken(one, "no order of the calls explains the answers".to_owned())
    }
}

/// The token of the replay that undid the completion reported to an operation.
fn undone_by(one: &One<'_>, operation: &Operation) -> Option<i64> {
    let Reply::AlreadyCompleted { token } = operation.reply()? else { return None };
    let replays = one.row?.resolutions.iter().filter(|resolution| resolution.from_state == "completed");
    replays.map(|replay| replay.token).filter(|drawn| drawn > token).min()
}

/// The operations that knew of a replay before another began: those that were told its token, or a later one of the event.
fn knew<'a>(
    one: &'a One<'_>,
    replay: i64,
    operation: &'a Operation,
) -> impl Iterator<Item = (&'a Operation, Duration)> {
    one.operations.iter().filter_map(move |other| {
        let (place, at, reply) = other.returned.as_ref()?;
        let told = match reply {
            Reply::Acquired { token, .. }
            | Reply::AlreadyCompleted { token }
            | Reply::Resolved { token }
            | Reply::LockLost { token, .. } => *token,
            _ => return None,
        };
        (*place < operation.invoked && told >= replay).then_some((*other, *at))
    })
}

/// Whether an operation may have been told of a completion that was undone: never by the sidecar that had acknowledged the
/// replay, and by others only shortly after somebody knew of it.
fn may_be_behind(one: &One<'_>, operation: &Operation) -> bool {
    let Some(replay) = undone_by(one, operation) else { return false };
    knew(one, replay, operation).all(|(other, at)| {
        let acknowledged = matches!(other.reply(), Some(Reply::Resolved { .. })) && other.way == operation.way;
        !acknowledged && operation.at.saturating_sub(at) < BEHIND_MAX
    })
}

/// How long after somebody knew of a replay callers were still told of the completion that it undid.
pub fn stale(one: &One<'_>) -> Vec<Duration> {
    let late = |operation: &&Operation| {
        let (_, first) = knew(one, undone_by(one, operation)?, operation).min_by_key(|(_, at)| *at)?;
        Some(operation.at.saturating_sub(first))
    };
    one.operations.iter().filter_map(late).collect()
}

fn broken(one: &One<'_>, what: String) -> Verdict {
    let mut findings = Findings::default();
    findings.add("I13", one.event, what);
    findings.into().pop().map_or(Verdict::Undecided, Verdict::Broken)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Run, by_event, made::*},
        *,
    };
    use crate::chaos::{application::Guard, history::Ending, rows::Rows};

    fn linearizable(operations: &[Operation], rows: &Rows) -> bool {
        let effects = BTreeMap::new();
        let run = Run { operations, deliveries: &[], rows, effects: &effects, guard: Guard::Nothing };
        match check(&by_event(&run)[0]) {
            Verdict::Linearizable => true,
            Verdict::Broken(violation) => {
                assert_eq!(violation.invariant, "I13");
                false
            }
            Verdict::Undecided => panic!("undecided"),
        }
    }

    #[test]
    fn what_an_unknown_call_may_have_done_explains_what_others_saw() {
        let rows = row("completed", &[(10, "a", 15, "completed")]);
        // Both of a's calls were lost; b sees first the one, then the other.
        let mut operations = vec![
            lost(1, claim("a")),
            op((2, 3), claim("b"), Reply::InProgress),
            lost(4, mark(10, "a", Ending::Completed)),
            op((5, 6), claim("b"), Reply::InProgress),
            op((7, 8), claim("b"), Reply::AlreadyCompleted { token: 10 }),
        ];
        assert!(linearizable(&operations, &rows));
        // It may take effect at any later time, but never before it began.
        operations[2].invoked = 9;
        assert!(!linearizable(&operations, &rows));
    }

    #[test]
    fn an_answer_from_the_past_is_found() {
        let rows = row("completed", &[(10, "a", 15, "completed")]);
        let mut operations = vec![
            op((1, 2), claim("a"), acquired(10, 1)),
            op((3, 6), mark(10, "a", Ending::Completed), DONE),
            op((4, 5), claim("b"), Reply::InProgress),
        ];
        assert!(linearizable(&operations, &rows));
        operations.push(op((7, 8), claim("c"), Reply::InProgress));
        assert!(!linearizable(&operations, &rows), "in progress, after its completion was acknowledged");
    }

    #[test]
    fn a_stale_holder_that_is_let_through_is_found() {
        let rows = row("completed", &[(10, "a", 200, "lock_expired"), (200, "b", 300, "completed")]);
        let operations = |reply: Reply| {
            vec![
                op((1, 2), claim("a"), acquired(10, 1)),
                op((3, 4), claim("b"), acquired(200, 2)),
                op((5, 6), mark(200, "b", Ending::Completed), DONE),
                op((7, 8), mark(10, "a", Ending::Completed), reply),
            ]
        };
        assert!(!linearizable(&operations(DONE), &rows));
        assert!(!linearizable(&operations(Reply::LockLost { token: 10, state: "completed".into() }), &rows));
        assert!(!linearizable(&operations(Reply::LockLost { token: 200, state: "processing".into() }), &rows));
        assert!(linearizable(&operations(Reply::LockLost { token: 200, state: "completed".into() }), &rows));
    }

    #[test]
    fn two_grants_of_one_new_event_are_found() {
        let rows = row("processing", &[(10, "a", 0, "running")]);
        let operations = [op((1, 4), claim("a"), acquired(10, 1)), op((2, 3), claim("b"), acquired(11, 1))];
        assert!(!linearizable(&operations, &rows));
    }

    #[test]
    fn an_ended_claim_is_not_granted_again() {
        let rows = row("failed", &[(10, "a", 15, "failed_retryable"), (20, "a", 25, "failed_retryable")]);
        let operations = |reply: Reply| {
            vec![
                op((1, 2), claim("a"), acquired(10, 1)),
                op((3, 4), mark(10, "a", Ending::Retryable), DONE),
                op((5, 6), claim("a"), reply),
            ]
        };
        assert!(linearizable(&operations(Reply::ClaimEnded), &rows));
        assert!(!linearizable(&operations(acquired(20, 2)), &rows));
    }

    #[test]
    fn resolutions_draw_tokens_of_their_own() {
        let resolve = |to| Call::Resolve { to, force: false, reason: "r".into() };
        let rows = row("unknown", &[(10, "a", 15, "failed_unknown")]);
        let operations = |token| {
            vec![
                op((1, 2), claim("a"), acquired(10, 1)),
                op((3, 4), mark(10, "a", Ending::Unknown), DONE),
                op((5, 6), claim("b"), Reply::Refused),
                op((7, 8), resolve(State::Completed), Reply::Resolved { token }),
                op((9, 10), claim("b"), Reply::AlreadyCompleted { token }),
                op((11, 12), resolve(State::Pending), Reply::StateConflict),
            ]
        };
        assert!(linearizable(&operations(20), &rows));
        assert!(!linearizable(&operations(10), &rows));
        // To the state that it was resolved to: with another reason it is refused. To another one it is not.
        let refused = |to| {
            vec![
                op((1, 2), claim("a"), acquired(10, 1)),
                op((3, 4), mark(10, "a", Ending::Unknown), DONE),
                op((5, 6), resolve(State::Dead), Reply::Resolved { token: 20 }),
                op((7, 8), resolve(to), Reply::StateConflict),
            ]
        };
        assert!(linearizable(&refused(State::Dead), &rows));
        assert!(!linearizable(&refused(State::Pending), &rows));
    }

    #[test]
    fn another_sidecars_cache_may_be_behind_a_replay_for_a_moment_and_nothing_else() {
        let rows = replayed(row("pending", &[(10, "a", 15, "completed")]), 20);
        // The replay is acknowledged at 100 s, on the path "a".
        let operations = |way: &str, after: Duration, token| {
            let acknowledged = Duration::from_secs(100);
            let mut operations = vec![
                op((1, 2), claim("a"), acquired(10, 1)),
                op((3, 4), mark(10, "a", Ending::Completed), DONE),
                op((5, 6), replay(), Reply::Resolved { token: 20 }),
                op((7, 8), claim("b"), Reply::AlreadyCompleted { token }),
            ];
            operations[2].returned = Some((6, acknowledged, Reply::Resolved { token: 20 }));
            (operations[3].way, operations[3].at) = (way.into(), acknowledged + after);
            operations
        };
        let soon = Duration::from_millis(1_900);
        assert!(linearizable(&operations("b", soon, 10), &rows));
        assert!(!linearizable(&operations("b", BEHIND_MAX, 10), &rows), "too late");
        assert!(!linearizable(&operations("a", soon, 10), &rows), "by the one that acknowledged it");
        assert!(!linearizable(&operations("b", soon, 20), &rows), "completed by the replay itself");
        let effects = BTreeMap::new();
        let operations = operations("b", soon, 10);
        let run =
            Run { operations: &operations, deliveries: &[], rows: &rows, effects: &effects, guard: Guard::Nothing };
        assert_eq!(stale(&by_event(&run)[0]), [soon]);
    }

    #[test]
    fn a_replay_that_nobody_acknowledged_is_known_to_whoever_holds_a_later_lock() {
        let rows = replayed(row("processing", &[(10, "a", 15, "completed"), (30, "b", 0, "running")]), 20);
        let operations = |after: Duration| {
            let mut operations = vec![
                op((1, 2), claim("a"), acquired(10, 1)),
                op((3, 4), mark(10, "a", Ending::Completed), DONE),
                lost(5, replay()),
                op((6, 7), claim("b"), acquired(30, 2)),
                op((8, 9), claim("c"), Reply::AlreadyCompleted { token: 10 }),
            ];
            operations[4].at = after;
            operations
        };
        assert!(linearizable(&operations(Duration::from_millis(1_900)), &rows));
        assert!(!linearizable(&operations(BEHIND_MAX), &rows));
    }
}
