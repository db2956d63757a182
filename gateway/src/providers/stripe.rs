//! Stripe: `Stripe-Signature: t=…,v1=…[,v1=…]`, HMAC-SHA256 in lower-case hex over `t`, a full stop and the body.
//!
//! The key is the whole text of the secret with its `whsec_`; nothing is base64-decoded. Where the official libraries
//! differ, this follows the strictest: exactly one `t`, digits only, the limit in both directions, no blanks, lower-case
//! hex.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hmac::Hmac;
use http::{HeaderMap, HeaderName};
use oncegate_runtime::secret::Secret;
use sha2::Sha256;
use smallvec::SmallVec;

use super::{
    Refusal,
    credentials::{self, Timestamp},
};
use crate::key::{Members, Paths};

/// What names an event: `id` alone. The id of the object in it would swallow repeated partial refunds.
pub(crate) static MEMBERS: Members = Members {
    paths: Paths::new(&[&["id"], &["type"]]),
    key: &[&[0]],
    naming: 0,
    sent_id: &[0],
    event_type: &[1],
    shape: None,
};

const HEADER: HeaderName = HeaderName::from_static("stripe-signature");

/// Passed on to the application (G7).
pub(crate) static SIGNATURE_HEADERS: [HeaderName; 1] = [HEADER];

/// How many signatures of one header are looked at. Stripe sends one per active secret; the cap bounds the work that a
/// stranger can cause (providers.md 12.4).
const SIGNATURES_MAX: usize = 16;

/// How old, or how far in the future, a signature may be by default: what Stripe's libraries use.
pub const TOLERANCE: Duration = Duration::from_secs(300);

/// The keyed hash with the key already absorbed: cloning it costs a copy, not two compressions.
type KeyState = Hmac<Sha256>;

/// Stripe with its secrets.
pub struct Stripe {
    keys: credentials::Keys<KeyState>,
    tolerance: Duration,
}

impl Stripe {
    /// Accepts what is signed with any of `secrets`, at most `tolerance` before or after the clock. Without a secret
    /// everything is refused with `missing_secret`.
    #[must_use]
    pub fn new(secrets: &[Secret], tolerance: Duration) -> Self {
        Self { keys: credentials::Keys::new(credentials::hmac_keys(secrets)), tolerance }
    }

    pub(super) fn replace_secrets(&self, secrets: &[Secret]) {
        self.keys.replace(credentials::hmac_keys(secrets));
    }

    pub(super) fn begin(&self, headers: &HeaderMap) -> Result<Verification, Refusal> {
        let keys = self.keys.get()?;
        let signature = Signature::parse(credentials::single(headers, &HEADER)?)?;
        Ok(Verification { keys, signature, tolerance: self.tolerance })
    }
}

impl fmt::Debug for Stripe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stripe").field("tolerance", &self.tolerance).finish_non_exhaustive()
    }
}

/// The parsed header.
struct Signature {
    timestamp: Timestamp,
    /// While a secret is replaced there are two.
    candidates: SmallVec<[[u8; 32]; 2]>,
}

impl Signature {
    fn parse(value: &[u8]) -> Result<Self, Refusal> {
        let mut timestamp = None;
        let mut candidates = SmallVec::new();
        let mut signatures = 0;
        for item in value.split(|&byte| byte == b',') {
            let Some(equals) = item.iter().position(|&byte| byte == b'=') else { continue };
            let (scheme, value) = (&item[..equals], &item[equals + 1..]);
            match scheme {
                b"t" if timestamp.is_none() => timestamp = Some(value),
                b"t" => return Err(Refusal::MalformedHeader),
                b"v1" => {
                    signatures += 1;
                    if signatures > SIGNATURES_MAX {
                        return Err(Refusal::MalformedHeader);
                    }
                    // What does not decode matches nothing, like in the official libraries.
                    candidates.extend(credentials::lower_hex(value));
                }
                // Stripe may add other schemes. v0 is for test events: accepting it would be a downgrade.
                _ => {}
            }
        }
        let timestamp = timestamp.and_then(Timestamp::parse).ok_or(Refusal::MalformedHeader)?;
        if signatures == 0 {
            return Err(Refusal::MalformedHeader);
        }
        Ok(Self { timestamp, candidates })
    }
}

/// A request of Stripe's whose headers were read.
pub struct Verification {
    keys: Arc<[KeyState]>,
    signature: Signature,
    tolerance: Duration,
}

impl Verification {
    /// The place of the secret that matched.
    pub(super) fn finish(self, body: &[u8], now: SystemTime) -> Result<usize, Refusal> {
        let parts: [&[u8]; 3] = [self.signature.timestamp.text(), b".", body];
        let secret = credentials::hmac_matches(&self.keys, &parts, &self.signature.candidates);
        let secret = secret.ok_or(Refusal::BadSignature)?;
        // After the signature, so that the reason can be trusted (providers.md 12.5).
        if !self.signature.timestamp.is_within(self.tolerance, now) {
            return Err(Refusal::TimestampOutOfTolerance);
        }
        Ok(secret)
    }
}

impl fmt::Debug for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verification").field("timestamp", &self.signature.timestamp).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use hmac::{KeyInit as _, Mac as _};
    use http::HeaderValue;

    use super::*;

    const NOW: u64 = 1_770_000_000;
    const BODY: &[u8] = br#"{"id":"evt_1","type":"charge.succeeded"}"#;

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    fn sign(key: &str, timestamp: &str) -> String {
        let mut mac = KeyState::new_from_slice(key.as_bytes()).unwrap();
        mac.update(timestamp.as_bytes());
        mac.update(b".");
        mac.update(BODY);
        hex::encode(mac.finalize().into_bytes())
    }

    fn verdict(stripe: &Stripe, values: &[&[u8]]) -> Result<(), Refusal> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(HEADER, HeaderValue::from_bytes(value).unwrap());
        }
        let now = UNIX_EPOCH + Duration::from_secs(NOW);
        stripe.begin(&headers).and_then(|verification| verification.finish(BODY, now)).map(drop)
    }

    // T38
    #[test]
    fn headers_that_are_not_exactly_the_scheme_are_refused() {
        let stripe = Stripe::new(&[secret("whsec_a")], TOLERANCE);
        let t = NOW.to_string();
        let v1 = sign("whsec_a", &t);
        let zeros = format!("00{t}");
        for (value, wanted) in [
            (format!("t={t},v1={v1}"), Ok(())),
            (format!("v1={v1},t={t}"), Ok(())),
            (format!("t={t},v1=zz,v1={v1},v9=x,junk,"), Ok(())),
            (format!("t={t},t={t},v1={v1}"), Err(Refusal::MalformedHeader)),
            (format!("t={t},v10={v1}"), Err(Refusal::MalformedHeader)),
            (format!("t={t}, v1={v1}"), Err(Refusal::MalformedHeader)),
            (format!("t={t}"), Err(Refusal::MalformedHeader)),
            (format!("t=,v1={v1}"), Err(Refusal::MalformedHeader)),
            (format!("t={t}abc,v1={v1}"), Err(Refusal::MalformedHeader)),
            (format!("t=-{t},v1={v1}"), Err(Refusal::MalformedHeader)),
            (format!("t=+{t},v1={v1}"), Err(Refusal::MalformedHeader)),
            (format!("t=99999999999999999999,v1={v1}"), Err(Refusal::MalformedHeader)),
            ("".to_owned(), Err(Refusal::MalformedHeader)),
            (format!("t={zeros},v1={v1}"), Err(Refusal::BadSignature)),
            (format!("t={t},v1={}", v1.to_uppercase()), Err(Refusal::BadSignature)),
            (format!("t={t},v1={v1}=junk"), Err(Refusal::BadSignature)),
            (format!("t={t},v1={}", &v1[..62]), Err(Refusal::BadSignature)),
            (format!("t={t},v1="), Err(Refusal::BadSignature)),
            (format!("t={t}{}", ",v1=00".repeat(17)), Err(Refusal::MalformedHeader)),
            (format!("t={t}{},v1={v1}", ",v1=00".repeat(15)), Ok(())),
        ] {
            assert_eq!(verdict(&stripe, &[value.as_bytes()]), wanted, "{value}");
        }
        let good = format!("t={t},v1={v1}");
        assert_eq!(verdict(&stripe, &[good.as_bytes(), good.as_bytes()]), Err(Refusal::MalformedHeader));
        assert_eq!(verdict(&stripe, &[b"t=\xff\xfe,v1=\x80"]), Err(Refusal::MalformedHeader));
        assert_eq!(verdict(&stripe, &[]), Err(Refusal::MissingHeader));
    }

    #[test]
    fn any_of_several_secrets_matches_any_of_several_signatures() {
        let stripe = Stripe::new(&[secret("whsec_old"), secret("whsec_new")], TOLERANCE);
        let t = NOW.to_string();
        for key in ["whsec_old", "whsec_new"] {
            let value = format!("t={t},v1={},v1={}", sign("whsec_other", &t), sign(key, &t));
            assert_eq!(verdict(&stripe, &[value.as_bytes()]), Ok(()), "{key}");
        }
        let value = format!("t={t},v1={}", sign("whsec_other", &t));
        assert_eq!(verdict(&stripe, &[value.as_bytes()]), Err(Refusal::BadSignature));
    }

    #[test]
    fn replaced_secrets_hold_from_the_next_request() {
        let stripe = Stripe::new(&[secret("whsec_old")], TOLERANCE);
        let t = NOW.to_string();
        let value = format!("t={t},v1={}", sign("whsec_new", &t));
        assert_eq!(verdict(&stripe, &[value.as_bytes()]), Err(Refusal::BadSignature));
        stripe.replace_secrets(&[secret("whsec_new")]);
        assert_eq!(verdict(&stripe, &[value.as_bytes()]), Ok(()));
    }

    #[test]
    fn without_a_secret_everything_is_refused() {
        let t = NOW.to_string();
        let value = format!("t={t},v1={}", sign("", &t));
        assert_eq!(verdict(&Stripe::new(&[], TOLERANCE), &[value.as_bytes()]), Err(Refusal::MissingSecret));
    }

    #[test]
    fn the_limit_holds_in_both_directions() {
        let stripe = Stripe::new(&[secret("k")], Duration::from_secs(300));
        for (timestamp, wanted) in [
            (NOW - 300, Ok(())),
            (NOW + 300, Ok(())),
            (NOW - 301, Err(Refusal::TimestampOutOfTolerance)),
            (NOW + 301, Err(Refusal::TimestampOutOfTolerance)),
            (0, Err(Refusal::TimestampOutOfTolerance)),
            (999_999_999_999, Err(Refusal::TimestampOutOfTolerance)),
        ] {
            let t = timestamp.to_string();
            let value = format!("t={t},v1={}", sign("k", &t));
            assert_eq!(verdict(&stripe, &[value.as_bytes()]), wanted, "{t}");
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let shown = format!("{:?}", Stripe::new(&[secret("whsec_abc")], TOLERANCE));
        assert!(!shown.contains("abc"), "{shown}");
    }
}
