//! Flutterwave, in one of two versions, chosen by configuration and without falling back from one to the other
//! (providers.md 12.7): with guessing, an attacker could choose the weak one.
//!
//! - v4: `flutterwave-signature`, HMAC-SHA256 of the body in base64, keyed with the secret hash of the dashboard.
//! - v3: `verif-hash` repeats that secret hash. It proves nothing about the body (G11, W2): whoever has seen one request
//!   can send any other.

use std::{fmt, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::Hmac;
use http::{HeaderMap, HeaderName};
use oncegate_runtime::secret::Secret;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{Refusal, credentials};
use crate::key::{Members, Paths, Shape};

/// What names an event of v4. The documentation's samples disagree about where its id stands.
pub(crate) static MEMBERS_V4: Members = Members {
    paths: Paths::new(&[&["webhook_id"], &["id"], &["type"]]),
    key: &[&[0, 1]],
    naming: 0,
    sent_id: &[0, 1],
    event_type: &[2],
    shape: None,
};

/// What names an event of v3, which carries no id of its own: charges and transfers are numbered independently, and a
/// pending charge comes again with its number when it has succeeded. Refunds carry no type either, and are told by their shape:
/// under no type at all they would share their numbers with whatever else carries none.
pub(crate) static MEMBERS_V3: Members = Members {
    paths: Paths::new(&[
        &["event"],
        &["event.type"],
        &["data", "id"],
        &["id"],
        &["data", "status"],
        &["status"],
        &["AmountRefunded"],
    ]),
    key: &[&[0, 1], &[2, 3], &[4, 5]],
    naming: 1,
    sent_id: &[],
    event_type: &[0, 1],
    shape: Some(Shape { member: 6, event_type: "refund" }),
};

const HEADER_V4: HeaderName = HeaderName::from_static("flutterwave-signature");
const HEADER_V3: HeaderName = HeaderName::from_static("verif-hash");

/// Passed on to the application (G7).
pub(crate) static SIGNATURE_HEADERS_V4: [HeaderName; 1] = [HEADER_V4];
/// Passed on to the application (G7), which has nothing else to verify with. It is the secret itself, so the network up to
/// the application has to be as trustworthy as the application.
pub(crate) static SIGNATURE_HEADERS_V3: [HeaderName; 1] = [HEADER_V3];

/// What Flutterwave sends to an endpoint. There is no default.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A header that repeats the secret. Weak.
    V3,
    /// A signature over the body.
    V4,
}

impl Version {
    /// As it is written in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V3 => "v3",
            Self::V4 => "v4",
        }
    }
}

/// Flutterwave with its secret hashes.
pub struct Flutterwave {
    scheme: Scheme,
}

enum Scheme {
    /// Digests of the secrets.
    V3(credentials::Keys<[u8; 32]>),
    V4(credentials::Keys<Hmac<Sha256>>),
}

impl Flutterwave {
    /// Accepts what `version` proves with any of `secrets`. Without one everything is refused with `missing_secret`.
    #[must_use]
    pub fn new(secrets: &[Secret], version: Version) -> Self {
        credentials::warn_of_short("flutterwave", secrets);
        let scheme = match version {
            Version::V3 => Scheme::V3(credentials::Keys::new(digests(secrets))),
            Version::V4 => Scheme::V4(credentials::Keys::new(credentials::hmac_keys(secrets))),
        };
        Self { scheme }
    }

    /// The version that it accepts.
    #[must_use]
    pub fn version(&self) -> Version {
        match self.scheme {
            Scheme::V3(_) => Version::V3,
            Scheme::V4(_) => Version::V4,
        }
    }

    pub(super) fn replace_secrets(&self, secrets: &[Secret]) {
        credentials::warn_of_short("flutterwave", secrets);
        match &self.scheme {
            Scheme::V3(keys) => keys.replace(digests(secrets)),
            Scheme::V4(keys) => keys.replace(credentials::hmac_keys(secrets)),
        }
    }

    pub(super) fn begin(&self, headers: &HeaderMap) -> Result<Verification, Refusal> {
        let inner = match &self.scheme {
            Scheme::V3(keys) => {
                let keys = keys.get()?;
                // Bytes, not text: a secret hash may be any text, in any encoding (providers.md 12.2).
                let value = credentials::single(headers, &HEADER_V3)?;
                // The body plays no part, so it need not be read when the header is wrong.
                Inner::V3 { secret: repeats_any(&keys, value).ok_or(Refusal::BadSignature)? }
            }
            Scheme::V4(keys) => {
                let keys = keys.get()?;
                let value = credentials::single(headers, &HEADER_V4)?;
                Inner::V4 { keys, candidate: decode(value).ok_or(Refusal::BadSignature)? }
            }
        };
        Ok(Verification(inner))
    }
}

impl fmt::Debug for Flutterwave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flutterwave").field("version", &self.version()).finish_non_exhaustive()
    }
}

fn digests(secrets: &[Secret]) -> Arc<[[u8; 32]]> {
    secrets.iter().map(|secret| Sha256::digest(secret.expose().as_bytes()).into()).collect()
}

/// Compared as digests, so that the time reveals neither the length nor the content of a secret (W4).
fn repeats_any(digests: &[[u8; 32]], value: &[u8]) -> Option<usize> {
    let sent: [u8; 32] = Sha256::digest(value).into();
    // To the end, whichever matches.
    digests.iter().enumerate().fold(None, |first, (place, digest)| {
        let matched: bool = digest.ct_eq(&sent).into();
        first.or(matched.then_some(place))
    })
}

/// Base64 of 32 bytes, padded. What does not decode matches nothing.
fn decode(text: &[u8]) -> Option<[u8; 32]> {
    // The length is checked first, so that a stranger's header costs no memory.
    if text.len() != 44 {
        return None;
    }
    STANDARD.decode(text).ok()?.try_into().ok()
}

/// A request of Flutterwave's whose headers were read.
pub struct Verification(Inner);

enum Inner {
    V3 { secret: usize },
    V4 { keys: Arc<[Hmac<Sha256>]>, candidate: [u8; 32] },
}

impl Verification {
    /// The place of the secret that matched.
    pub(super) fn finish(self, body: &[u8]) -> Result<usize, Refusal> {
        match self.0 {
            Inner::V3 { secret } => Ok(secret),
            Inner::V4 { keys, candidate } => {
                credentials::hmac_matches(&keys, &[body], &[candidate]).ok_or(Refusal::BadSignature)
            }
        }
    }
}

impl fmt::Debug for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verification").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use hmac::{KeyInit as _, Mac as _};
    use http::HeaderValue;

    use super::*;

    const BODY: &[u8] = br#"{"webhook_id":"wbk_1","type":"charge.completed"}"#;

    fn verdict(version: Version, secrets: &[&str], headers: &[(HeaderName, &[u8])]) -> Result<(), Refusal> {
        let secrets: Vec<_> = secrets.iter().map(|text| Secret::new(*text).unwrap()).collect();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        Flutterwave::new(&secrets, version).begin(&map)?.finish(BODY).map(drop)
    }

    fn sign(secret: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(BODY);
        STANDARD.encode(mac.finalize().into_bytes())
    }

    #[test]
    fn v3_compares_bytes_that_need_not_be_text() {
        let hash = "Ọlá's hash, 2026";
        let v3 = |value: &[u8]| verdict(Version::V3, &["other", hash], &[(HEADER_V3, value)]);
        assert_eq!(v3(hash.as_bytes()), Ok(()));
        assert_eq!(v3(b"other"), Ok(()));
        for wrong in [&b"Other"[..], b"othe", b"otherr", b"other,", b"", b"\xff\xfe"] {
            assert_eq!(v3(wrong), Err(Refusal::BadSignature), "{wrong:?}");
        }
        let twice = [(HEADER_V3, &b"other"[..]), (HEADER_V3, b"other")];
        assert_eq!(verdict(Version::V3, &["other"], &twice), Err(Refusal::MalformedHeader));
        assert_eq!(verdict(Version::V3, &[], &twice), Err(Refusal::MissingSecret));
    }

    #[test]
    fn neither_version_falls_back_to_the_other() {
        let (secret, good) = ("a secret hash", sign("a secret hash"));
        let v3 = || (HEADER_V3, secret.as_bytes());
        let v4 = || (HEADER_V4, good.as_bytes());
        assert_eq!(verdict(Version::V4, &[secret], &[v4()]), Ok(()));
        assert_eq!(verdict(Version::V4, &[secret], &[v4(), v3()]), Ok(()));
        assert_eq!(verdict(Version::V4, &[secret], &[v3()]), Err(Refusal::MissingHeader));
        assert_eq!(verdict(Version::V3, &[secret], &[v4()]), Err(Refusal::MissingHeader));
        // An early text of the documentation had the plain secret under v4's name.
        assert_eq!(
            verdict(Version::V4, &[secret], &[(HEADER_V4, secret.as_bytes()), v3()]),
            Err(Refusal::BadSignature)
        );
    }

    #[test]
    fn v4_takes_exactly_one_form() {
        let good = sign("s");
        let hex = hex::encode(STANDARD.decode(&good).unwrap());
        let bare = good.trim_end_matches('=');
        for wrong in [&*hex, bare, &good.replace('=', "A"), "", "s", &format!(" {good}"), &format!("sha256={good}")] {
            assert_eq!(
                verdict(Version::V4, &["s"], &[(HEADER_V4, wrong.as_bytes())]),
                Err(Refusal::BadSignature),
                "{wrong}"
            );
        }
        assert_eq!(verdict(Version::V4, &["old", "s"], &[(HEADER_V4, good.as_bytes())]), Ok(()));
        let twice = [(HEADER_V4, good.as_bytes()), (HEADER_V4, good.as_bytes())];
        assert_eq!(verdict(Version::V4, &["s"], &twice), Err(Refusal::MalformedHeader));
    }
}
