//! I3 (no stale completion), I4 (one completion), I5 (acknowledged is durable), I6 (200 means completed) and I10 (attempts).

use std::collections::BTreeMap;

use oncegate_api::v1::State;

use super::{Findings, One, Run};
use crate::chaos::history::{Call, Ending, Operation, Reply};

/// A position after everything in the record.
const NEVER: usize = usize::MAX;

/// All five, for one event.
pub(crate) fn check(one: &One<'_>, findings: &mut Findings) {
    recorded(one, findings);
    for operation in &one.operations {
        if let Some(Reply::Defect(what)) = operation.reply() {
            findings.add("a defect", one.event, what.clone());
        }
    }
    after_completion(one, findings);
    attempts(one, findings);
}

/// The position from which callers knew that the event was completed.
fn completed_at(one: &One<'_>) -> usize {
    let told = |operation: &&Operation| match (&operation.call, operation.reply()?) {
        (Call::Mark { ending: Ending::Completed, .. }, Reply::Marked { .. })
        | (_, Reply::AlreadyCompleted { .. })
        | (_, Reply::Answered { status: 200, .. }) => operation.returned.as_ref().map(|(place, ..)| *place),
        _ => None,
    };
    one.operations.iter().filter_map(told).min().unwrap_or(NEVER)
}

/// The tokens of the replays that took it out of its completed state.
fn replays(one: &One<'_>) -> Vec<i64> {
    let resolutions = one.row.map(|row| row.resolutions.as_slice()).unwrap_or_default();
    let replays = resolutions.iter().filter(|resolution| resolution.from_state == "completed");
    replays.map(|replay| replay.token).collect()
}

/// I4: a completed event is left only by a replay that somebody asked for, by force, and completed again only after one.
fn left_by_force(one: &One<'_>, replays: &[i64], findings: &mut Findings) {
    let (event, Some(row)) = (one.event, one.row) else { return };
    for replay in row.resolutions.iter().filter(|resolution| resolution.from_state == "completed") {
        let asked = one.operations.iter().any(|operation| {
            matches!(&operation.call, Call::Resolve { to: State::Pending, force: true, reason } if *reason == replay.reason)
        });
        findings.check(asked && replay.to_state == "pending", "I4", event, || {
            format!("it was completed, and {replay:?} took it out of that, which nobody insisted on")
        });
    }
    let by_attempts = row.attempts.iter().filter(|attempt| attempt.outcome == "completed").map(|attempt| attempt.token);
    let by_hand = row.resolutions.iter().filter(|resolution| resolution.to_state == "completed").map(|r| r.token);
    let mut completions: Vec<i64> = by_attempts.chain(by_hand).collect();
    completions.sort_unstable();
    for pair in completions.windows(2) {
        let between = replays.iter().any(|replay| (pair[0]..pair[1]).contains(replay));
        findings.check(between, "I4", event, || format!("it was completed twice, with {} and {}", pair[0], pair[1]));
    }
    if let Some(last) = completions.last()
        && replays.iter().all(|replay| replay < last)
    {
        findings.check(row.state == "completed", "I4", event, || {
            format!("it was completed with {last}, and is {}", row.state)
        });
    }
}

/// I3 and I5: what was acknowledged is recorded, with exactly that token and claim.
fn recorded(one: &One<'_>, findings: &mut Findings) {
    let event = one.event;
    let attempts = one.row.map(|row| row.attempts.as_slice()).unwrap_or_default();
    for operation in &one.operations {
        match (&operation.call, operation.reply()) {
            (Call::Mark { token, claim_id, ending }, Some(Reply::Marked { .. })) => {
                let Some(attempt) = attempts.iter().find(|attempt| attempt.token == *token) else {
                    findings.add("I5", event, format!("the mark of {token} was acknowledged, and there is no attempt"));
                    continue;
                };
                findings.check(attempt.outcome == ending.outcome(), "I5", event, || {
                    format!("{ending:?} of {token} was acknowledged, and {} is recorded", attempt.outcome)
                });
                findings.check(attempt.claim_id == *claim_id, "I3", event, || {
                    format!("{claim_id} marked {token}, which is {}'s", attempt.claim_id)
                });
            }
            (Call::Claim { claim_id }, Some(Reply::Acquired { token, attempt, .. })) => {
                let found = attempts.iter().find(|attempt| attempt.token == *token);
                findings.check(
                    found.is_some_and(|found| found.claim_id == *claim_id && found.attempt == *attempt),
                    "I5",
                    event,
                    || format!("token {token}, attempt {attempt}, was granted to {claim_id}; recorded is {found:?}"),
                );
            }
            (Call::Resolve { reason, .. }, Some(Reply::Resolved { token })) => {
                let resolutions = one.row.map(|row| row.resolutions.as_slice()).unwrap_or_default();
                findings.check(resolutions.iter().any(|resolution| resolution.token == *token), "I5", event, || {
                    format!("the resolution {reason} drew {token}, which is not recorded")
                });
            }
            _ => {}
        }
    }
}

/// I4 and I6: a completion is final, and only reported if true.
fn after_completion(one: &One<'_>, findings: &mut Findings) {
    let event = one.event;
    let completions = |row: &super::Event| row.attempts.iter().filter(|a| a.outcome == "completed").count();
    let by_hand = one.row.is_some_and(|row| row.resolutions.iter().any(|r| r.to_state == "completed"));
    let replays = replays(one);
    left_by_force(one, &replays, findings);
    if replays.is_empty() {
        let completed = completed_at(one);
        if let Some(row) = one.row {
            findings.check(completed == NEVER || row.state == "completed", "I4", event, || {
                format!("it was completed, and is {}", row.state)
            });
        }
        for operation in one.operations.iter().filter(|operation| operation.invoked > completed) {
            let reply = operation.reply();
            let wrong = match &operation.call {
                Call::Claim { .. } => {
                    matches!(reply, Some(Reply::Acquired { .. } | Reply::InProgress | Reply::Refused))
                }
                Call::Extend { .. } => matches!(reply, Some(Reply::Extended { .. })),
                Call::Mark { ending, .. } => {
                    // An earlier attempt's own failure may be reported again.
                    matches!(reply, Some(Reply::Marked { repeated: false })) && *ending != Ending::Completed
                }
                Call::Resolve { to, .. } => {
                    matches!(reply, Some(Reply::Resolved { .. })) && (*to != State::Completed || !by_hand)
                }
                Call::Webhook { .. } => false,
            };
            findings.check(!wrong, "I4", event, || format!("after its completion: {operation}"));
        }
    }
    for operation in &one.operations {
        match operation.reply() {
            Some(Reply::AlreadyCompleted { token }) => {
                let known = one.row.is_some_and(|row| {
                    row.attempts.iter().any(|a| a.token == *token && a.outcome == "completed")
                        || row.resolutions.iter().any(|r| r.token == *token && r.to_state == "completed")
                });
                findings.check(known, "I6", event, || {
                    format!("a caller was told that it was completed with {token}, which it was not")
                });
                // Somebody must have asked for it before, as far as the record shows.
                let ended = operation.returned.as_ref().map_or(NEVER, |(place, ..)| *place);
                let asked = one.through_gateways()
                    || one.operations.iter().any(|other| {
                        other.invoked < ended
                            && matches!(
                                &other.call,
                                Call::Mark { ending: Ending::Completed, .. }
                                    | Call::Resolve { to: State::Completed, .. }
                            )
                    });
                findings.check(asked, "I6", event, || "completed, before anybody asked for it".to_owned());
            }
            Some(Reply::Answered { status: 200, word }) => {
                findings.check(one.row.is_some_and(|row| completions(row) > 0 || by_hand), "I6", event, || {
                    format!("a provider was told 200 {word}, and it is not completed")
                });
            }
            _ => {}
        }
    }
}

/// I10: accepted transitions and recorded attempts match, numbered without gaps.
fn attempts(one: &One<'_>, findings: &mut Findings) {
    let (event, Some(row)) = (one.event, one.row) else { return };
    let numbers: Vec<i32> = row.attempts.iter().map(|attempt| attempt.attempt).collect();
    let dense: Vec<i32> = (1..=row.attempt_count).collect();
    findings.check(numbers == dense, "I10", event, || format!("{} attempts, recorded {numbers:?}", row.attempt_count));
    let asked = |claim_id: &str| {
        one.operations.iter().any(|operation| matches!(&operation.call, Call::Claim { claim_id: id } if id == claim_id))
    };
    for attempt in &row.attempts {
        findings.check(one.through_gateways() || asked(&attempt.claim_id), "I10", event, || {
            format!("nobody asked for attempt {} of {}", attempt.attempt, attempt.claim_id)
        });
        // Somebody must have asked for each accepted end.
        let marked = one.operations.iter().any(|operation| {
            matches!(&operation.call, Call::Mark { token, ending, .. }
                if *token == attempt.token && ending.outcome() == attempt.outcome)
        });
        let by_itself = attempt.outcome == "running" || attempt.outcome == "lock_expired";
        findings.check(one.through_gateways() || by_itself || marked, "I10", event, || {
            format!("nobody asked for the end of attempt {}: {}", attempt.attempt, attempt.outcome)
        });
    }
}

/// The ledger's own counts match its rows (L5).
pub(crate) fn counts(run: &Run<'_>, findings: &mut Findings) {
    let mut states: BTreeMap<&str, i64> = BTreeMap::new();
    for row in run.rows.events.values() {
        *states.entry(row.state.as_str()).or_default() += 1;
    }
    for (state, counted) in &run.rows.counts {
        let found = states.get(state.as_str()).copied().unwrap_or_default();
        findings
            .check(*counted == found, "I10", "", || format!("{counted} events are counted as {state}, {found} are"));
    }
}

#[cfg(test)]
mod tests {
    use super::super::made::*;
    use crate::chaos::history::{Call, Ending, Reply};

    #[test]
    fn an_acknowledged_completion_that_is_gone_is_found() {
        let operations = [op((1, 2), claim("a"), acquired(10, 1)), op((3, 4), mark(10, "a", Ending::Completed), DONE)];
        let rows = row("processing", &[(10, "a", 0, "running")]);
        let found = broken(&operations, &rows);
        assert!(found.contains(&"I5") && found.contains(&"I4"), "{found:?}");
        assert!(broken(&operations, &Default::default()).contains(&"I5"));
    }

    #[test]
    fn a_mark_by_another_claim_is_found() {
        let operations = [op((1, 2), claim("a"), acquired(10, 1)), op((3, 4), mark(10, "b", Ending::Completed), DONE)];
        let rows = row("completed", &[(10, "a", 15, "completed")]);
        assert_eq!(broken(&operations, &rows), ["I3"]);
    }

    #[test]
    fn a_grant_after_a_completion_is_found_and_a_second_completion() {
        let operations = [
            op((1, 2), claim("a"), acquired(10, 1)),
            op((3, 4), mark(10, "a", Ending::Completed), DONE),
            op((5, 6), claim("b"), acquired(20, 2)),
            op((7, 8), mark(20, "b", Ending::Completed), DONE),
        ];
        let rows = row("completed", &[(10, "a", 15, "completed"), (20, "b", 25, "completed")]);
        assert_eq!(broken(&operations, &rows), ["I4", "I4"]);
        // Unless an operator asked for it.
        let mut asked = operations.to_vec();
        asked.push(lost(4, replay()));
        assert_eq!(broken(&asked, &replayed(rows.clone(), 15)), [""; 0]);
        // Asking alone is not enough, nor is a replay that nobody asked for, nor one that came too late.
        assert_eq!(broken(&asked, &rows), ["I4", "I4"]);
        assert_eq!(broken(&operations, &replayed(rows.clone(), 15)), ["I4"]);
        assert!(broken(&asked, &replayed(rows, 25)).contains(&"I4"));
    }

    #[test]
    fn a_completion_that_is_left_after_the_last_replay_is_found() {
        let operations = [
            op((1, 2), claim("a"), acquired(10, 1)),
            op((3, 4), mark(10, "a", Ending::Completed), DONE),
            op((5, 6), replay(), Reply::Resolved { token: 15 }),
            op((7, 8), claim("b"), acquired(20, 2)),
            op((9, 10), mark(20, "b", Ending::Completed), DONE),
        ];
        let attempts = [(10, "a", 15, "completed"), (20, "b", 25, "completed")];
        assert_eq!(broken(&operations, &replayed(row("completed", &attempts), 15)), [""; 0]);
        assert_eq!(broken(&operations, &replayed(row("pending", &attempts), 15)), ["I4"]);
    }

    #[test]
    fn a_completion_that_nobody_made_is_found() {
        let operations = [op((1, 2), claim("a"), Reply::AlreadyCompleted { token: 10 })];
        let rows = row("processing", &[(10, "a", 0, "running")]);
        assert!(broken(&operations, &rows).contains(&"I6"));
        let operations =
            [op((1, 2), Call::Webhook { gateway: 0 }, Reply::Answered { status: 200, word: "processed".into() })];
        assert!(broken(&operations, &rows).contains(&"I6"));
    }

    #[test]
    fn a_gap_between_attempts_is_found_and_one_that_nobody_asked_for() {
        let operations = [op((1, 2), claim("a"), acquired(10, 1))];
        let mut rows = row("processing", &[(10, "a", 0, "running")]);
        let event = rows.events.get_mut(EVENT).expect("the event");
        event.attempt_count = 2;
        assert_eq!(broken(&operations, &rows), ["I10"]);
        let rows = row("processing", &[(10, "a", 120, "lock_expired"), (200, "ghost", 0, "running")]);
        assert_eq!(broken(&operations, &rows), ["I10"]);
    }

    #[test]
    fn counts_that_are_not_those_of_the_rows_are_found() {
        let operations = [op((1, 2), claim("a"), acquired(10, 1))];
        let mut rows = row("processing", &[(10, "a", 0, "running")]);
        rows.counts.insert("completed".into(), 1);
        assert_eq!(broken(&operations, &rows), ["I10"]);
    }
}
