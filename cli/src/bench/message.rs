//! The messages of the load, encoded once: what changes from call to call is written into a copy, so that the generator
//! uses little of the machine it measures.

use bytes::{BufMut as _, Bytes, BytesMut};
use oncegate_api::v1::{CheckAndLockRequest, EventKey, MarkCompletedRequest, Result as Outcome};
use prost::Message;

use super::connection::PREFIX_BYTES;

/// The tenant of every event that the load writes.
pub(super) const TENANT: &str = "bench";
/// The type of every such event: a common one, so that rows have a typical length.
pub(super) const EVENT_TYPE: &str = "payment_intent.succeeded";

const EVENT_DIGITS: usize = 12;
const CALLER_DIGITS: usize = 5;
/// As many events as the digits can distinguish.
const EVENTS: u64 = 1_000_000_000_000;
/// The number of `fencing_token` in MarkCompletedRequest, which is appended to the encoded rest: protobuf has no order.
const FENCING_TOKEN_FIELD: u32 = 2;

/// A message behind its prefix, with gaps where the event's and the claim's numbers go.
#[derive(Clone, Debug)]
struct Template {
    bytes: Vec<u8>,
    event: usize,
    claim: usize,
}

impl Template {
    fn new(message: &impl Message) -> Self {
        let mut bytes = vec![0; PREFIX_BYTES];
        message.encode(&mut bytes).expect("a vector grows");
        let find = |hole: &[u8]| bytes.windows(hole.len()).position(|window| window == hole);
        let event = find(hole('#', EVENT_DIGITS).as_bytes()).expect("the event id was encoded");
        let claim = find(hole('@', EVENT_DIGITS + CALLER_DIGITS).as_bytes()).expect("the claim id was encoded");
        Self { bytes, event, claim }
    }

    /// A copy with the numbers filled in, and room for `more` bytes.
    fn fill(&self, event: u64, caller: u32, more: usize) -> BytesMut {
        let event = scatter(event);
        let mut bytes = BytesMut::with_capacity(self.bytes.len() + more);
        bytes.extend_from_slice(&self.bytes);
        digits(&mut bytes[self.event..self.event + EVENT_DIGITS], event);
        let (claim, of_caller) =
            bytes[self.claim..self.claim + EVENT_DIGITS + CALLER_DIGITS].split_at_mut(EVENT_DIGITS);
        digits(claim, event);
        digits(of_caller, caller.into());
        bytes
    }
}

fn hole(filler: char, length: usize) -> String {
    std::iter::repeat_n(filler, length).collect()
}

/// A permutation of the numbers: providers' identifiers do not arrive in the order of the index either. 3^14 has no
/// divisor in common with a power of ten.
fn scatter(event: u64) -> u64 {
    const FACTOR: u64 = 4_782_969;
    (event % EVENTS) * FACTOR % EVENTS
}

/// The last digits of a number, padded with zeros.
fn digits(place: &mut [u8], mut number: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).expect("a digit");
        number /= 10;
    }
}

/// The event id for a number, within a run.
pub(super) fn event_id(run: &str, event: u64) -> String {
    format!("bench-{run}-{event:0width$}", event = scatter(event), width = EVENT_DIGITS)
}

/// The two calls of one attempt, with what a gateway sends along, and a little metadata.
#[derive(Clone, Debug)]
pub(super) struct Messages {
    claim: Template,
    complete: Template,
}

impl Messages {
    /// For the events of one run.
    pub(super) fn new(run: &str, provider: &str) -> Self {
        let key = EventKey {
            tenant: TENANT.to_owned(),
            provider: provider.to_owned(),
            event_id: format!("bench-{run}-{}", hole('#', EVENT_DIGITS)),
        };
        let claim_id = hole('@', EVENT_DIGITS + CALLER_DIGITS);
        let text =
            |text: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.to_owned())) };
        let claim = CheckAndLockRequest {
            key: Some(key.clone()),
            event_type: EVENT_TYPE.to_owned(),
            claim_id: claim_id.clone(),
            holder: "oncegate-bench".to_owned(),
            lock_duration: Some(prost_types::Duration { seconds: 300, nanos: 0 }),
            fingerprint: Bytes::new(),
            metadata: Some(prost_types::Struct {
                fields: [("currency".to_owned(), text("eur")), ("amount".to_owned(), text("4200"))].into(),
            }),
            wait_duration: None,
            payload_digest: Bytes::from_static(&[7; 32]),
            delivery_id: String::new(),
        };
        let complete = MarkCompletedRequest {
            key: Some(key),
            fencing_token: 0,
            result: Some(Outcome {
                code: 200,
                body: Bytes::from_static(br#"{"booked":true}"#),
                content_type: "application/json".to_owned(),
            }),
            metadata: None,
            claim_id,
        };
        Self { claim: Template::new(&claim), complete: Template::new(&complete) }
    }

    /// CheckAndLock by a caller of an event, with its prefix.
    pub(super) fn claim(&self, event: u64, caller: u32) -> Bytes {
        prefixed(self.claim.fill(event, caller, 0))
    }

    /// MarkCompleted for what the same caller was granted, with its prefix.
    pub(super) fn complete(&self, event: u64, caller: u32, fencing_token: i64) -> Bytes {
        let mut bytes = self.complete.fill(event, caller, 16);
        prost::encoding::int64::encode(FENCING_TOKEN_FIELD, &fencing_token, &mut bytes);
        prefixed(bytes)
    }
}

/// Writes the prefix of a message that is complete: not compressed, and so long.
fn prefixed(mut bytes: BytesMut) -> Bytes {
    let length = u32::try_from(bytes.len() - PREFIX_BYTES).expect("some hundred bytes");
    (&mut bytes[1..PREFIX_BYTES]).put_u32(length);
    bytes.freeze()
}

/// The parts of CheckAndLockResponse that the load reads; the rest is skipped.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ClaimAnswer {
    /// `decision`.
    #[prost(int32, tag = "1")]
    pub(super) decision: i32,
    /// `lock`.
    #[prost(message, optional, tag = "2")]
    pub(super) lock: Option<Grant>,
}

/// The parts of Lock that the load reads.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Grant {
    /// `fencing_token`.
    #[prost(int64, tag = "1")]
    pub(super) fencing_token: i64,
}

/// The parts of MarkCompletedResponse that the load reads: none.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Acknowledged {}

#[cfg(test)]
mod tests {
    use oncegate_api::v1::{CheckAndLockResponse, Decision, Lock};

    use super::*;

    #[test]
    fn what_is_filled_in_decodes_as_the_contract_says() {
        let messages = Messages::new("0af3", "stripe");
        let decode = |bytes: Bytes| {
            let (prefix, message) = bytes.split_at(PREFIX_BYTES);
            assert_eq!(prefix, [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..]].concat());
            bytes.slice(PREFIX_BYTES..)
        };
        let claim = CheckAndLockRequest::decode(decode(messages.claim(42, 7))).unwrap();
        let key = claim.key.unwrap();
        assert_eq!((key.tenant.as_str(), key.provider.as_str()), (TENANT, "stripe"));
        assert_eq!(key.event_id, "bench-0af3-000200884698");
        assert_eq!(key.event_id, event_id("0af3", 42));
        assert_eq!(claim.claim_id, "00020088469800007");
        let complete = MarkCompletedRequest::decode(decode(messages.complete(42, 7, 1_764_000_000_000_001))).unwrap();
        assert_eq!(complete.key.unwrap().event_id, key.event_id);
        assert_eq!(complete.fencing_token, 1_764_000_000_000_001);
        assert_eq!(complete.claim_id, claim.claim_id);
    }

    #[test]
    fn scattered_numbers_stay_apart() {
        let mut seen = std::collections::HashSet::new();
        for event in (0..1_000).chain(900_000_000_000..900_000_001_000).chain([EVENTS - 1]) {
            assert!(scatter(event) < EVENTS && seen.insert(scatter(event)), "{event}");
        }
    }

    #[test]
    fn the_part_of_the_answer_that_is_read_is_read() {
        let answer = CheckAndLockResponse {
            decision: Decision::Acquired.into(),
            lock: Some(Lock { fencing_token: 99, attempt: 1, claim_id: "c".into(), ..Lock::default() }),
            ..CheckAndLockResponse::default()
        };
        let read = ClaimAnswer::decode(&*answer.encode_to_vec()).unwrap();
        assert_eq!((read.decision, read.lock.unwrap().fencing_token), (i32::from(Decision::Acquired), 99));
    }
}
