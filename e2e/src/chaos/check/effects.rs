//! I7 (effects) and I8 (progress).

use super::{Findings, One, Run};
use crate::chaos::application::Guard;

/// I7, for one event that went through gateways.
pub(crate) fn check(one: &One<'_>, run: &Run<'_>, findings: &mut Findings) {
    let event = one.event;
    let effects = run.effects.get(event).map(Vec::as_slice).unwrap_or_default();
    // A token reaches the application once: a delivery is never sent twice under the same lock.
    let mut tokens: Vec<i64> = one.deliveries.iter().map(|delivery| delivery.token).collect();
    tokens.sort_unstable();
    for pair in tokens.windows(2) {
        findings.check(pair[0] != pair[1], "I7", event, || format!("token {} was delivered twice", pair[0]));
    }
    for delivery in &one.deliveries {
        let granted = one.row.is_some_and(|row| row.attempts.iter().any(|attempt| attempt.token == delivery.token));
        findings.check(granted, "I7", event, || format!("{} was delivered without a lock", delivery.token));
    }
    let completed_by = |token: i64| {
        one.row.is_some_and(|row| row.attempts.iter().any(|a| a.token == token && a.outcome == "completed"))
    };
    if run.guard == Guard::Nothing {
        // As many effects as there were deliveries, and no others: each completion has its own.
        for token in effects {
            findings.check(tokens.contains(token), "I7", event, || format!("an effect of {token}, undelivered"));
        }
        for token in tokens.iter().filter(|token| completed_by(**token)) {
            findings.check(effects.contains(token), "I7", event, || format!("{token} completed it without its effect"));
        }
        return;
    }
    findings.check(effects.len() <= 1, "I7", event, || format!("effects of {effects:?}"));
    // A completion through a gateway must have reached the application.
    for delivery in one.deliveries.iter().filter(|delivery| completed_by(delivery.token)) {
        findings
            .check(!effects.is_empty(), "I7", event, || format!("{} completed it without an effect", delivery.token));
        if run.guard == Guard::Token {
            let late = effects.iter().any(|token| *token < delivery.token);
            findings.check(!late, "I7", event, || format!("{effects:?} took the place of {}", delivery.token));
        }
    }
}

/// The events with more than one effect: possible for an application without a guard.
pub fn doubled<'a>(run: &Run<'a>) -> Vec<&'a str> {
    run.effects.iter().filter(|(_, effects)| effects.len() > 1).map(|(event, _)| event.as_str()).collect()
}

/// I8: once the faults are over and everybody has tried again, no event is left under way.
pub fn settled(run: &Run<'_>) -> Vec<super::Violation> {
    let mut findings = Findings::default();
    for (event, row) in &run.rows.events {
        findings.check(!matches!(row.state.as_str(), "processing" | "pending" | "failed"), "I8", event, || {
            format!("it is left {}", row.state)
        });
    }
    findings.into()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::{super::made::*, *};
    use crate::chaos::history::{Call, Delivery, Reply};

    fn delivery(token: i64) -> Delivery {
        Delivery { event: EVENT.into(), token, place: 0, at: Duration::ZERO, applied: true }
    }

    fn found(guard: Guard, deliveries: &[i64], effects: &[i64]) -> Vec<String> {
        let operations =
            [op((1, 2), Call::Webhook { gateway: 0 }, Reply::Answered { status: 200, word: String::new() })];
        let rows = row("completed", &[(10, "a", 200, "lock_expired"), (300, "b", 310, "completed")]);
        let deliveries: Vec<Delivery> = deliveries.iter().map(|token| delivery(*token)).collect();
        let effects = BTreeMap::from([(EVENT.to_owned(), effects.to_vec())]);
        let run = Run { operations: &operations, deliveries: &deliveries, rows: &rows, effects: &effects, guard };
        super::super::safety(&run).into_iter().map(|violation| violation.what).collect()
    }

    #[test]
    fn effects_that_a_guard_should_have_stopped_are_found() {
        let none: [&str; 0] = [];
        assert_eq!(found(Guard::EventId, &[300], &[300]), none);
        assert_eq!(found(Guard::EventId, &[10, 300], &[10]), none);
        assert_eq!(found(Guard::Nothing, &[300, 10], &[300, 10]), none);
        assert_eq!(found(Guard::Token, &[300, 10], &[300, 10]).len(), 2);
        assert_eq!(found(Guard::Token, &[300, 10], &[10]).len(), 1, "a late writer won");
        assert_eq!(found(Guard::EventId, &[300], &[]).len(), 1, "completed without an effect");
        assert_eq!(found(Guard::Nothing, &[300, 300], &[300, 300]).len(), 1, "one lock, two deliveries");
        assert_eq!(found(Guard::Nothing, &[300, 999], &[300]).len(), 1, "no lock");
        assert_eq!(found(Guard::Nothing, &[300], &[10]).len(), 2, "another's effect, and none of its own");
    }

    #[test]
    fn an_event_that_is_left_under_way_is_found() {
        let effects = BTreeMap::new();
        let states = |state: &str, outcome: &str| {
            let rows = row(state, &[(10, "a", 15, outcome)]);
            let run = Run { operations: &[], deliveries: &[], rows: &rows, effects: &effects, guard: Guard::Nothing };
            settled(&run).len()
        };
        assert_eq!(states("processing", "running"), 1);
        assert_eq!(states("failed", "failed_retryable"), 1);
        assert_eq!(states("completed", "completed"), 0);
        assert_eq!(states("dead", "failed_terminal"), 0);
    }
}
