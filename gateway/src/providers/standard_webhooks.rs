//! Standard Webhooks (standardwebhooks.com, also known from Svix), for your own services and anybody else who signs like
//! this: `webhook-id`, `webhook-timestamp` and `webhook-signature: v1,… v1a,…` over id, time and body, joined by full
//! stops.
//!
//! `v1` is HMAC-SHA256 with the base64-decoded part of `whsec_…`, `v1a` is Ed25519 with the public key in `whpk_…`; both
//! are in base64. The id is signed and stays the same over retries, so it names the event.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::Hmac;
use http::{HeaderMap, HeaderName};
use oncegate_api::limits::EVENT_ID_BYTES_MAX;
use oncegate_runtime::secret::Secret;
use sha2::Sha256;
use smallvec::SmallVec;

use super::{
    BadSecret, Refusal,
    credentials::{self, Timestamp},
};
use crate::{
    key::{Members, Paths},
    signing::{self, BadKey},
};

/// The type stands in the body; the id comes from the header.
pub(crate) static MEMBERS: Members =
    Members { paths: Paths::new(&[&["type"]]), key: &[], naming: 0, sent_id: &[], event_type: &[0], shape: None };

const ID: HeaderName = HeaderName::from_static("webhook-id");
const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const OLD_ID: HeaderName = HeaderName::from_static("svix-id");
const OLD_TIMESTAMP: HeaderName = HeaderName::from_static("svix-timestamp");
const OLD_SIGNATURE: HeaderName = HeaderName::from_static("svix-signature");

/// Passed on to the application (G7), unless the gateway signs the hop, which uses these names itself.
pub(crate) static SIGNATURE_HEADERS: [HeaderName; 6] = [ID, TIMESTAMP, SIGNATURE, OLD_ID, OLD_TIMESTAMP, OLD_SIGNATURE];

/// How many entries of one header are looked at: the cap bounds the work that a stranger can cause (providers.md 12.4).
const SIGNATURES_MAX: usize = 16;

/// How old, or how far in the future, a signature may be by default: what the specification's libraries use.
pub const TOLERANCE: Duration = Duration::from_secs(300);

/// Standard Webhooks with its secrets.
pub struct StandardWebhooks {
    keys: credentials::Keys<Key>,
    tolerance: Duration,
}

#[derive(Clone)]
enum Key {
    Hmac(Hmac<Sha256>),
    Ed25519([u8; 32]),
}

impl StandardWebhooks {
    /// Accepts what is signed with any of `secrets`, at most `tolerance` before or after the clock. Without a secret
    /// everything is refused with `missing_secret`.
    ///
    /// # Errors
    ///
    /// A secret is not a key.
    pub fn new(secrets: &[Secret], tolerance: Duration) -> Result<Self, BadSecret> {
        Ok(Self { keys: credentials::Keys::new(keys(secrets)?), tolerance })
    }

    pub(super) fn replace_secrets(&self, secrets: &[Secret]) -> Result<(), BadSecret> {
        self.keys.replace(keys(secrets)?);
        Ok(())
    }

    pub(super) fn begin(&self, headers: &HeaderMap) -> Result<Verification, Refusal> {
        let keys = self.keys.get()?;
        // One set of names or the other, never a mixture: what was signed together arrives together.
        let old = [OLD_ID, OLD_TIMESTAMP, OLD_SIGNATURE];
        let new = [ID, TIMESTAMP, SIGNATURE];
        let any = |names: &[HeaderName; 3]| names.iter().any(|name| headers.contains_key(name));
        let names = match (any(&new), any(&old)) {
            (true, true) => return Err(Refusal::MalformedHeader),
            (false, true) => old,
            (_, false) => new,
        };
        let [id, timestamp, signatures] = names.each_ref().map(|name| credentials::single(headers, name));
        let (id, timestamp, signatures) = all_present(id, timestamp, signatures)?;
        // With a full stop in it, an old message could be read as a new one with another id and time under the same
        // signature.
        let permitted = |byte: &u8| (0x21..=0x7E).contains(byte) && *byte != b'.';
        if !(1..=EVENT_ID_BYTES_MAX).contains(&id.len()) || !id.iter().all(permitted) {
            return Err(Refusal::MalformedHeader);
        }
        let timestamp = Timestamp::parse(timestamp).ok_or(Refusal::MalformedHeader)?;
        let candidates = Candidates::parse(signatures)?;
        Ok(Verification {
            keys,
            id: String::from_utf8_lossy(id).into_owned(),
            timestamp,
            candidates,
            tolerance: self.tolerance,
        })
    }
}

/// A missing header is reported before a malformed one.
fn all_present<T>(
    id: Result<T, Refusal>,
    timestamp: Result<T, Refusal>,
    signatures: Result<T, Refusal>,
) -> Result<(T, T, T), Refusal> {
    for part in [&id, &timestamp, &signatures] {
        if let Err(Refusal::MissingHeader) = part {
            return Err(Refusal::MissingHeader);
        }
    }
    Ok((id?, timestamp?, signatures?))
}

impl fmt::Debug for StandardWebhooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StandardWebhooks").field("tolerance", &self.tolerance).finish_non_exhaustive()
    }
}

/// Base64 with or without `whsec_`, or a public key after `whpk_`. A secret is decoded in any case: used as text it would
/// never match.
fn keys(secrets: &[Secret]) -> Result<Arc<[Key]>, BadSecret> {
    secrets
        .iter()
        .map(|secret| {
            const NOT_BASE64: BadSecret =
                BadSecret::new("not base64; write whsec_ and base64, or whpk_ and a public key");
            let text = signing::text_of(secret);
            if let Some(text) = text.strip_prefix("whpk_") {
                let key = signing::BASE64.decode(text).map_err(|_| NOT_BASE64)?;
                return key
                    .try_into()
                    .map(Key::Ed25519)
                    .map_err(|_| BadSecret::new("not a public key: Ed25519 has 32 bytes"));
            }
            let key =
                signing::symmetric_key(text, "a secret of Standard Webhooks is short").map_err(|bad| match bad {
                    BadKey::NotBase64 => NOT_BASE64,
                    BadKey::Empty => BadSecret::new("holds no key"),
                })?;
            Ok(Key::Hmac(key.state()))
        })
        .collect()
}

/// The signatures in the header, by scheme.
#[derive(Default)]
struct Candidates {
    hmac: SmallVec<[[u8; 32]; 2]>,
    ed25519: Vec<[u8; 64]>,
}

impl Candidates {
    fn parse(value: &[u8]) -> Result<Self, Refusal> {
        let mut candidates = Self::default();
        let mut entries = 0;
        let mut known = 0;
        for entry in value.split(|&byte| byte == b' ').filter(|entry| !entry.is_empty()) {
            entries += 1;
            if entries > SIGNATURES_MAX {
                return Err(Refusal::MalformedHeader);
            }
            let Some(comma) = entry.iter().position(|&byte| byte == b',') else { continue };
            let (version, text) = (&entry[..comma], &entry[comma + 1..]);
            // What does not decode matches nothing. The specification may add other versions.
            match version {
                b"v1" => {
                    known += 1;
                    candidates.hmac.extend(decode::<32>(text));
                }
                b"v1a" => {
                    known += 1;
                    candidates.ed25519.extend(decode::<64>(text));
                }
                _ => {}
            }
        }
        if known == 0 {
            return Err(Refusal::MalformedHeader);
        }
        Ok(candidates)
    }
}

fn decode<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    if text.len() != N.div_ceil(3) * 4 {
        return None;
    }
    STANDARD.decode(text).ok()?.try_into().ok()
}

/// A request whose headers were read.
pub struct Verification {
    keys: Arc<[Key]>,
    id: String,
    timestamp: Timestamp,
    candidates: Candidates,
    tolerance: Duration,
}

impl Verification {
    /// The id, which names the event, and the place of the secret that matched.
    pub(super) fn finish(self, body: &[u8], now: SystemTime) -> Result<(String, usize), Refusal> {
        let parts: [&[u8]; 5] = [self.id.as_bytes(), b".", self.timestamp.text(), b".", body];
        let mut first = None;
        for (place, key) in self.keys.iter().enumerate() {
            let matched = match key {
                Key::Hmac(key) => {
                    credentials::hmac_matches(std::slice::from_ref(key), &parts, &self.candidates.hmac).is_some()
                }
                // The key is public: there is nothing to learn from the time.
                Key::Ed25519(key) if !self.candidates.ed25519.is_empty() => {
                    let message = parts.concat();
                    let key = UnparsedPublicKey::new(&ED25519, key);
                    self.candidates.ed25519.iter().any(|sig| key.verify(&message, sig).is_ok())
                }
                Key::Ed25519(_) => false,
            };
            if matched {
                first = first.or(Some(place));
            }
        }
        let secret = first.ok_or(Refusal::BadSignature)?;
        // After the signature, so that the reason can be trusted (providers.md 12.5).
        if !self.timestamp.is_within(self.tolerance, now) {
            return Err(Refusal::TimestampOutOfTolerance);
        }
        Ok((self.id, secret))
    }
}

impl fmt::Debug for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verification").field("timestamp", &self.timestamp).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use hmac::{KeyInit as _, Mac as _};
    use http::HeaderValue;

    use super::*;

    const NOW: u64 = 1_770_000_000;
    const BODY: &[u8] = br#"{"type":"invoice.paid"}"#;
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    fn sign(id: &str, timestamp: &str) -> String {
        let key = STANDARD.decode(SECRET.strip_prefix("whsec_").unwrap()).unwrap();
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        mac.update(format!("{id}.{timestamp}.").as_bytes());
        mac.update(BODY);
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }

    fn verdict(secrets: &[&str], headers: &[(&str, &str)]) -> Result<String, Refusal> {
        let secrets: Vec<_> = secrets.iter().map(|text| secret(text)).collect();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let standard = StandardWebhooks::new(&secrets, TOLERANCE).unwrap();
        standard.begin(&map)?.finish(BODY, UNIX_EPOCH + Duration::from_secs(NOW)).map(|(id, _)| id)
    }

    fn with(id: &str, timestamp: &str, signature: &str) -> Result<String, Refusal> {
        let headers = [("webhook-id", id), ("webhook-timestamp", timestamp), ("webhook-signature", signature)];
        verdict(&[SECRET], &headers)
    }

    #[test]
    fn id_and_time_are_what_was_signed_and_nothing_else() {
        let t = NOW.to_string();
        assert_eq!(with("msg_1", &t, &sign("msg_1", &t)), Ok("msg_1".to_owned()));
        // An old message read as a new one with another id and time.
        let body = format!("{t}.{}", String::from_utf8_lossy(BODY));
        assert_ne!(body.as_bytes(), BODY);
        for (id, timestamp, wanted) in [
            ("msg.1", &*t, Refusal::MalformedHeader),
            ("msg 1", &t, Refusal::MalformedHeader),
            ("", &t, Refusal::MalformedHeader),
            (&"m".repeat(256), &t, Refusal::MalformedHeader),
            ("msg_1", "-9223372036854775808", Refusal::MalformedHeader),
            ("msg_1", "99999999999999999999", Refusal::MalformedHeader),
            ("msg_1", "1770000000.5", Refusal::MalformedHeader),
            ("msg_1", "", Refusal::MalformedHeader),
        ] {
            assert_eq!(with(id, timestamp, &sign(id, timestamp)), Err(wanted), "{id} {timestamp}");
        }
        assert_eq!(with("msg_2", &t, &sign("msg_1", &t)), Err(Refusal::BadSignature));
        for (timestamp, wanted) in [
            (NOW - 300, Ok(())),
            (NOW + 300, Ok(())),
            (NOW - 301, Err(Refusal::TimestampOutOfTolerance)),
            (NOW + 301, Err(Refusal::TimestampOutOfTolerance)),
        ] {
            let t = timestamp.to_string();
            assert_eq!(with("msg_1", &t, &sign("msg_1", &t)).map(drop), wanted, "{t}");
        }
    }

    #[test]
    fn any_of_several_signatures_matches_and_unknown_versions_are_skipped() {
        let t = NOW.to_string();
        let good = sign("m", &t);
        for (signature, wanted) in [
            (format!("v2,x v1a,AAAA v1,AAAA {good}"), Ok(())),
            (format!("junk  {good} "), Ok(())),
            (good.replace("v1,", "v10,"), Err(Refusal::MalformedHeader)),
            (good.replace("v1,", "v1a,"), Err(Refusal::BadSignature)),
            ("v1,".to_owned(), Err(Refusal::BadSignature)),
            (good.trim_end_matches('=').to_owned(), Err(Refusal::BadSignature)),
            (format!("{} {good}", "v1,x ".repeat(16)), Err(Refusal::MalformedHeader)),
            (String::new(), Err(Refusal::MalformedHeader)),
        ] {
            assert_eq!(with("m", &t, &signature).map(drop), wanted, "{signature}");
        }
    }

    #[test]
    fn the_older_names_are_taken_but_not_mixed() {
        let t = NOW.to_string();
        let good = sign("m", &t);
        let old = [("svix-id", "m"), ("svix-timestamp", &*t), ("svix-signature", &*good)];
        assert!(verdict(&[SECRET], &old).is_ok());
        for missing in 0..3 {
            let mut headers = old.to_vec();
            let (name, value) = headers.remove(missing);
            assert_eq!(verdict(&[SECRET], &headers), Err(Refusal::MissingHeader), "{name}");
            let new = name.replace("svix", "webhook");
            headers.push((&new, value));
            assert_eq!(verdict(&[SECRET], &headers), Err(Refusal::MalformedHeader), "{new}");
        }
        let twice = [&old[..], &old[..1]].concat();
        assert_eq!(verdict(&[SECRET], &twice), Err(Refusal::MalformedHeader));
    }

    #[test]
    fn ed25519_verifies_with_a_public_key() {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let public = format!("whpk_{}", STANDARD.encode(pair.public_key().as_ref()));
        let t = NOW.to_string();
        let message = [b"m.", t.as_bytes(), b".", BODY].concat();
        let signature = format!("v1a,{}", STANDARD.encode(pair.sign(&message).as_ref()));
        let headers = [("webhook-id", "m"), ("webhook-timestamp", &*t), ("webhook-signature", &*signature)];
        assert!(verdict(&[SECRET, &public], &headers).is_ok());
        assert_eq!(verdict(&[SECRET], &headers), Err(Refusal::BadSignature));
        let other = format!("whpk_{}", STANDARD.encode([1; 32]));
        assert_eq!(verdict(&[&other], &headers), Err(Refusal::BadSignature));
    }

    #[test]
    fn what_is_no_key_is_refused_and_a_bad_reload_changes_nothing() {
        for text in ["whsec_???", "whsec_", "not base64", "whpk_AAAA", "whpk_"] {
            assert!(StandardWebhooks::new(&[secret(text)], TOLERANCE).is_err(), "{text}");
        }
        let unpadded = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        assert!(StandardWebhooks::new(&[secret(unpadded)], TOLERANCE).is_ok());
        let standard = StandardWebhooks::new(&[secret(SECRET)], TOLERANCE).unwrap();
        let error = standard.replace_secrets(&[secret("hunter2!")]).unwrap_err();
        assert!(!error.to_string().contains("hunter2"));
        assert_eq!(standard.keys.get().unwrap().len(), 1);
    }
}
