//! I6, for the fingerprint: the first grant that gives one fixes it, and callers with another are told nothing but that (S8).

use super::{Findings, One};
use crate::chaos::{
    client::fingerprint,
    history::{Call, Reply},
};

/// Of one event.
pub(crate) fn check(one: &One<'_>, findings: &mut Findings) {
    let fixed = one.row.and_then(|row| row.attempts.iter().find_map(|attempt| fingerprint(&attempt.claim_id)));
    for operation in &one.operations {
        let (Call::Claim { claim_id }, Some(reply)) = (&operation.call, operation.reply()) else { continue };
        let Some(given) = fingerprint(claim_id) else {
            findings.check(*reply != Reply::FingerprintMismatch, "I6", one.event, || {
                format!("{claim_id} came with no fingerprint, and was told that it is another")
            });
            continue;
        };
        // Before the first grant everybody is told the same, and answers that decided nothing say nothing about it.
        let other = fixed.is_some_and(|fixed| fixed != given);
        match reply {
            Reply::FingerprintMismatch => findings.check(other, "I6", one.event, || {
                format!("{claim_id} was told that its fingerprint is another, which it is not")
            }),
            Reply::AlreadyCompleted { .. } | Reply::Acquired { .. } => {
                findings.check(!other, "I6", one.event, || format!("{claim_id} has another fingerprint: {reply:?}"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::made::*;
    use crate::chaos::{client::with_fingerprint, history::Reply};

    #[test]
    fn an_answer_about_what_another_fingerprint_meant_is_found() {
        let (first, other) = (with_fingerprint("a", 1), with_fingerprint("b", 2));
        let rows = row("completed", &[(10, &first, 15, "completed")]);
        let found = |claim_id: &str, reply: Reply| {
            let operations = [
                op((1, 2), claim(&first), acquired(10, 1)),
                op((3, 4), mark(10, &first, crate::chaos::history::Ending::Completed), DONE),
                op((5, 6), claim(claim_id), reply),
            ];
            broken(&operations, &rows)
        };
        let same = with_fingerprint("c", 1);
        assert_eq!(found(&other, Reply::FingerprintMismatch), [""; 0]);
        assert_eq!(found(&same, Reply::AlreadyCompleted { token: 10 }), [""; 0]);
        assert_eq!(found("c", Reply::AlreadyCompleted { token: 10 }), [""; 0]);
        assert_eq!(found(&other, Reply::AlreadyCompleted { token: 10 }), ["I6"]);
        assert_eq!(found(&same, Reply::FingerprintMismatch), ["I6"]);
        assert_eq!(found("c", Reply::FingerprintMismatch), ["I6"]);
    }
}
