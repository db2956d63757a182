//! The process's own layer: bounded by bytes, entries live a minute at most (C6).

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use quick_cache::{Weighter, sync};

use super::entry::{Completion, Entry, KeyDigest};
use crate::event::{Claim, Digest, StoredResult, Time};

const STRIPES: usize = 64;
/// In whole seconds of age, which may be one short of the truth.
const AGE_MAX_SECS: u32 = 59;

pub(super) struct Memory {
    entries: Option<sync::Cache<KeyDigest, Held, ByBytes>>,
    /// One writer at a time per stripe: comparing and putting must be one step.
    stripes: [Mutex<()>; STRIPES],
    began: Instant,
}

/// An entry in little room. Claim ids with one mark are left to the ledger. Of a payload's digest its beginning is compared: a
/// difference is counted, and refuses nothing. A fingerprint, which does refuse, is kept whole.
#[derive(Clone)]
struct Held {
    fencing_token: i64,
    end_time: i64,
    /// The first bytes of the payload's digest, where there is one.
    payload: u64,
    /// Fingerprint, and a result that is more than its code.
    rest: Option<Box<Rest>>,
    code: i32,
    /// Of the claim that completed the event. Two claims with one of these: the ledger tells them apart.
    claim: u32,
    /// Seconds since the layer was made.
    since: u32,
    attempts_shown: bool,
    has_payload: bool,
    has_result: bool,
}

#[derive(Clone)]
struct Rest {
    fingerprint: Option<Digest>,
    content_type: Box<str>,
    /// A copy: what came with a message would keep all of the message's buffer.
    body: Box<[u8]>,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<KeyDigest, Held> for ByBytes {
    fn weight(&self, _: &KeyDigest, held: &Held) -> u64 {
        // The key, the entry, and what the table needs for each.
        const OVERHEAD: usize = size_of::<KeyDigest>() + size_of::<Held>() + 32;
        let rest =
            held.rest.as_ref().map_or(0, |rest| size_of::<Rest>() + rest.content_type.len() + rest.body.len() + 32);
        u64::try_from(OVERHEAD + rest).unwrap_or(u64::MAX)
    }
}

impl Held {
    fn of(entry: &Entry, since: u32) -> Held {
        let result = entry.result.as_ref();
        let large = result.is_some_and(|result| !(result.body.is_empty() && result.content_type.is_empty()));
        Held {
            fencing_token: entry.fencing_token,
            end_time: entry.end_time.0,
            payload: entry.payload_digest.as_ref().map_or(0, beginning),
            rest: (large || entry.fingerprint.is_some()).then(|| {
                Box::new(Rest {
                    fingerprint: entry.fingerprint,
                    content_type: result.map(|result| result.content_type.as_str().into()).unwrap_or_default(),
                    body: result.map(|result| result.body.as_ref().into()).unwrap_or_default(),
                })
            }),
            code: result.map_or(0, |result| result.code),
            claim: mark(&entry.claim_id),
            since,
            attempts_shown: entry.is_answerable(),
            has_payload: entry.payload_digest.is_some(),
            has_result: result.is_some(),
        }
    }

    /// As [`Entry::answer`].
    fn answer(&self, claim: &Claim) -> Option<Completion> {
        let fingerprint = self.rest.as_ref().and_then(|rest| rest.fingerprint);
        let other_fingerprint =
            matches!((fingerprint, claim.fingerprint), (Some(known), Some(given)) if known != given);
        let other_payload =
            self.has_payload && claim.payload_digest.as_ref().is_some_and(|given| beginning(given) != self.payload);
        let plain = self.attempts_shown
            && !other_fingerprint
            && !other_payload
            && claim.delivery_id.is_none()
            && mark(&claim.claim_id) != self.claim;
        plain.then(|| Completion {
            fencing_token: self.fencing_token,
            attempt_count: 1,
            end_time: Time(self.end_time),
            result: self.has_result.then(|| match &self.rest {
                Some(rest) => StoredResult {
                    code: self.code,
                    body: Bytes::copy_from_slice(&rest.body),
                    content_type: rest.content_type.as_ref().to_owned(),
                },
                None => StoredResult { code: self.code, body: Bytes::new(), content_type: String::new() },
            }),
        })
    }
}

fn beginning(digest: &Digest) -> u64 {
    let (beginning, _) = digest.split_first_chunk::<8>().expect("a digest has 32 bytes");
    u64::from_be_bytes(*beginning)
}

/// 32 bits of a claim id (FNV-1a).
fn mark(claim_id: &str) -> u32 {
    claim_id.bytes().fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

impl Memory {
    pub(super) fn new(bytes_max: u64) -> Memory {
        let entries = (bytes_max > 0).then(|| {
            // Grows as it is used: an idle process should not pay for the full size.
            sync::Cache::with_weighter(1_024, bytes_max, ByBytes)
        });
        Memory { entries, stripes: [const { Mutex::new(()) }; STRIPES], began: Instant::now() }
    }

    fn now(&self) -> u32 {
        // 136 years.
        u32::try_from(self.began.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    fn is_old(&self, held: &Held) -> bool {
        self.now().saturating_sub(held.since) >= AGE_MAX_SECS
    }

    /// Whether the event is known, and the answer if the claim is a plain duplicate of it.
    pub(super) fn answer(&self, digest: KeyDigest, claim: &Claim) -> Option<Option<Completion>> {
        let entries = self.entries.as_ref()?;
        let held = entries.get(&digest)?;
        if self.is_old(&held) {
            entries.remove(&digest);
            return None;
        }
        Some(held.answer(claim))
    }

    /// Keeps an entry, unless one with a higher token is there: a slow caller must not undo what a quicker one knows.
    pub(super) fn put(&self, digest: KeyDigest, entry: &Entry) {
        let Some(entries) = &self.entries else { return };
        let stripe = &self.stripes[digest.stripe(STRIPES)];
        let _held = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        let newer =
            entries.peek(&digest).is_some_and(|held| held.fencing_token > entry.fencing_token && !self.is_old(&held));
        if !newer {
            entries.insert(digest, Held::of(entry, self.now()));
        }
    }

    /// Lets go of an event.
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
    use super::*;
    use crate::event::{Key, Micros};

    fn claim() -> Claim {
        Claim {
            key: Key { tenant: "default".into(), provider: "stripe".into(), event_id: "evt_1".into() },
            event_type: "t".into(),
            claim_id: "claim-2".into(),
            holder: String::new(),
            lock_duration: Micros(1),
            fingerprint: None,
            metadata: None,
            payload_digest: None,
            delivery_id: None,
            attempts_max: 100,
            waiting: false,
        }
    }

    fn entry(fencing_token: i64) -> Entry {
        Entry {
            tombstone: false,
            fencing_token,
            attempt_count: 1,
            end_time: Time(5),
            claim_id: "claim-1".into(),
            fingerprint: Some([1; 32]),
            payload_digest: Some([3; 32]),
            result: Some(StoredResult { code: 200, body: "done".into(), content_type: "text/plain".into() }),
        }
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
        for entry in &entries {
            for claim in &claims {
                assert_eq!(Held::of(entry, 0).answer(claim), entry.answer(claim), "{entry:?} {claim:?}");
            }
        }
    }

    #[test]
    fn an_entry_never_replaces_a_newer_one() {
        let memory = Memory::new(1 << 20);
        let digest = KeyDigest::of(&claim().key);
        memory.put(digest, &Entry::tombstone(8, Time(0)));
        memory.put(digest, &entry(7));
        assert_eq!(memory.answer(digest, &claim()), Some(None));
        memory.put(digest, &entry(9));
        assert_eq!(memory.answer(digest, &claim()), Some(entry(9).answer(&claim())));
        memory.forget(digest);
        assert_eq!(memory.answer(digest, &claim()), None);
    }

    #[test]
    fn a_cached_event_is_small_and_all_of_them_are_bounded() {
        assert!(size_of::<Held>() <= 48, "{}", size_of::<Held>());
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
