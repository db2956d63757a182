//! Signs what is delivered by the rules of Standard Webhooks, so that an application can tell the gateway from anybody
//! else who reaches its port (G7).

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use oncegate_runtime::secret::Secret;
use sha2::Sha256;

type KeyState = Hmac<Sha256>;

/// Bytes that Standard Webhooks asks of a key at least.
pub(crate) const KEY_BYTES_ADVISED: usize = 24;

/// The secrets, ready for use. Clones share them.
#[derive(Clone)]
pub(crate) struct Signer {
    keys: Arc<RwLock<Arc<[KeyState]>>>,
}

/// A secret that is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SignerError {
    #[error("not base64; Standard Webhooks secrets are base64, with or without whsec_ before it")]
    NotBase64,
    #[error("holds no key")]
    Empty,
}

impl Signer {
    /// Takes base64 with or without `whsec_`. A delivery carries one signature per secret.
    pub(crate) fn new(secrets: &[Secret]) -> Result<Self, SignerError> {
        Ok(Self { keys: Arc::new(RwLock::new(key_states(secrets)?)) })
    }

    /// Puts other secrets in place, also for the clones. One that is no key leaves the old ones where they are.
    pub(crate) fn replace(&self, secrets: &[Secret]) -> Result<(), SignerError> {
        // The value is replaced as a whole, so a panic elsewhere leaves nothing half done.
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = key_states(secrets)?;
        Ok(())
    }

    /// Whether both are clones of one.
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

fn key_states(secrets: &[Secret]) -> Result<Arc<[KeyState]>, SignerError> {
    secrets
        .iter()
        .map(|secret| {
            let text = secret.expose().trim();
            let key =
                STANDARD.decode(text.strip_prefix("whsec_").unwrap_or(text)).map_err(|_| SignerError::NotBase64)?;
            if key.is_empty() {
                return Err(SignerError::Empty);
            }
            if key.len() < KEY_BYTES_ADVISED {
                tracing::warn!(
                    bytes = key.len(),
                    advised = KEY_BYTES_ADVISED,
                    "the secret that signs deliveries is short"
                );
            }
            Ok(KeyState::new_from_slice(&key).expect("HMAC takes keys of any length"))
        })
        .collect()
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
        assert_eq!(signer.replace(&[secret("BBBB"), secret("???")]), Err(SignerError::NotBase64));
        assert_eq!(clone.sign("id", "1", b"body"), before);
        signer.replace(&[secret("BBBB")]).unwrap();
        assert_ne!(clone.sign("id", "1", b"body"), before);
        assert!(clone.is(&signer));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        assert_eq!(Signer::new(&[secret("whsec_???")]).unwrap_err(), SignerError::NotBase64);
        assert_eq!(Signer::new(&[secret("whsec_")]).unwrap_err(), SignerError::Empty);
    }
}
