//! The tables of `docs/states.md` against the rules.

use std::collections::BTreeSet;

use super::{
    resolutions::{TARGETS, resolve_to},
    *,
};

const DOCUMENT: &str = include_str!("../../../../../docs/states.md");

/// The rows of the table whose head begins with this.
fn table(head: &str) -> Vec<Vec<&'static str>> {
    let rows = DOCUMENT.lines().skip_while(|line| !line.starts_with(head)).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

/// What the document calls a state: in capitals.
fn called(state: State) -> String {
    state.to_string().to_uppercase()
}

#[test]
fn every_state_has_its_row() {
    let rows: Vec<_> = table("| state | means |").iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    let states: Vec<_> = ["absent".to_owned()].into_iter().chain(State::ALL.map(called)).collect();
    assert_eq!(rows, states);
}

/// An event that is met, or none, and the claim id that it is met with.
type Met = (Option<Shape>, &'static str);

#[test]
fn check_and_lock_answers_what_the_document_says() {
    // By whom the document means, and what these are to the rules.
    let met: [(&str, &[Met]); 6] = [
        (
            "absent, PENDING, FAILED with its pause passed, PROCESSING with an expired lock",
            &[
                (None, "another"),
                (Some(Pending), "another"),
                (Some(Failed), "another"),
                (Some(FailedPausePassed), "another"),
                (Some(ProcessingExpired), "another"),
            ],
        ),
        ("PROCESSING, another holder", &[(Some(ProcessingLive), "another")]),
        ("PROCESSING, same `claim_id`", &[(Some(ProcessingLive), "own")]),
        ("FAILED within its pause", &[(Some(FailedPaused), "another")]),
        ("COMPLETED", &[(Some(Completed), "another"), (Some(CompletedByHand), "another")]),
        (
            "UNKNOWN, DEAD",
            &[
                (Some(Unknown), "another"),
                (Some(DeadTerminal), "another"),
                (Some(DeadUsedUp), "another"),
                (Some(DeadBuried), "another"),
                (Some(DeadLowered), "another"),
                (Some(DeadByHand), "another"),
            ],
        ),
    ];
    let rows = table("| state | CheckAndLock |");
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), met.map(|(row, _)| row));
    for (row, (_, shapes)) in rows.iter().zip(met) {
        for (shape, claim_id) in shapes {
            let event = shape.map(Shape::event);
            let said = match claim(event.as_ref(), false, &claim_by(claim_id), NOW) {
                ClaimStep::Insert | ClaimStep::Grant | ClaimStep::Keep(Decision::Acquired(_)) => "ACQUIRED",
                ClaimStep::Keep(Decision::InProgress { .. }) => "IN_PROGRESS",
                ClaimStep::Keep(Decision::AlreadyCompleted) => "ALREADY_COMPLETED",
                ClaimStep::Keep(Decision::Refused) => "REFUSED",
                step @ (ClaimStep::Bury | ClaimStep::Refuse(_)) => panic!("{shape:?}: {step:?}"),
            };
            assert!(row[1].starts_with(&format!("`{said}`")), "{shape:?} by {claim_id}: {said}, and not {}", row[1]);
        }
    }
}

#[test]
fn resolve_permits_what_the_document_says() {
    let rows = table("| from | to |");
    for shape in Shape::ALL {
        let name = match shape {
            ProcessingLive => "PROCESSING with a lock that has not expired".to_owned(),
            ProcessingExpired => "PROCESSING with an expired lock".to_owned(),
            _ => called(shape.state()),
        };
        let row = rows.iter().find(|row| row[0].split(", ").any(|from| from == name));
        let row = row.unwrap_or_else(|| panic!("{name} stands in no row"));
        let with_force = row[2].contains("`--force`");
        for to in TARGETS {
            let applies =
                |force| resolve(Some(&shape.event()), None, &resolve_to(to, force, None), NOW) == ResolveStep::Apply;
            let said = row[1].split(", ").any(|named| named == called(to.state()));
            assert_eq!(applies(true), said, "{name} to {to:?} with force");
            assert_eq!(applies(false), said && !with_force, "{name} to {to:?}");
        }
    }
}

/// A change of state that the rules permit: from which, by what call, into which. None: absent.
type Edge = (Option<State>, &'static str, Option<State>);

/// All of them.
fn edges() -> Vec<Edge> {
    let mut edges: Vec<Edge> = vec![];
    for shape in [None].into_iter().chain(Shape::ALL.map(Some)) {
        let event = shape.map(Shape::event);
        let from = shape.map(Shape::state);
        for (claim_id, attempts_max) in
            [("own", None), ("other", None), ("own", cap(ATTEMPTS)), ("other", cap(ATTEMPTS))]
        {
            let request = Claim { attempts_max, ..claim_by(claim_id) };
            match claim(event.as_ref(), false, &request, NOW) {
                ClaimStep::Insert | ClaimStep::Grant => edges.push((from, "CheckAndLock", Some(State::Processing))),
                ClaimStep::Bury => edges.push((from, "CheckAndLock", Some(State::Dead))),
                ClaimStep::Keep(_) | ClaimStep::Refuse(_) => {}
            }
            for ending in endings() {
                let call = if ending.outcome() == Outcome::Completed { "MarkCompleted" } else { "MarkFailed" };
                if let MarkStep::Apply(to) =
                    mark(event.as_ref(), None, &Mark { attempts_max, ..mark_of(TOKEN, ending) })
                {
                    edges.push((from, call, Some(to)));
                }
            }
        }
        for (to, force) in TARGETS.into_iter().flat_map(|to| [(to, false), (to, true)]) {
            if resolve(event.as_ref(), None, &resolve_to(to, force, None), NOW) == ResolveStep::Apply {
                edges.push((from, "Resolve", Some(to.state())));
            }
        }
    }
    edges.extend(
        State::ALL.into_iter().filter(|state| state.is_deletable()).map(|state| (Some(state), "Cleanup", None)),
    );
    edges
}

/// The calls that a cell names.
fn calls(cell: &str) -> BTreeSet<&'static str> {
    let all = ["CheckAndLock", "MarkCompleted", "MarkFailed", "Resolve", "Cleanup"];
    all.into_iter().filter(|call| cell.contains(call)).collect()
}

#[test]
fn who_enters_and_who_leaves_a_state_is_what_the_document_says() {
    let edges = edges();
    let states = [None].into_iter().chain(State::ALL.map(Some));
    for (row, state) in table("| state | means |").iter().zip(states) {
        let (enters, leaves) = (row[2], row[3]);
        let entering = edges.iter().filter(|(_, _, to)| *to == state);
        assert_eq!(calls(enters), entering.map(|(_, call, _)| *call).collect(), "who enters {state:?}: {enters}");
        let leaving = || edges.iter().filter(|(from, _, _)| *from == state);
        assert_eq!(calls(leaves), leaving().map(|(_, call, _)| *call).collect(), "who leaves {state:?}: {leaves}");
        // Where a claim leads to, but for a takeover, which leads to where it began.
        for to in State::ALL.into_iter().filter(|to| Some(*to) != state) {
            let leads = leaving().any(|edge| *edge == (state, "CheckAndLock", Some(to)));
            assert_eq!(leaves.contains(&format!("to {}", called(to))), leads, "{state:?} to {to}: {leaves}");
        }
        // What a person decides, by the command's own words.
        if let Some(state) = state.filter(|_| calls(enters).contains("Resolve")) {
            assert!(enters.contains(&format!("Resolve `--to {state}`")), "{state}: {enters}");
        }
        // The kinds of failures.
        for (kind, attempts_max, word) in [
            (FailureKind::Retryable, None, "retryable"),
            (FailureKind::Retryable, cap(ATTEMPTS), "MarkFailed at the cap"),
            (FailureKind::Terminal, None, "terminal"),
            (FailureKind::Unknown, None, "MarkFailed unknown"),
        ] {
            let ending = Ending::Failed { kind, error: None, retry_after: None };
            let leads = Some(ended_state(&ProcessingLive.event(), &ending, attempts_max)) == state;
            assert_eq!(enters.contains(word), leads, "{word} enters {state:?}: {enters}");
        }
        assert!(row[4].len() > 10, "what a crash does to {state:?}");
    }
    // The one decision that takes a completed event back is the one that has to be forced.
    let replays: Vec<_> =
        edges.iter().filter(|edge| **edge == (Some(State::Completed), "Resolve", Some(State::Pending))).collect();
    assert_eq!(replays.len(), 2, "of either shape, with force alone");
}
