//! An event's name as a number.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};

use super::Key;

/// 128 bits of a SHA-256 over an event's name: what it is known by in caches and notifications, without its text.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyDigest([u8; 16]);

impl KeyDigest {
    /// The digest of a name.
    pub fn of(key: &Key) -> KeyDigest {
        let mut hash = Sha256::new();
        // No part holds a NUL, so two names never give the same text.
        for part in [&key.tenant, &key.provider, &key.event_id] {
            hash.update(part);
            hash.update([0]);
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&hash.finalize()[..16]);
        KeyDigest(digest)
    }

    /// One of so many parts of all digests.
    pub(crate) fn stripe(self, count: usize) -> usize {
        usize::from(self.0[0]) % count
    }

    /// As it is.
    pub(crate) fn bytes(self) -> [u8; 16] {
        self.0
    }

    /// As 22 letters.
    pub fn encode(self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// From 22 letters.
    pub fn decode(text: &str) -> Option<KeyDigest> {
        URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok().map(KeyDigest)
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.encode())
    }
}
