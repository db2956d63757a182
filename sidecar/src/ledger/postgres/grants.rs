//! Grants of this process that may soon be completed here, as most are. The completion of one names its row, and is told only
//! what others may have changed since (`hot/own_completions.sql`), at half the cost.
//!
//! Nothing is decided by what is kept here: the statement asks for the token and the state like any other. A grant that is not
//! kept, because another process made it or it was long ago, is completed by its key.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;

use crate::event::{Ending, Event, FencingToken, Mark};

/// Events as they were granted, by token: the latest, within bounds.
#[derive(Default)]
pub(super) struct Grants {
    events: HashMap<FencingToken, Box<Event>, RandomState>,
    /// The tokens in the order of the grants; also of some that are no longer there.
    order: VecDeque<FencingToken>,
    bytes: usize,
}

impl Grants {
    /// How many are kept: enough for what is processed at one time, if that takes no longer than a call.
    const COUNT_MAX: usize = 4_096;
    /// What they may take, nearly all of it metadata.
    const BYTES_MAX: usize = 4 << 20;

    /// Keeps an event as it was just granted, and drops the oldest beyond the bounds.
    pub(super) fn keep(&mut self, event: &Event) {
        if let Some(before) = self.events.insert(event.fencing_token, Box::new(event.clone())) {
            self.bytes -= bytes(&before);
        } else {
            self.order.push_back(event.fencing_token);
        }
        self.bytes += bytes(event);
        while self.events.len() > Self::COUNT_MAX || self.bytes > Self::BYTES_MAX {
            let Some(oldest) = self.order.pop_front() else { break };
            self.remove(oldest);
        }
        if self.order.len() > 2 * Self::COUNT_MAX {
            self.order.retain(|token| self.events.contains_key(token));
        }
    }

    /// Takes out the event that a mark completes, if the mark is a completion and the event is kept.
    pub(super) fn take(&mut self, mark: &Mark) -> Option<Box<Event>> {
        let Ending::Completed { .. } = mark.ending else { return None };
        let event = self.events.get(&mark.fencing_token)?;
        let claim_id = event.latest.as_ref().map(|latest| latest.claim_id.as_str());
        let same = event.key == mark.key && mark.claim_id.as_deref().is_none_or(|given| claim_id == Some(given));
        if same { self.remove(mark.fencing_token) } else { None }
    }

    fn remove(&mut self, token: FencingToken) -> Option<Box<Event>> {
        let event = self.events.remove(&token)?;
        self.bytes -= bytes(&event);
        Some(event)
    }
}

/// About what an event takes.
fn bytes(event: &Event) -> usize {
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    size_of::<Event>() + text(&event.metadata) + text(&event.completion_metadata) + text(&event.last_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Claim, FailureKind, RowId, Time, fixture};

    fn event(token: i64, metadata: Option<String>) -> Event {
        Event::inserted(
            &Claim { metadata, ..fixture::claim("evt", "claim") },
            RowId(token),
            FencingToken(token),
            Time(token),
        )
    }

    fn mark(token: i64) -> Mark {
        let ending = Ending::Completed { metadata: None };
        Mark {
            key: fixture::key("evt"),
            fencing_token: FencingToken(token),
            claim_id: None,
            ending,
            result: None,
            attempts_max: None,
        }
    }

    #[test]
    fn only_a_completion_by_its_holder_takes_a_grant_and_once() {
        let mut grants = Grants::default();
        grants.keep(&event(7, None));
        let failed = Ending::Failed { kind: FailureKind::Terminal, error: None, retry_after: None };
        let other = fixture::key("another");
        for not_it in [
            mark(8),
            Mark { ending: failed, ..mark(7) },
            Mark { claim_id: Some("another".into()), ..mark(7) },
            Mark { key: other, ..mark(7) },
        ] {
            assert_eq!(grants.take(&not_it), None, "{not_it:?}");
        }
        let taken = grants.take(&Mark { claim_id: Some("claim".into()), ..mark(7) });
        assert_eq!(taken.map(|event| *event), Some(event(7, None)));
        assert_eq!(grants.take(&mark(7)), None);
        assert_eq!(grants.bytes, 0);
    }

    #[test]
    fn the_oldest_go_beyond_a_number_and_beyond_a_size_and_nothing_is_left_of_what_was_taken() {
        let (mut grants, count) = (Grants::default(), i64::try_from(Grants::COUNT_MAX).unwrap());
        for token in 0..count + 9 {
            grants.keep(&event(token, None));
        }
        assert!(grants.take(&mark(8)).is_none() && grants.take(&mark(9)).is_some());
        // One that is never completed stands in front.
        for token in count + 9..9 * count {
            grants.keep(&event(token, None));
            assert!(grants.take(&mark(token)).is_some());
            assert!(grants.order.len() <= 2 * Grants::COUNT_MAX);
        }
        let mut grants = Grants::default();
        let large = || Some("x".repeat(Grants::BYTES_MAX / 4));
        for token in 0..4 {
            grants.keep(&event(token, large()));
            assert!(grants.bytes <= Grants::BYTES_MAX);
        }
        assert!(grants.take(&mark(0)).is_none() && grants.take(&mark(3)).is_some());
    }
}
