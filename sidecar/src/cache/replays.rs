//! What was taken back: completed events that an operator replayed by force. A genuine entry from before such a replay may come
//! back at any time (a failover of Redis that lost its last second, a snapshot, somebody's SET) and verifies as it did; so
//! every process knows the replays themselves, from the ledger, and believes no entry that is older than one (C7).

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    event::{FencingToken, KeyDigest, Time},
    ledger::{REPLAYS_MAX, Replayed},
};

/// How long the cache answers after it began to read what was replayed: no answer is further behind an acknowledged replay.
pub const BEHIND_MAX: Duration = Duration::from_secs(2);

/// See the module. Bounded: beyond [`REPLAYS_MAX`] events the oldest replays become one token that voids all before it.
#[derive(Default)]
pub(super) struct Replays {
    /// By event, the token that its latest replay drew.
    tokens: HashMap<KeyDigest, FencingToken>,
    /// Whatever has this token or a lower one is void.
    floor: FencingToken,
    latest: Option<Latest>,
}

/// The latest read of the ledger.
struct Latest {
    began: Instant,
    /// The database's clock when it was made.
    now: Time,
    bookmark: Option<Arc<str>>,
}

impl Replays {
    /// Adds what was read, beginning at a moment.
    pub(super) fn add(&mut self, began: Instant, read: Replayed) {
        self.forget_up_to(read.floor);
        for (digest, fencing_token) in read.events {
            self.raise(digest, fencing_token);
        }
        self.latest = Some(Latest { began, now: read.now, bookmark: read.bookmark });
    }

    /// An event was decided on: entries with this token and lower ones are void.
    pub(super) fn raise(&mut self, digest: KeyDigest, fencing_token: FencingToken) {
        if fencing_token <= self.floor {
            return;
        }
        let known = self.tokens.entry(digest).or_insert(fencing_token);
        *known = fencing_token.max(*known);
        if self.tokens.len() > REPLAYS_MAX {
            // A tenth at a time, so that it is not done for each.
            let mut tokens: Vec<FencingToken> = self.tokens.values().copied().collect();
            let (_, &mut token, _) = tokens.select_nth_unstable(REPLAYS_MAX / 10);
            self.forget_up_to(token);
        }
    }

    /// Forgets the individual events of tokens up to this one: all entries with such a token are void instead.
    fn forget_up_to(&mut self, token: FencingToken) {
        if token > self.floor {
            self.floor = token;
            self.tokens.retain(|_, known| *known > token);
        }
    }

    /// The token up to which entries of the event are void.
    pub(super) fn replayed(&self, digest: KeyDigest) -> FencingToken {
        self.tokens.get(&digest).map_or(self.floor, |token| *token)
    }

    /// The database's clock at a moment; None where more may have been replayed by then than is known here.
    pub(super) fn now(&self, at: Instant) -> Option<Time> {
        let latest = self.latest.as_ref()?;
        let since = at.saturating_duration_since(latest.began);
        (since < BEHIND_MAX).then(|| latest.now.plus(since.into()))
    }

    /// Where to read on; None: from the beginning.
    pub(super) fn bookmark(&self) -> Option<Arc<str>> {
        self.latest.as_ref().and_then(|latest| latest.bookmark.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Key, Micros};

    fn digest(number: usize) -> KeyDigest {
        let key = Key { tenant: "default".into(), provider: "stripe".into(), event_id: number.to_string() };
        KeyDigest::of(&key)
    }

    #[test]
    fn the_highest_replay_of_an_event_stands() {
        let mut replays = Replays::default();
        assert_eq!(replays.replayed(digest(1)), FencingToken::NONE);
        for token in [7, 9, 8].map(FencingToken) {
            replays.raise(digest(1), token);
        }
        assert_eq!((replays.replayed(digest(1)), replays.replayed(digest(2))), (FencingToken(9), FencingToken::NONE));
    }

    #[test]
    fn nothing_is_known_before_the_first_read_and_when_the_last_one_is_old() {
        let mut replays = Replays::default();
        let began = Instant::now();
        assert_eq!(replays.now(began), None);
        let bookmark = Some(Arc::from("here"));
        replays.add(
            began,
            Replayed {
                now: Time(1_000),
                events: vec![(digest(1), FencingToken(5))],
                floor: FencingToken::NONE,
                bookmark,
            },
        );
        assert_eq!(replays.now(began + Duration::from_micros(30)), Some(Time(1_030)));
        assert_eq!(replays.now(began + BEHIND_MAX), None);
        let last = BEHIND_MAX - Duration::from_micros(1);
        assert_eq!(replays.now(began + last), Some(Time(999).plus(Micros::from(BEHIND_MAX))));
        assert_eq!(replays.bookmark().as_deref(), Some("here"));
        assert_eq!(replays.replayed(digest(1)), FencingToken(5));
    }

    #[test]
    fn beyond_the_bound_the_oldest_become_one_token_that_voids_all_before_it() {
        let token = |number| FencingToken(1_000 + i64::try_from(number).expect("a small number"));
        let mut replays = Replays::default();
        for number in 0..=REPLAYS_MAX {
            replays.raise(digest(number), token(number));
            assert!(replays.tokens.len() <= REPLAYS_MAX);
        }
        // Of those that were let go, and of an event that was never replayed: as void as before, or more so.
        let floor = replays.replayed(digest(usize::MAX));
        assert!(floor > token(0) && replays.replayed(digest(0)) == floor, "{floor}");
        let last = token(REPLAYS_MAX);
        assert!(floor < last && replays.replayed(digest(REPLAYS_MAX)) == last);
        replays.raise(digest(usize::MAX), floor);
        assert_eq!(replays.replayed(digest(usize::MAX)), floor);
        // What the ledger has no room for either.
        let read = Replayed { now: Time(0), events: Vec::new(), floor: last, bookmark: None };
        replays.add(Instant::now(), read);
        assert_eq!((replays.tokens.len(), replays.replayed(digest(REPLAYS_MAX))), (0, last));
    }
}
