//! Signs deliveries by the rules of Standard Webhooks, so that an application can tell the gateway from anybody else who
//! reaches its port (G7).

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose::STANDARD},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use oncegate_runtime::secret::Secret;
use sha2::Sha256;

type KeyState = Hmac<Sha256>;

/// The fewest bytes of a key that Standard Webhooks permits.
const KEY_BYTES_ADVISED: usize = 24;

/// For secrets, which people copy with or without the trailing padding.
pub(crate) const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The secrets, ready for use. Clones share them.
#[derive(Clone)]
pub(crate) struct Signer {
    keys: Arc<RwLock<Arc<[KeyState]>>>,
}

/// A secret that is not a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadKey {
    #[error("not base64; Standard Webhooks secrets are base64, with or without whsec_ before it")]
    NotBase64,
    #[error("holds no key")]
    Empty,
}

impl Signer {
    /// Takes base64 with or without `whsec_`. A delivery carries one signature per secret.
    pub(crate) fn new(secrets: &[Secret]) -> Result<Self, BadKey> {
        Ok(Self { keys: Arc::new(RwLock::new(key_states(secrets)?)) })
    }

    /// Replaces the secrets, for all clones. If one of the new ones is not a key, the old ones stay.
    pub(crate) fn replace(&self, secrets: &[Secret]) -> Result<(), BadKey> {
        // The value is replaced as a whole, so a panic elsewhere cannot leave it half done.
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = key_states(secrets)?;
        Ok(())
    }

    /// Whether both are clones of the same signer.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.keys, &other.keys)
    }

    fn keys(&self) -> Arc<[KeyState]> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The value of `webhook-signature`: `v1,` and base64 for each secret, separated by blanks.
    pub(crate) fn sign(&self, id: &str, timestamp: &str, body: &[u8]) -> String {
        let mut value = String::new();
        for key in &*self.keys() {
            let mut mac = key.clone();
            for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
                mac.update(part);
            }
            if !value.is_empty() {
                value.push(' ');
            }
            value.push_str("v1,");
            STANDARD.encode_string(mac.finalize().into_bytes(), &mut value);
        }
        value
    }
}

fn key_states(secrets: &[Secret]) -> Result<Arc<[KeyState]>, BadKey> {
    secrets
        .iter()
        .map(|secret| Ok(symmetric_key(text_of(secret), "the secret that signs deliveries is short")?.state()))
        .collect()
}

/// A symmetric key of Standard Webhooks.
pub(crate) struct SymmetricKey(Vec<u8>);

impl SymmetricKey {
    /// With the key already absorbed.
    pub(crate) fn state(&self) -> Hmac<Sha256> {
        Hmac::new_from_slice(&self.0).expect("HMAC takes keys of any length")
    }
}

/// A secret without the prefix that some dashboards show.
pub(crate) fn text_of(secret: &Secret) -> &str {
    let text = secret.expose().trim();
    text.strip_prefix("v1,").unwrap_or(text)
}

/// Reads a key: base64 with or without its padding, and `whsec_` before it. Fails with `if_short` if it has fewer bytes
/// than Standard Webhooks asks for: a fragment left by a slip in a list is valid base64 too, and a short key is soon
/// guessed.
pub(crate) fn symmetric_key(text: &str, if_short: &'static str) -> Result<SymmetricKey, BadKey> {
    let key = BASE64.decode(text.strip_prefix("whsec_").unwrap_or(text)).map_err(|_| BadKey::NotBase64)?;
    // An empty key would let anybody sign.
    if key.is_empty() {
        return Err(BadKey::Empty);
    }
    if key.len() < KEY_BYTES_ADVISED {
        tracing::warn!(bytes = key.len(), advised = KEY_BYTES_ADVISED, "{if_short}");
    }
    Ok(SymmetricKey(key))
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("keys", &self.keys().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    #[test]
    fn signs_the_known_answer_of_the_specification() {
        // From the specification's own examples (standard-webhooks/standard-webhooks).
        let signer = Signer::new(&[secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")]).unwrap();
        let signature = signer.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", br#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn one_signature_a_secret_and_the_prefix_changes_nothing() {
        let key = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let signer = Signer::new(&[secret(key), secret(&format!("whsec_{key}"))]).unwrap();
        let signatures = signer.sign("id", "1", b"body");
        let (first, second) = signatures.split_once(' ').unwrap();
        assert_eq!(first, second);
    }

    #[test]
    fn clones_share_what_is_put_in_place_and_a_bad_secret_changes_nothing() {
        let signer = Signer::new(&[secret("AAAA")]).unwrap();
        let clone = signer.clone();
        let before = clone.sign("id", "1", b"body");
        assert_eq!(signer.replace(&[secret("BBBB"), secret("???")]), Err(BadKey::NotBase64));
        assert_eq!(clone.sign("id", "1", b"body"), before);
        signer.replace(&[secret("BBBB")]).unwrap();
        assert_ne!(clone.sign("id", "1", b"body"), before);
        assert!(clone.is(&signer));
    }

    #[test]
    fn a_key_may_be_written_as_people_copy_it() {
        let signed = |text: &str| Signer::new(&[secret(text)]).unwrap().sign("id", "1", b"body");
        let wanted = signed("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaTwAA==");
        for text in ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaTwAA", "v1,whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaTwAA=="] {
            assert_eq!(signed(text), wanted, "{text}");
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        assert_eq!(Signer::new(&[secret("whsec_???")]).unwrap_err(), BadKey::NotBase64);
        assert_eq!(Signer::new(&[secret("whsec_")]).unwrap_err(), BadKey::Empty);
    }
}
