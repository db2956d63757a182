//! The forms of the hot statement. All are made of the same parts: starting a plan costs about as much as a handful of items,
//! so a batch with only claims does not start what marks need, and where recent claims were all of new events, it does not
//! start what known ones need. Single items, as most calls are outside a storm, have forms of their own.

use super::{Claims, HotItem};

/// A part of the statement, by file.
macro_rules! part {
    ($name:literal) => {
        include_str!(concat!($name, ".sql"))
    };
}

// Parameters: the slot ($1); claims ($2 to $12); marks ($13 on). The forms for known events and for single items have their
// own.

/// Claims of events that may be known.
const CLAIMS: &str = concat!(
    "with\n",
    part!("claims"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    part!("counts_end"),
    part!("answer_seen"),
    "union all\n",
    part!("answer_fresh"),
);

/// Claims of events that are expected to be new.
const NEW: &str = concat!(
    "with\n",
    part!("new"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    part!("counts_end"),
    part!("answer_new"),
);

const MARKS: &str = concat!(
    "with\n",
    part!("marks"),
    ",\n",
    part!("counts_begin"),
    part!("counts_marks"),
    part!("counts_end"),
    part!("answer_marks_alone"),
);

const OWN_COMPLETIONS: &str = concat!(
    "with\n",
    part!("own_completions"),
    ",\n",
    part!("counts_begin"),
    part!("counts_own_completions"),
    part!("counts_end"),
    part!("answer_own_completions_alone"),
);

// Claims and marks together. Rows are changed in the order of the answers, and every form has marks before claims: otherwise
// two sidecars could deadlock, one holding a marked event and the other a new one.

const CLAIMS_AND_MARKS: &str = concat!(
    "with\n",
    part!("claims"),
    ",\n",
    part!("marks"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    "union all\n",
    part!("counts_marks"),
    part!("counts_end"),
    part!("answer_marks"),
    "union all\n",
    part!("answer_seen"),
    "union all\n",
    part!("answer_fresh"),
);

const NEW_AND_MARKS: &str = concat!(
    "with\n",
    part!("new"),
    ",\n",
    part!("marks"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    "union all\n",
    part!("counts_marks"),
    part!("counts_end"),
    part!("answer_marks"),
    "union all\n",
    part!("answer_fresh"),
);

const NEW_AND_OWN_COMPLETIONS: &str = concat!(
    "with\n",
    part!("new"),
    ",\n",
    part!("own_completions"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    "union all\n",
    part!("counts_own_completions"),
    part!("counts_end"),
    part!("answer_own_completions"),
    "union all\n",
    part!("answer_new_beside"),
);

/// Claims of events that are expected to be known, and no marks.
const KNOWN: &str = part!("known");

/// One claim of an event that is expected to be new.
pub(super) const CLAIM_ALONE: &str = part!("claim_alone");

/// One completion of an event that is being processed.
pub(super) const COMPLETION_ALONE: &str = part!("completion_alone");

/// One completion of a grant of this process.
pub(super) const OWN_COMPLETION_ALONE: &str = part!("own_completion_alone");

/// A form for more than one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Claims,
    New,
    Known,
    Marks,
    /// Only completions of grants of this process.
    OwnCompletions,
    ClaimsAndMarks,
    NewAndMarks,
    NewAndOwnCompletions,
}

impl Form {
    /// The form for these items, given what is expected of their claims.
    pub(super) fn of(items: &[HotItem], claims: Claims) -> Form {
        let (mut any_claim, mut any_mark, mut own) = (false, false, true);
        for item in items {
            match item {
                HotItem::Claim(_) => any_claim = true,
                HotItem::Mark(_, grant) => {
                    any_mark = true;
                    own &= grant.is_some();
                }
            }
        }
        match (any_claim, any_mark, claims) {
            (false, _, _) if own => Form::OwnCompletions,
            (false, _, _) => Form::Marks,
            (true, false, Claims::New) => Form::New,
            (true, false, Claims::Any) => Form::Claims,
            (true, false, Claims::Known) => Form::Known,
            (true, true, Claims::New) if own => Form::NewAndOwnCompletions,
            (true, true, Claims::New) => Form::NewAndMarks,
            (true, true, Claims::Any | Claims::Known) => Form::ClaimsAndMarks,
        }
    }

    pub(super) fn sql(self) -> &'static str {
        match self {
            Form::Claims => CLAIMS,
            Form::New => NEW,
            Form::Known => KNOWN,
            Form::Marks => MARKS,
            Form::OwnCompletions => OWN_COMPLETIONS,
            Form::ClaimsAndMarks => CLAIMS_AND_MARKS,
            Form::NewAndMarks => NEW_AND_MARKS,
            Form::NewAndOwnCompletions => NEW_AND_OWN_COMPLETIONS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_both_changes_marked_events_before_it_adds_new_ones() {
        let fresh = [part!("answer_fresh"), part!("answer_new_beside")];
        let marks = [part!("answer_marks"), part!("answer_own_completions")];
        for form in [Form::ClaimsAndMarks, Form::NewAndMarks, Form::NewAndOwnCompletions] {
            let answers = form.sql().split_once(part!("counts_end")).unwrap().1;
            let first = |parts: [&str; 2]| parts.iter().filter_map(|part| answers.find(part)).min().unwrap();
            assert!(first(marks) < first(fresh), "{answers}");
        }
    }
}
