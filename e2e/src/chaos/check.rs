//! Checks the invariants against what callers saw, what the ledger holds, and what the application did.
//!
//! Every check has a test with a hand-written history that violates it: a check that cannot fail proves nothing.

pub mod conservation;
pub mod effects;
pub mod fingerprints;
pub mod grants;
pub mod linear;
pub mod marks;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use super::{
    application::Guard,
    history::{Call, Delivery, Operation},
    rows::{Event, Rows},
};

/// What a run left to check.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// What callers saw.
    pub operations: &'a [Operation],
    /// What reached the application.
    pub deliveries: &'a [Delivery],
    /// What the ledger holds at the end.
    pub rows: &'a Rows,
    /// What the application's books hold at the end.
    pub effects: &'a BTreeMap<String, Vec<i64>>,
    /// What guards the effects.
    pub guard: Guard,
}

/// Something that must not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The violated invariant: I1 to I13.
    pub invariant: &'static str,
    /// The event; empty if it is not about one.
    pub event: String,
    /// What was found.
    pub what: String,
}

/// One event's share of a run.
#[derive(Clone, Debug)]
pub struct One<'a> {
    /// Its name.
    pub event: &'a str,
    /// What callers saw of it, in the order in which the operations began.
    pub operations: Vec<&'a Operation>,
    /// What reached the application.
    pub deliveries: Vec<&'a Delivery>,
    /// Its row, if it has one.
    pub row: Option<&'a Event>,
}

impl One<'_> {
    /// Whether gateways claimed it: their calls are not in the record.
    pub fn through_gateways(&self) -> bool {
        self.operations.iter().any(|operation| matches!(operation.call, Call::Webhook { .. }))
    }
}

/// A run by its events.
pub fn by_event<'a>(run: &Run<'a>) -> Vec<One<'a>> {
    let names: BTreeSet<&str> = run
        .operations
        .iter()
        .map(|operation| operation.event.as_str())
        .chain(run.rows.events.keys().map(String::as_str))
        .collect();
    let mut all: BTreeMap<&str, One<'a>> = names
        .into_iter()
        .map(|event| {
            let row = run.rows.events.get(event);
            (event, One { event, operations: Vec::new(), deliveries: Vec::new(), row })
        })
        .collect();
    for operation in run.operations {
        if let Some(one) = all.get_mut(operation.event.as_str()) {
            one.operations.push(operation);
        }
    }
    for delivery in run.deliveries {
        if let Some(one) = all.get_mut(delivery.event.as_str()) {
            one.deliveries.push(delivery);
        }
    }
    all.into_values().collect()
}

/// Collects violations.
#[derive(Debug, Default)]
pub(crate) struct Findings(Vec<Violation>);

impl Findings {
    pub(crate) fn add(&mut self, invariant: &'static str, event: &str, what: impl Into<String>) {
        self.0.push(Violation { invariant, event: event.to_owned(), what: what.into() });
    }

    pub(crate) fn check(&mut self, holds: bool, invariant: &'static str, event: &str, what: impl FnOnce() -> String) {
        if !holds {
            self.add(invariant, event, what());
        }
    }

    pub(crate) fn into(self) -> Vec<Violation> {
        self.0
    }
}

/// Everything except linearizability, which is expensive: I1 to I7 and I10.
pub fn safety(run: &Run<'_>) -> Vec<Violation> {
    let events = by_event(run);
    let mut findings = Findings::default();
    grants::unique(run, &mut findings);
    for one in &events {
        grants::check(one, &mut findings);
        marks::check(one, &mut findings);
        effects::check(one, run, &mut findings);
        fingerprints::check(one, &mut findings);
    }
    marks::counts(run, &mut findings);
    findings.into()
}

/// The message of a failed run: the violations, and the history of each event concerned, with what reached the
/// application and what is in its books.
pub fn explain(violations: &[Violation], run: &Run<'_>) -> String {
    let mut text = String::new();
    for violation in violations.iter().take(20) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {}: {}", violation.invariant, violation.event, violation.what);
    }
    let events: BTreeSet<&str> = violations.iter().map(|violation| violation.event.as_str()).take(5).collect();
    for event in events.into_iter().filter(|event| !event.is_empty()) {
        let _ = writeln!(text, "--- {event}");
        let mut lines: Vec<(usize, String)> = Vec::new();
        for operation in run.operations.iter().filter(|operation| operation.event == event) {
            lines.push((operation.invoked, operation.to_string()));
        }
        for delivery in run.deliveries.iter().filter(|delivery| delivery.event == event) {
            lines.push((delivery.place, delivery.to_string()));
        }
        lines.sort_by_key(|(place, _)| *place);
        for (_, line) in lines {
            let _ = writeln!(text, "{line}");
        }
        let _ = writeln!(text, "effects in force: {:?}", run.effects.get(event).map_or(&[][..], Vec::as_slice));
        let _ = writeln!(text, "{:#?}", run.rows.events.get(event));
    }
    text
}

#[cfg(test)]
pub(crate) mod made {
    //! Histories written by hand.

    use std::time::Duration;

    use oncegate_api::v1::State;

    use super::*;
    use crate::chaos::{
        history::{Ending, Reply},
        rows::{Attempt, Resolution},
    };

    pub(crate) const EVENT: &str = "evt";

    /// An operation that began at one position and was answered at another.
    pub(crate) fn op(places: (usize, usize), call: Call, reply: Reply) -> Operation {
        let returned = Some((places.1, Duration::ZERO, reply));
        Operation { event: EVENT.into(), call, way: "a".into(), invoked: places.0, at: Duration::ZERO, returned }
    }

    /// One whose end is unknown.
    pub(crate) fn lost(place: usize, call: Call) -> Operation {
        Operation { event: EVENT.into(), call, way: "a".into(), invoked: place, at: Duration::ZERO, returned: None }
    }

    pub(crate) fn claim(claim_id: &str) -> Call {
        Call::Claim { claim_id: claim_id.into() }
    }

    pub(crate) fn acquired(token: i64, attempt: i32) -> Reply {
        Reply::Acquired { token, attempt, expires: token + 100 }
    }

    pub(crate) fn mark(token: i64, claim_id: &str, ending: Ending) -> Call {
        Call::Mark { token, claim_id: claim_id.into(), ending }
    }

    pub(crate) const DONE: Reply = Reply::Marked { repeated: false };

    /// A row whose attempts are named after their claims and start at their tokens.
    pub(crate) fn row(state: &str, attempts: &[(i64, &str, i64, &str)]) -> Rows {
        let attempts: Vec<Attempt> = attempts
            .iter()
            .zip(1..)
            .map(|(&(token, claim_id, end, outcome), attempt)| Attempt {
                attempt,
                token,
                claim_id: claim_id.into(),
                start: token,
                end: (outcome != "running").then_some(end),
                outcome: outcome.into(),
            })
            .collect();
        let event = Event {
            state: state.into(),
            token: attempts.last().map_or(0, |attempt| attempt.token),
            attempt_count: i32::try_from(attempts.len()).unwrap_or(i32::MAX),
            attempts,
            resolutions: Vec::new(),
        };
        let counts = BTreeMap::from([(state.to_owned(), 1)]);
        Rows { events: BTreeMap::from([(EVENT.to_owned(), event)]), counts }
    }

    /// The row with a replay of the completed event, which drew this token.
    pub(crate) fn replayed(mut rows: Rows, token: i64) -> Rows {
        for event in rows.events.values_mut() {
            event.resolutions.push(Resolution {
                token,
                from_state: "completed".into(),
                to_state: "pending".into(),
                reason: "r".into(),
                time: token,
            });
        }
        rows
    }

    /// A replay by force.
    pub(crate) fn replay() -> Call {
        Call::Resolve { to: State::Pending, force: true, reason: "r".into() }
    }

    /// The invariants that a history violates.
    pub(crate) fn broken(operations: &[Operation], rows: &Rows) -> Vec<&'static str> {
        let run = Run { operations, deliveries: &[], rows, effects: &BTreeMap::new(), guard: Guard::Nothing };
        safety(&run).into_iter().map(|violation| violation.invariant).collect()
    }

    #[test]
    fn a_failed_run_tells_all_that_is_known_of_the_event() {
        let operations = [op((1, 4), claim("a"), acquired(10, 1)), lost(6, mark(10, "a", Ending::Completed))];
        let rows = row("processing", &[(10, "a", 0, "running")]);
        let deliveries = [Delivery { event: EVENT.into(), token: 10, place: 5, at: Duration::ZERO, applied: true }];
        let effects = BTreeMap::from([(EVENT.to_owned(), vec![10])]);
        let run = Run {
            operations: &operations,
            deliveries: &deliveries,
            rows: &rows,
            effects: &effects,
            guard: Guard::Token,
        };
        let violation = Violation { invariant: "I7", event: EVENT.into(), what: "two effects".into() };
        let text = explain(&[violation], &run);
        let places: Vec<Option<usize>> = [
            "I7 evt: two effects",
            "Claim",
            "delivered with 10, applied",
            "unknown",
            "effects in force: [10]",
            "running",
        ]
        .iter()
        .map(|part| text.find(part))
        .collect();
        assert!(places.is_sorted() && places.iter().all(Option::is_some), "{text}");
    }

    #[test]
    fn a_good_history_breaks_nothing() {
        let operations = [
            op((1, 2), claim("a"), acquired(10, 1)),
            op((3, 4), mark(10, "a", Ending::Retryable), DONE),
            lost(5, claim("b")),
            op((6, 7), claim("c"), Reply::InProgress),
            op((8, 9), claim("b"), acquired(20, 2)),
            op((10, 11), mark(20, "b", Ending::Completed), DONE),
            op((12, 13), mark(20, "b", Ending::Completed), Reply::Marked { repeated: true }),
            op((14, 15), claim("c"), Reply::AlreadyCompleted { token: 20 }),
        ];
        let rows = row("completed", &[(10, "a", 15, "failed_retryable"), (20, "b", 25, "completed")]);
        assert_eq!(broken(&operations, &rows), [""; 0]);
    }
}
