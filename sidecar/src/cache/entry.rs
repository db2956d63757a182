//! What the cache holds of an event, and how Redis has it: authenticated, and named after the database that it is true of.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::{Buf as _, BufMut as _, Bytes};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::{
    event::{Claim, Digest, Event, FencingToken, KeyDigest, Micros, StoredResult, Time},
    ledger::Standing,
};

/// Results larger than this stay in the ledger: a large value in Redis blocks its neighbours.
pub const RESULT_BYTES_MAX: usize = 4 * 1_024;

/// What is known of a completed event; or, as a tombstone, that what was known up to this token is void.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub(super) tombstone: bool,
    pub(super) fencing_token: FencingToken,
    pub(super) attempt_count: i32,
    pub(super) end_time: Time,
    /// The claim that completed it; empty where an operator did.
    pub(super) claim_id: String,
    pub(super) fingerprint: Option<Digest>,
    pub(super) payload_digest: Option<Digest>,
    pub(super) result: Option<StoredResult>,
}

/// What tells the plain duplicates of an event from other claims. Digest and claim id may be shortened to what the owner
/// compares.
pub(super) struct Known<'a, P, C> {
    /// As [`Entry::is_answerable`].
    pub(super) is_answerable: bool,
    pub(super) fingerprint: Option<&'a Digest>,
    pub(super) payload: Option<P>,
    pub(super) claim: C,
}

impl<P: PartialEq, C: PartialEq> Known<'_, P, C> {
    /// Whether a claim, with this of its payload's digest and its id, is a plain duplicate. Whatever the ledger would have to
    /// count, compare with the archive, or refuse, is not for a cache to answer.
    pub(super) fn has_duplicate(&self, claim: &Claim, payload: Option<P>, claim_id: C) -> bool {
        self.is_answerable
            && !differs(self.fingerprint, claim.fingerprint.as_ref())
            && !differs(self.payload.as_ref(), payload.as_ref())
            && claim.delivery_id.is_none()
            // A late copy of the call that got the lock is told so (S4).
            && self.claim != claim_id
    }
}

fn differs<T: PartialEq>(known: Option<T>, given: Option<T>) -> bool {
    matches!((known, given), (Some(known), Some(given)) if known != given)
}

/// What the cache tells a duplicate: what the contract says is set, and no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Of the latest grant.
    pub fencing_token: FencingToken,
    /// Attempts granted.
    pub attempt_count: i32,
    /// When the event was completed.
    pub end_time: Time,
    /// What it ended with.
    pub result: Option<StoredResult>,
}

impl Entry {
    /// Of a completed event, unless its result is too large to be kept.
    pub fn completed(event: &Event) -> Option<Entry> {
        if event.result.as_ref().is_some_and(|result| result.body.len() > RESULT_BYTES_MAX) {
            return None;
        }
        Some(Entry {
            tombstone: false,
            fencing_token: event.fencing_token,
            attempt_count: event.attempt_count,
            end_time: event.end_time.unwrap_or(event.update_time),
            claim_id: event.latest.as_ref().map(|latest| latest.claim_id.clone()).unwrap_or_default(),
            fingerprint: event.fingerprint,
            payload_digest: event.latest.as_ref().and_then(|latest| latest.payload_digest),
            result: event.result.clone(),
        })
    }

    /// Of an event that an operator decided on.
    pub fn tombstone(fencing_token: FencingToken, end_time: Time) -> Entry {
        Entry {
            tombstone: true,
            fencing_token,
            attempt_count: 0,
            end_time,
            claim_id: String::new(),
            fingerprint: None,
            payload_digest: None,
            result: None,
        }
    }

    /// Whether any claim can be answered from it: earlier attempts' claims are in the archive (S4).
    pub(super) fn is_answerable(&self) -> bool {
        !self.tombstone && self.attempt_count == 1 && !self.claim_id.is_empty()
    }

    /// The answer to a claim that is a plain duplicate.
    pub fn answer(&self, claim: &Claim) -> Option<Completion> {
        let known = Known {
            is_answerable: self.is_answerable(),
            fingerprint: self.fingerprint.as_ref(),
            payload: self.payload_digest.as_ref(),
            claim: self.claim_id.as_str(),
        };
        known.has_duplicate(claim, claim.payload_digest.as_ref(), &claim.claim_id).then(|| Completion {
            fencing_token: self.fencing_token,
            attempt_count: self.attempt_count,
            end_time: self.end_time,
            result: self.result.clone(),
        })
    }

    /// Whether it may still be believed at `now` of the database's clock, if an operator last replayed the event with the token
    /// `replayed` ([`FencingToken::NONE`]: never) and entries live for `life`. Whoever keeps it may have kept it for too long, or
    /// brought it back (C7).
    pub fn holds(&self, replayed: FencingToken, now: Time, life: Micros) -> bool {
        self.fencing_token > replayed && now.since(self.end_time) < life
    }

    /// The token that it was written under, which Redis compares (C2).
    pub fn fencing_token(&self) -> FencingToken {
        self.fencing_token
    }

    /// About how much memory it takes beyond its own size.
    pub(super) fn heap_bytes(&self) -> usize {
        let result = self.result.as_ref().map_or(0, |result| result.body.len() + result.content_type.len());
        self.claim_id.len() + result
    }
}

/// Why a value is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Too short, too long, or inconsistent.
    #[error("the value is malformed")]
    Malformed,
    /// Written by another version.
    #[error("the value has an unknown version")]
    Version,
    /// Not written by a sidecar of this database, or for another event.
    #[error("the value does not verify")]
    Tag,
}

/// The layout of a value. The token stands at a fixed place, big-endian, so that the script in Redis can compare it.
const VERSION: u8 = 1;
const TAG_BYTES: usize = 16;
const HEAD_BYTES: usize = 1 + 8 + 1 + 4 + 8 + 1;
const BODY_BYTES_MAX: usize = HEAD_BYTES + 2 * 255 + 64 + 4 + RESULT_BYTES_MAX;
/// The largest value; whatever is larger is none of ours.
pub(super) const VALUE_BYTES_MAX: usize = BODY_BYTES_MAX + TAG_BYTES;
const TOMBSTONE: u8 = 1;
const FINGERPRINT: u8 = 2;
const PAYLOAD_DIGEST: u8 = 4;
const RESULT: u8 = 8;

/// Names and authenticates entries for one database (C3).
pub struct Codec {
    prefix: String,
    mac: Hmac<Sha256>,
}

impl Codec {
    /// For the database that the ledger stands on.
    pub fn new(standing: &Standing) -> Codec {
        Codec {
            prefix: format!("oncegate:1:{}:", standing.identity),
            mac: Hmac::<Sha256>::new_from_slice(&standing.cache_key).expect("HMAC takes keys of any length"),
        }
    }

    /// The name of an event's entry.
    pub fn name(&self, digest: KeyDigest) -> String {
        let mut name = String::with_capacity(self.prefix.len() + 22);
        name.push_str(&self.prefix);
        URL_SAFE_NO_PAD.encode_string(digest.bytes(), &mut name);
        name
    }

    fn tag(&self, digest: KeyDigest, value: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        // The name with it: a value that is copied to another name does not verify.
        mac.update(self.prefix.as_bytes());
        mac.update(&digest.bytes());
        mac.update(value);
        mac
    }

    /// The value of an entry.
    pub fn encode(&self, digest: KeyDigest, entry: &Entry) -> Vec<u8> {
        let mut value = Vec::with_capacity(HEAD_BYTES + 64 + entry.heap_bytes() + 16 + TAG_BYTES);
        value.put_u8(VERSION);
        value.put_i64(entry.fencing_token.0);
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        value.put_u8(
            flag(entry.tombstone, TOMBSTONE)
                | flag(entry.fingerprint.is_some(), FINGERPRINT)
                | flag(entry.payload_digest.is_some(), PAYLOAD_DIGEST)
                | flag(entry.result.is_some(), RESULT),
        );
        value.put_i32(entry.attempt_count);
        value.put_i64(entry.end_time.0);
        put_short(&mut value, entry.claim_id.as_bytes());
        for digest in [entry.fingerprint, entry.payload_digest].into_iter().flatten() {
            value.put_slice(&digest);
        }
        if let Some(result) = &entry.result {
            value.put_i32(result.code);
            put_short(&mut value, result.content_type.as_bytes());
            value.put_slice(&result.body);
        }
        self.seal(digest, &mut value);
        value
    }

    fn seal(&self, digest: KeyDigest, value: &mut Vec<u8>) {
        let tag = self.tag(digest, value).finalize().into_bytes();
        value.put_slice(&tag[..TAG_BYTES]);
    }

    /// Seals any bytes as if a sidecar had written them: what reads behind the MAC has to be just as careful.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn sealed(&self, digest: KeyDigest, value: &[u8]) -> Vec<u8> {
        let mut value = value.to_vec();
        self.seal(digest, &mut value);
        value
    }

    /// The entry in a value that is named after `digest`. Reads nothing of it before it has verified.
    ///
    /// # Errors
    /// When the value is not one that a sidecar of this database wrote for this event.
    pub fn decode(&self, digest: KeyDigest, value: &[u8]) -> Result<Entry, DecodeError> {
        let length = value.len().checked_sub(TAG_BYTES).ok_or(DecodeError::Malformed)?;
        let (mut rest, tag) = value.split_at(length);
        if rest.len() < HEAD_BYTES || rest.len() > BODY_BYTES_MAX {
            return Err(DecodeError::Malformed);
        }
        self.tag(digest, rest).verify_truncated_left(tag).map_err(|_| DecodeError::Tag)?;
        if rest.get_u8() != VERSION {
            return Err(DecodeError::Version);
        }
        let fencing_token = FencingToken(rest.get_i64());
        let flags = rest.get_u8();
        let attempt_count = rest.get_i32();
        let end_time = Time(rest.get_i64());
        let claim_id = take_short(&mut rest)?;
        let mut digest_if = |flag: u8| -> Result<Option<Digest>, DecodeError> {
            if flags & flag == 0 {
                return Ok(None);
            }
            let (digest, after) = rest.split_first_chunk::<32>().ok_or(DecodeError::Malformed)?;
            rest = after;
            Ok(Some(*digest))
        };
        let fingerprint = digest_if(FINGERPRINT)?;
        let payload_digest = digest_if(PAYLOAD_DIGEST)?;
        let result = if flags & RESULT == 0 {
            None
        } else {
            let code = rest.try_get_i32().map_err(|_| DecodeError::Malformed)?;
            let content_type = take_short(&mut rest)?;
            Some(StoredResult { code, content_type, body: Bytes::copy_from_slice(rest) })
        };
        Ok(Entry {
            tombstone: flags & TOMBSTONE != 0,
            fencing_token,
            attempt_count,
            end_time,
            claim_id,
            fingerprint,
            payload_digest,
            result,
        })
    }
}

/// A text of at most 255 bytes; the contract's limits are below that.
fn put_short(value: &mut Vec<u8>, text: &[u8]) {
    let text = text.get(..255).unwrap_or(text);
    value.put_u8(u8::try_from(text.len()).unwrap_or(u8::MAX));
    value.put_slice(text);
}

fn take_short(rest: &mut &[u8]) -> Result<String, DecodeError> {
    let length = usize::from(rest.try_get_u8().map_err(|_| DecodeError::Malformed)?);
    let (text, after) = rest.split_at_checked(length).ok_or(DecodeError::Malformed)?;
    *rest = after;
    String::from_utf8(text.to_vec()).map_err(|_| DecodeError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Key, fixture::claim};

    fn standing(identity: &str) -> Standing {
        Standing { identity: identity.into(), generation: 1, cache_key: vec![7; 32].into() }
    }

    fn entry() -> Entry {
        Entry {
            tombstone: false,
            fencing_token: FencingToken(1_770_000_000_000_000),
            attempt_count: 1,
            end_time: Time(1_770_000_000_000_001),
            claim_id: "claim-1".into(),
            fingerprint: Some([1; 32]),
            payload_digest: None,
            result: Some(StoredResult { code: 200, body: "done".into(), content_type: "text/plain".into() }),
        }
    }

    fn digest(event_id: &str) -> KeyDigest {
        KeyDigest::of(&Key { tenant: "default".into(), provider: "stripe".into(), event_id: event_id.into() })
    }

    #[test]
    fn an_entry_comes_back_as_it_went() {
        let codec = Codec::new(&standing("a:1"));
        for entry in [
            entry(),
            Entry { tombstone: true, result: None, fingerprint: None, claim_id: String::new(), ..entry() },
            Entry { payload_digest: Some([9; 32]), result: None, ..entry() },
        ] {
            let value = codec.encode(digest("evt_1"), &entry);
            assert_eq!(codec.decode(digest("evt_1"), &value), Ok(entry));
        }
    }

    #[test]
    fn a_value_of_another_event_database_or_key_does_not_verify() {
        let codec = Codec::new(&standing("a:1"));
        let value = codec.encode(digest("evt_1"), &entry());
        assert_eq!(codec.decode(digest("evt_2"), &value), Err(DecodeError::Tag));
        assert_eq!(Codec::new(&standing("a:2")).decode(digest("evt_1"), &value), Err(DecodeError::Tag));
        let other = Codec::new(&Standing { cache_key: vec![8; 32].into(), ..standing("a:1") });
        assert_eq!(other.decode(digest("evt_1"), &value), Err(DecodeError::Tag));
    }

    #[test]
    fn a_value_with_any_bit_changed_does_not_verify() {
        let codec = Codec::new(&standing("a:1"));
        let value = codec.encode(digest("evt_1"), &entry());
        for place in 0..value.len() * 8 {
            let mut forged = value.clone();
            forged[place / 8] ^= 1 << (place % 8);
            assert!(codec.decode(digest("evt_1"), &forged).is_err(), "bit {place}");
        }
    }

    #[test]
    fn rubbish_of_any_length_is_refused() {
        let codec = Codec::new(&standing("a:1"));
        for length in 0..5_000 {
            assert!(codec.decode(digest("evt_1"), &vec![0x41; length]).is_err());
        }
    }

    #[test]
    fn what_is_older_than_a_replay_or_than_any_entry_may_be_does_not_hold() {
        let (entry, life) = (entry(), Micros(1_000));
        let (never, token) = (FencingToken::NONE, entry.fencing_token);
        let at = |micros| entry.end_time.plus(Micros(micros));
        assert!(entry.holds(never, at(999), life) && entry.holds(FencingToken(token.0 - 1), at(0), life));
        // A clock that went back a little.
        assert!(entry.holds(never, entry.end_time.minus(Micros(5)), life));
        for (why, replayed, now, life) in [
            ("replayed under its own token", token, at(0), life),
            ("replayed", FencingToken(token.0 + 1), at(0), life),
            ("too old", never, at(1_000), life),
            ("nothing is to be kept", never, at(0), Micros(-1)),
        ] {
            assert!(!entry.holds(replayed, now, life), "{why}");
        }
    }

    #[test]
    fn only_a_plain_duplicate_is_answered() {
        let claim = claim("evt_1", "claim-2");
        let entry = Entry { payload_digest: Some([3; 32]), ..entry() };
        assert!(entry.answer(&claim).is_some());
        assert!(entry.answer(&Claim { fingerprint: Some([1; 32]), ..claim.clone() }).is_some());
        for (why, other) in [
            ("another fingerprint", Claim { fingerprint: Some([2; 32]), ..claim.clone() }),
            ("another payload", Claim { payload_digest: Some([4; 32]), ..claim.clone() }),
            ("the attempt's own claim", Claim { claim_id: "claim-1".into(), ..claim.clone() }),
            ("a delivery id", Claim { delivery_id: Some("d".into()), ..claim.clone() }),
        ] {
            assert_eq!(entry.answer(&other), None, "{why}");
        }
        assert_eq!(Entry { attempt_count: 2, ..entry.clone() }.answer(&claim), None, "an archive");
        assert_eq!(Entry { tombstone: true, ..entry }.answer(&claim), None, "a tombstone");
    }
}
