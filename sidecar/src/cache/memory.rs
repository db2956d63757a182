//! The process's own layer: bounded by bytes, entries live a minute at most (C6).

use std::{
    hash::BuildHasher as _,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use quick_cache::{
    Weighter,
    sync::{self, DefaultLifecycle},
};

use super::entry::{Completion, Entry, Known};
use crate::event::{Claim, Digest, FencingToken, KeyDigest, Payload, StoredResult, Time};

const STRIPES: usize = 64;
/// In whole seconds of age, which may be one short of the truth.
const AGE_MAX_SECS: u32 = 59;

pub(super) struct Memory {
    entries: Option<sync::Cache<KeyDigest, Held, ByBytes, RandomState>>,
    /// One writer at a time per stripe: comparing and putting must be one step.
    stripes: [Mutex<()>; STRIPES],
    common: Common,
    began: Instant,
}

/// An entry in little room. Claim ids that share a mark are left to the ledger. Only the beginning of a payload's digest is
/// compared: a difference is counted, and refuses nothing. A payload that was hashed for the comparison and is the same leaves
/// a mark in its digest's place, so that it need not be hashed when it comes again. A fingerprint, which does refuse, is kept
/// whole.
#[derive(Clone)]
struct Held {
    fencing_token: FencingToken,
    end_time: i64,
    /// Fingerprint and result, where there is either.
    rest: Option<Arc<Rest>>,
    /// Of the payload: what the stamp says it is.
    payload: u16,
    /// A mark of the claim that completed the event. Two claims that share one are told apart by the ledger.
    claim: u16,
    stamp: Stamp,
}

/// When an entry was put, in seconds since the layer was made, and three flags above them: [`Entry::is_answerable`], and whether
/// there is a digest of the payload, or a mark of it.
#[derive(Clone, Copy)]
struct Stamp(u32);

impl Stamp {
    const IS_ANSWERABLE: u32 = 1 << 31;
    const HAS_DIGEST: u32 = 1 << 30;
    const HAS_MARK: u32 = 1 << 29;
    /// 17 years; beyond them everything is old.
    const SINCE: u32 = Self::HAS_MARK - 1;

    fn new(since: u32, is_answerable: bool, has_digest: bool) -> Stamp {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        Stamp(since.min(Self::SINCE) | flag(is_answerable, Self::IS_ANSWERABLE) | flag(has_digest, Self::HAS_DIGEST))
    }

    /// The same, with a mark of the payload in its digest's place.
    fn marked(self) -> Stamp {
        Stamp(self.0 & !Self::HAS_DIGEST | Self::HAS_MARK)
    }

    fn since(self) -> u32 {
        self.0 & Self::SINCE
    }

    fn is_answerable(self) -> bool {
        self.0 & Self::IS_ANSWERABLE != 0
    }

    /// Whether the first bytes of the payload's digest are kept.
    fn has_digest(self) -> bool {
        self.0 & Self::HAS_DIGEST != 0
    }

    /// Whether a mark of the payload is kept, by the hasher of this process.
    fn has_mark(self) -> bool {
        self.0 & Self::HAS_MARK != 0
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Rest {
    fingerprint: Option<Digest>,
    result: Option<StoredResult>,
}

impl Rest {
    fn of(entry: &Entry) -> Option<Rest> {
        (entry.fingerprint.is_some() || entry.result.is_some()).then(|| Rest {
            fingerprint: entry.fingerprint,
            result: entry.result.as_ref().map(|result| StoredResult {
                // A copy: what came with a message would keep all of the message's buffer.
                body: Bytes::copy_from_slice(&result.body),
                content_type: result.content_type.as_str().to_owned(),
                code: result.code,
            }),
        })
    }

    fn bytes(&self) -> usize {
        self.result.as_ref().map_or(0, |result| result.content_type.len() + result.body.len())
    }
}

/// Results that many events end with (an application's `{"received": true}`), so that all of them share one.
struct Common {
    hasher: RandomState,
    slots: [Mutex<Option<Arc<Rest>>>; Common::SLOTS],
}

impl Common {
    const SLOTS: usize = 64;
    /// Larger ones are not shared.
    const BYTES_MAX: usize = 256;

    fn new() -> Common {
        Common { hasher: RandomState::default(), slots: [const { Mutex::new(None) }; Self::SLOTS] }
    }

    /// The shared copy, if an equal one was seen recently.
    fn share(&self, rest: Rest) -> Arc<Rest> {
        if rest.fingerprint.is_some() || rest.bytes() > Self::BYTES_MAX {
            return Arc::new(rest);
        }
        let place =
            usize::try_from(self.hasher.hash_one(&rest) % Self::SLOTS as u64).expect("a slot's number is small");
        let mut slot = self.slots[place].lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some(known) if **known == rest => known.clone(),
            _ => slot.insert(Arc::new(rest)).clone(),
        }
    }
}

/// What the process's own layer has to say to a claim.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    /// The event is not known here.
    Nothing,
    /// The claim is a plain duplicate of the event, and this is its answer.
    Duplicate(Completion),
    /// The event is known, and the claim is the ledger's to judge.
    Referred,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<KeyDigest, Held> for ByBytes {
    fn weight(&self, _: &KeyDigest, held: &Held) -> u64 {
        // The key, the entry, and what the table needs for each.
        const OVERHEAD: usize = size_of::<KeyDigest>() + size_of::<Held>() + 32;
        // In full, even where it is shared: the last entry that shares it has it alone.
        let rest = held.rest.as_ref().map_or(0, |rest| size_of::<Rest>() + rest.bytes() + 32);
        u64::try_from(OVERHEAD + rest).unwrap_or(u64::MAX)
    }
}

impl Held {
    fn of(entry: &Entry, since: u32, common: &Common) -> Held {
        Held {
            fencing_token: entry.fencing_token,
            end_time: entry.end_time.0,
            rest: Rest::of(entry).map(|rest| common.share(rest)),
            payload: entry.payload_digest.as_ref().map_or(0, beginning),
            claim: claim_mark(&entry.claim_id),
            stamp: Stamp::new(since, entry.is_answerable(), entry.payload_digest.is_some()),
        }
    }

    /// As [`Entry::answer`]; not for a claim with a digest, where only the payload's mark is left.
    fn answer(&self, claim: &Claim) -> Option<Completion> {
        let known = Known {
            is_answerable: self.stamp.is_answerable(),
            fingerprint: self.rest.as_ref().and_then(|rest| rest.fingerprint.as_ref()),
            payload: self.stamp.has_digest().then_some(self.payload),
            claim: self.claim,
        };
        let payload = claim.payload_digest.as_ref().map(beginning);
        known.has_duplicate(claim, payload, claim_mark(&claim.claim_id)).then(|| Completion {
            fencing_token: self.fencing_token,
            attempt_count: 1,
            end_time: Time(self.end_time),
            result: self.rest.as_ref().and_then(|rest| rest.result.clone()),
        })
    }
}

fn beginning(digest: &Digest) -> u16 {
    let (beginning, _) = digest.split_first_chunk::<2>().expect("a digest has 32 bytes");
    u16::from_be_bytes(*beginning)
}

/// 16 bits of a claim id (FNV-1a, folded).
fn claim_mark(claim_id: &str) -> u16 {
    let hash = claim_id.bytes().fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let [a, b, c, d] = hash.to_be_bytes();
    u16::from_be_bytes([a ^ c, b ^ d])
}

impl Memory {
    pub(super) fn new(bytes_max: u64) -> Memory {
        let entries = (bytes_max > 0).then(|| {
            // Not as many as will fit: the table grows with use in any case, and half as many again of those that were dropped
            // would be remembered beside its bound.
            sync::Cache::with(1_024, bytes_max, ByBytes, RandomState::default(), DefaultLifecycle::default())
        });
        Memory { entries, stripes: [const { Mutex::new(()) }; STRIPES], common: Common::new(), began: Instant::now() }
    }

    /// A moment in seconds since the beginning.
    fn seconds(&self, now: Instant) -> u32 {
        // 136 years.
        u32::try_from(now.saturating_duration_since(self.began).as_secs()).unwrap_or(u32::MAX)
    }

    fn is_old(&self, held: &Held, now: Instant) -> bool {
        let since = held.stamp.since();
        since == Stamp::SINCE || self.seconds(now).saturating_sub(since) >= AGE_MAX_SECS
    }

    /// What is known `now` of the event that a claim is about.
    pub(super) fn answer(&self, digest: KeyDigest, claim: &Claim, now: Instant) -> Found {
        let Some(held) = self.get(digest, now) else { return Found::Nothing };
        // With nothing left to compare a digest with, it is the ledger's to judge.
        let compares = !(held.stamp.has_mark() && claim.payload_digest.is_some());
        let answer = if compares { held.answer(claim) } else { None };
        answer.map_or(Found::Referred, Found::Duplicate)
    }

    /// The event's token, if a claim that says nothing but its payload is a plain duplicate `now`. The payload is hashed unless
    /// that was done before.
    pub(super) fn duplicated(&self, digest: KeyDigest, payload: Payload<'_>, now: Instant) -> Option<FencingToken> {
        let held = self.get(digest, now)?;
        if !held.stamp.is_answerable() {
            return None;
        }
        if held.stamp.has_mark() {
            return (self.payload_mark(payload) == held.payload).then_some(held.fencing_token);
        }
        if held.stamp.has_digest() {
            if beginning(&(payload.digest)()) != held.payload {
                return None;
            }
            self.put_mark(digest, &held, self.payload_mark(payload));
        }
        Some(held.fencing_token)
    }

    /// What a payload is known by within this process, at a tenth of the cost of its digest.
    fn payload_mark(&self, payload: Payload<'_>) -> u16 {
        let [a, b, ..] = self.common.hasher.hash_one(payload.bytes).to_ne_bytes();
        u16::from_ne_bytes([a, b])
    }

    /// Stores a payload mark in the entry, unless the entry has changed.
    fn put_mark(&self, digest: KeyDigest, held: &Held, mark: u16) {
        let Some(entries) = &self.entries else { return };
        let stripe = &self.stripes[digest.stripe(STRIPES)];
        let _stripe = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |now: Held| now.fencing_token == held.fencing_token && now.stamp.0 == held.stamp.0;
        if entries.peek(&digest).is_some_and(is_same) {
            let marked = Held { payload: mark, stamp: held.stamp.marked(), ..held.clone() };
            // Never brings back what was dropped meanwhile: dropping takes no stripe.
            let _ = entries.replace(digest, marked, true);
        }
    }

    /// What is held of the event, unless it is too old.
    fn get(&self, digest: KeyDigest, now: Instant) -> Option<Held> {
        let entries = self.entries.as_ref()?;
        let held = entries.get(&digest)?;
        if self.is_old(&held, now) {
            entries.remove(&digest);
            return None;
        }
        Some(held)
    }

    /// Keeps an entry, unless one with a higher token is there: a slow caller must not undo what a quicker one knows.
    pub(super) fn put(&self, digest: KeyDigest, entry: &Entry) {
        let Some(entries) = &self.entries else { return };
        let stripe = &self.stripes[digest.stripe(STRIPES)];
        let _stripe = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_newer = |held: Held| held.fencing_token > entry.fencing_token && !self.is_old(&held, now);
        if !entries.peek(&digest).is_some_and(is_newer) {
            entries.insert(digest, Held::of(entry, self.seconds(now), &self.common));
        }
    }

    /// Drops an event.
    pub(super) fn forget(&self, digest: KeyDigest) {
        if let Some(entries) = &self.entries {
            entries.remove(&digest);
        }
    }

    pub(super) fn clear(&self) {
        if let Some(entries) = &self.entries {
            entries.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, time::Duration};

    use super::*;
    use crate::event::{Key, fixture};

    fn claim() -> Claim {
        fixture::claim("evt_1", "claim-2")
    }

    fn entry(fencing_token: i64) -> Entry {
        Entry {
            tombstone: false,
            fencing_token: FencingToken(fencing_token),
            attempt_count: 1,
            end_time: Time(5),
            claim_id: "claim-1".into(),
            fingerprint: Some([1; 32]),
            payload_digest: Some([3; 32]),
            result: Some(StoredResult { code: 200, body: "done".into(), content_type: "text/plain".into() }),
        }
    }

    fn duplicate(of: &Entry) -> Found {
        Found::Duplicate(of.answer(&claim()).expect("the claim is a plain duplicate"))
    }

    #[test]
    fn what_is_held_answers_as_the_entry_does() {
        let bare = Entry { fingerprint: None, payload_digest: None, result: None, ..entry(7) };
        let coded = Entry {
            result: Some(StoredResult { code: 204, body: Bytes::new(), content_type: String::new() }),
            ..bare.clone()
        };
        let entries = [
            entry(7),
            Entry { attempt_count: 2, ..entry(7) },
            Entry { tombstone: true, ..entry(7) },
            Entry { claim_id: String::new(), ..entry(7) },
            bare,
            coded,
        ];
        let claims = [
            claim(),
            Claim { claim_id: "claim-1".into(), ..claim() },
            Claim { fingerprint: Some([1; 32]), ..claim() },
            Claim { fingerprint: Some([2; 32]), ..claim() },
            Claim { payload_digest: Some([3; 32]), ..claim() },
            Claim { payload_digest: Some([4; 32]), ..claim() },
            Claim { delivery_id: Some("d".into()), ..claim() },
        ];
        let common = Common::new();
        for entry in &entries {
            for claim in &claims {
                assert_eq!(Held::of(entry, 0, &common).answer(claim), entry.answer(claim), "{entry:?} {claim:?}");
            }
            // Of a claim that says nothing but its payload.
            for digest in [[3; 32], [4; 32]] {
                let claim = Claim { claim_id: "another".into(), payload_digest: Some(digest), ..claim() };
                let memory = Memory::new(1 << 20);
                memory.put(KeyDigest::of(&claim.key), entry);
                let payload = Payload { bytes: b"{}", digest: &|| digest };
                let token = memory.duplicated(KeyDigest::of(&claim.key), payload, Instant::now());
                assert_eq!(token, entry.answer(&claim).map(|answer| answer.fencing_token), "{entry:?} {digest:?}");
            }
        }
    }

    #[test]
    fn a_payload_that_came_before_is_not_hashed_again() {
        let memory = Memory::new(1 << 20);
        let key = KeyDigest::of(&claim().key);
        let hashed = Cell::new(0);
        let duplicated = |bytes: &[u8]| {
            let digest = || {
                hashed.set(hashed.get() + 1);
                // The entry's own, of one payload alone.
                if bytes == b"one" { [3; 32] } else { [4; 32] }
            };
            let token = memory.duplicated(key, Payload { bytes, digest: &digest }, Instant::now());
            (token, hashed.take())
        };
        memory.put(key, &entry(7));
        assert_eq!(duplicated(b"two"), (None, 1));
        assert_eq!(duplicated(b"one"), (Some(FencingToken(7)), 1));
        assert_eq!(duplicated(b"one"), (Some(FencingToken(7)), 0));
        assert_eq!(duplicated(b"two"), (None, 0));
        // There is nothing left to compare a digest with.
        assert_eq!(
            memory.answer(key, &Claim { payload_digest: Some([3; 32]), ..claim() }, Instant::now()),
            Found::Referred
        );
        assert_eq!(memory.answer(key, &claim(), Instant::now()), duplicate(&entry(7)));
        // What comes from the ledger, or from Redis, has one again.
        memory.put(key, &entry(7));
        assert_eq!(duplicated(b"one"), (Some(FencingToken(7)), 1));
    }

    #[test]
    fn a_mark_is_put_on_nothing_but_what_was_compared() {
        let memory = Memory::new(1 << 20);
        let key = KeyDigest::of(&claim().key);
        let held = |token| {
            memory.put(key, &entry(token));
            memory.get(key, Instant::now()).expect("it was put")
        };
        let compared = held(7);
        memory.forget(key);
        memory.put_mark(key, &compared, 1);
        assert!(memory.get(key, Instant::now()).is_none());
        let compared = held(7);
        let newer = held(8);
        memory.put_mark(key, &compared, 1);
        assert!(memory.get(key, Instant::now()).is_some_and(|held| !held.stamp.has_mark()));
        memory.put_mark(key, &newer, 1);
        assert!(memory.get(key, Instant::now()).is_some_and(|held| held.stamp.has_mark() && held.payload == 1));
    }

    #[test]
    fn an_entry_never_replaces_a_newer_one() {
        let memory = Memory::new(1 << 20);
        let digest = KeyDigest::of(&claim().key);
        memory.put(digest, &Entry::tombstone(FencingToken(8), Time(0)));
        memory.put(digest, &entry(7));
        assert_eq!(memory.answer(digest, &claim(), Instant::now()), Found::Referred);
        memory.put(digest, &entry(9));
        assert_eq!(memory.answer(digest, &claim(), Instant::now()), duplicate(&entry(9)));
        memory.forget(digest);
        assert_eq!(memory.answer(digest, &claim(), Instant::now()), Found::Nothing);
    }

    /// C6
    #[test]
    fn an_entry_lives_for_a_minute_at_most() {
        let memory = Memory::new(1 << 20);
        let digest = KeyDigest::of(&claim().key);
        let bare = Entry { fingerprint: None, payload_digest: None, ..entry(7) };
        let duplicated =
            |now| memory.duplicated(digest, Payload { bytes: b"{}", digest: &|| unreachable!("it has none") }, now);
        let put = || {
            let before = Instant::now();
            memory.put(digest, &bare);
            (before, Instant::now())
        };
        let (before, after) = put();
        let (young, old) = (before + Duration::from_secs(58), after + Duration::from_secs(60));
        assert_eq!(memory.answer(digest, &claim(), young), duplicate(&bare));
        assert_eq!(duplicated(young), Some(FencingToken(7)));
        assert_eq!(memory.answer(digest, &claim(), old), Found::Nothing);
        assert_eq!(memory.answer(digest, &claim(), young), Found::Nothing, "it takes no more room");
        let (_, after) = put();
        assert_eq!(duplicated(after + Duration::from_secs(60)), None);
    }

    #[test]
    fn events_with_one_result_share_it_and_others_have_their_own() {
        let common = Common::new();
        let held = |entry: Entry| Held::of(&entry, 0, &common).rest.expect("it has a result");
        let result = |body: String| StoredResult { code: 200, body: body.into(), content_type: "text/plain".into() };
        let ending = |token, result| Entry { fingerprint: None, result: Some(result), ..entry(token) };
        let small = held(ending(1, result("ok".into())));
        assert!(Arc::ptr_eq(&small, &held(ending(2, result("ok".into())))));
        let others = [
            ending(3, result("other".into())),
            ending(4, StoredResult { code: 201, ..result("ok".into()) }),
            ending(5, StoredResult { content_type: "text/html".into(), ..result("ok".into()) }),
            Entry { fingerprint: Some([1; 32]), ..ending(6, result("ok".into())) },
        ];
        for other in others {
            let expected = other.result.clone();
            let other = held(other);
            assert!(!Arc::ptr_eq(&small, &other) && other.result == expected, "{:?}", other.result);
        }
        let large = || ending(7, result("a".repeat(Common::BYTES_MAX)));
        assert!(!Arc::ptr_eq(&held(large()), &held(large())));
    }

    #[test]
    fn a_cached_event_is_small_and_all_of_them_are_bounded() {
        assert!(size_of::<Held>() <= 32, "{}", size_of::<Held>());
        let memory = Memory::new(64 << 10);
        for number in 0..10_000 {
            let key = Key { event_id: number.to_string(), ..claim().key };
            memory.put(KeyDigest::of(&key), &entry(number));
        }
        let entries = memory.entries.as_ref().expect("it holds something");
        assert!(entries.weight() <= 64 << 10, "{}", entries.weight());
        assert!(!entries.is_empty());
    }
}
