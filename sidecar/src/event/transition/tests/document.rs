//! The tables of `docs/states.md` against the rules.

use super::*;

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
