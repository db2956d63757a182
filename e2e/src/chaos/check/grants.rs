//! I1 (token order) and I2 (one live holder).

use std::collections::{BTreeMap, btree_map::Entry};

use super::{Findings, One, Run};
use crate::chaos::history::{Call, Operation, Reply};

/// I1, over all events: no token is issued twice.
pub(crate) fn unique(run: &Run<'_>, findings: &mut Findings) {
    let mut issued: BTreeMap<i64, (&str, &str)> = BTreeMap::new();
    let recorded = run.rows.events.iter().flat_map(|(event, row)| {
        let attempts = row.attempts.iter().map(|attempt| (attempt.token, attempt.claim_id.as_str()));
        let resolutions = row.resolutions.iter().map(|resolution| (resolution.token, "a resolution"));
        attempts.chain(resolutions).map(move |(token, to)| (token, (event.as_str(), to)))
    });
    for (token, to) in recorded {
        match issued.entry(token) {
            Entry::Vacant(free) => drop(free.insert(to)),
            Entry::Occupied(taken) => {
                findings.add("I1", to.0, format!("token {token} was issued to {to:?} and to {:?}", taken.get()));
            }
        }
    }
    // What callers were told, whether or not the ledger still has it.
    for operation in run.operations {
        if let (Call::Claim { claim_id }, Some(Reply::Acquired { token, .. })) = (&operation.call, operation.reply()) {
            let to = (operation.event.as_str(), claim_id.as_str());
            let known = *issued.entry(*token).or_insert(to);
            findings.check(known == to, "I1", to.0, || format!("token {token} was issued to {to:?} and to {known:?}"));
        }
    }
}

/// Both, of one event.
pub(crate) fn check(one: &One<'_>, findings: &mut Findings) {
    let event = one.event;
    let grants: Vec<(&Operation, i64, i64)> = one
        .operations
        .iter()
        .filter_map(|operation| match operation.reply()? {
            Reply::Acquired { token, expires, .. } => Some((*operation, *token, *expires)),
            _ => None,
        })
        .collect();
    // A caller that asks after somebody was told a token is told no smaller one.
    for (earlier, token, _) in &grants {
        let told = earlier.returned.as_ref().map_or(usize::MAX, |(place, ..)| *place);
        for (later, other, _) in &grants {
            findings.check(later.invoked < told || other >= token, "I1", event, || {
                format!("token {other} was granted to a call that began after {token} had been")
            });
        }
    }
    let Some(row) = one.row else {
        findings.check(grants.is_empty(), "I5", event, || "it was granted, and has no row".to_owned());
        return;
    };
    for pair in row.attempts.windows(2) {
        let [earlier, later] = pair else { continue };
        findings.check(earlier.token < later.token, "I1", event, || {
            format!("attempt {} has token {}, the one before it {}", later.attempt, later.token, earlier.token)
        });
        findings.check(earlier.end.is_some_and(|end| end <= later.start), "I2", event, || {
            format!(
                "attempt {} began at {} and the one before it ended at {:?}",
                later.attempt, later.start, earlier.end
            )
        });
        if earlier.outcome != "lock_expired" {
            continue;
        }
        // Every expiry that a caller was told was in the row before the takeover.
        let told = one.operations.iter().filter_map(|operation| match (&operation.call, operation.reply()?) {
            (_, Reply::Acquired { token, expires, .. }) if *token == earlier.token => Some(*expires),
            (Call::Extend { token, .. }, Reply::Extended { expires }) if *token == earlier.token => Some(*expires),
            _ => None,
        });
        if let Some(expires) = told.max() {
            findings.check(expires <= later.start, "I2", event, || {
                format!(
                    "attempt {} began at {}, when its forerunner's lock was to last until {expires}",
                    later.attempt, later.start
                )
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::made::*;
    use crate::chaos::history::{Call, Ending, Reply};

    #[test]
    fn a_token_issued_twice_is_found() {
        let operations = [op((1, 2), claim("a"), acquired(10, 1)), op((3, 4), claim("b"), acquired(10, 2))];
        let rows = row("processing", &[(10, "a", 0, "running")]);
        assert!(broken(&operations, &rows).contains(&"I1"));
    }

    #[test]
    fn a_smaller_token_after_a_larger_one_is_found() {
        let operations = [
            op((1, 2), claim("a"), acquired(20, 1)),
            op((3, 4), mark(20, "a", Ending::Retryable), DONE),
            op((5, 6), claim("b"), acquired(10, 2)),
        ];
        let rows = row("processing", &[(20, "a", 9, "failed_retryable"), (10, "b", 0, "running")]);
        assert!(broken(&operations, &rows).contains(&"I1"));
        // Asked at the same time, they may come back in any order.
        let operations = [op((1, 4), claim("a"), acquired(20, 2)), op((2, 3), claim("b"), acquired(10, 1))];
        let rows = row("processing", &[(10, "b", 200, "lock_expired"), (20, "a", 0, "running")]);
        assert!(!broken(&operations, &rows).contains(&"I1"));
    }

    #[test]
    fn two_holders_at_once_are_found() {
        // The second attempt began before the first one's lock ended (10 + 100), as its holder was told.
        let operations = [op((1, 2), claim("a"), acquired(10, 1)), op((3, 4), claim("b"), acquired(50, 2))];
        let rows = row("processing", &[(10, "a", 50, "lock_expired"), (50, "b", 0, "running")]);
        assert_eq!(broken(&operations, &rows), ["I2"]);
        // An extension counts as well.
        let extend = Call::Extend { token: 10, claim_id: "a".into() };
        let operations = [
            op((1, 2), claim("a"), acquired(10, 1)),
            op((3, 4), extend, Reply::Extended { expires: 300 }),
            op((5, 6), claim("b"), acquired(200, 2)),
        ];
        let rows = row("processing", &[(10, "a", 200, "lock_expired"), (200, "b", 0, "running")]);
        assert_eq!(broken(&operations, &rows), ["I2"]);
    }

    #[test]
    fn a_grant_without_a_row_is_found() {
        assert!(broken(&[op((1, 2), claim("a"), acquired(10, 1))], &Default::default()).contains(&"I5"));
    }
}
