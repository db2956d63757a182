//! What several providers share: secrets that may be replaced while requests are under way, and headers that may occur only
//! once.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hmac::KeyInit;
use http::{HeaderMap, HeaderName};
use oncegate_runtime::secret::Secret;
use subtle::{Choice, ConstantTimeEq as _};

use super::Refusal;

/// A secret chosen by people is worth a warning if it has fewer bytes than this (W5).
const SECRET_BYTES_ADVISED: usize = 16;

/// Keys made from secrets. A request takes all of them when it begins and keeps them, whatever replaces them meanwhile.
pub(super) struct Keys<K>(RwLock<Arc<[K]>>);

impl<K> Keys<K> {
    pub(super) fn new(keys: Arc<[K]>) -> Self {
        Self(RwLock::new(keys))
    }

    /// The keys; without any, everything is refused.
    pub(super) fn get(&self) -> Result<Arc<[K]>, Refusal> {
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        if keys.is_empty() { Err(Refusal::MissingSecret) } else { Ok(keys) }
    }

    pub(super) fn replace(&self, keys: Arc<[K]>) {
        // The value is replaced as a whole, so a panic elsewhere cannot leave it half done.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }
}

/// The value of a signature header. Two are refused: the application might verify the other one (W7).
pub(super) fn single<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<&'h [u8], Refusal> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().ok_or(Refusal::MissingHeader)?;
    if values.next().is_some() {
        return Err(Refusal::MalformedHeader);
    }
    Ok(value.as_bytes())
}

/// A keyed hash for each secret, whose text is the key. The key is already absorbed: cloning a hash costs a copy, not two
/// compressions.
pub(super) fn hmac_keys<M: KeyInit>(secrets: &[Secret]) -> Arc<[M]> {
    secrets
        .iter()
        .map(|secret| M::new_from_slice(secret.expose().as_bytes()).expect("HMAC takes keys of any length"))
        .collect()
}

/// The place of the first of `keys` that signs `parts` with any of `candidates`. Every key is compared with every
/// candidate, without an early exit (W4): the time reveals only how many there are.
pub(super) fn hmac_matches<M: hmac::Mac + Clone, const N: usize>(
    keys: &[M],
    parts: &[&[u8]],
    candidates: &[[u8; N]],
) -> Option<usize> {
    let mut first = None;
    for (place, key) in keys.iter().enumerate() {
        let mut matched = Choice::from(0);
        let mut mac = key.clone();
        for part in parts {
            mac.update(part);
        }
        let wanted = mac.finalize().into_bytes();
        for candidate in candidates {
            matched |= wanted.as_slice().ct_eq(candidate);
        }
        if matched.into() {
            // The branch reveals something only to a sender that can sign anyway.
            first = first.or(Some(place));
        }
    }
    first
}

/// Warns if a secret is short. Only for those that people make up.
pub(super) fn warn_of_short(provider: &'static str, secrets: &[Secret]) {
    for secret in secrets {
        let bytes = secret.expose().len();
        if bytes < SECRET_BYTES_ADVISED {
            tracing::warn!(provider, bytes, advised = SECRET_BYTES_ADVISED, "a webhook secret is short");
        }
    }
}

/// The value of a lower-case hex digit; [`NO_DIGIT`] for any other byte.
fn value(digit: u8) -> u8 {
    let (decimal, letter) = (digit.wrapping_sub(b'0'), digit.wrapping_sub(b'a'));
    let value = if letter < 6 { letter + 10 } else { NO_DIGIT };
    if decimal < 10 { decimal } else { value }
}
const NO_DIGIT: u8 = 0x80;

/// The `N` bytes of exactly `2 * N` lower-case hex digits.
pub(super) fn lower_hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let (pairs, rest) = text.as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    // Without a branch for each digit, so that several are read at once.
    let mut seen = 0;
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        let (high, low) = (value(*high), value(*low));
        seen |= high | low;
        *byte = high << 4 | low;
    }
    (seen < NO_DIGIT).then_some(bytes)
}

/// The most digits of a timestamp (providers.md 12.5).
const DIGITS_MAX: usize = 12;

/// A Unix time from a header, with the digits as they were sent: these were signed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timestamp {
    digits: [u8; DIGITS_MAX],
    length: usize,
    seconds: u64,
}

impl Timestamp {
    /// Decimal digits only and not too many: no sign, no blank, no overflow anywhere (providers.md 12.5).
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let mut digits = [0; DIGITS_MAX];
        digits.get_mut(..text.len())?.copy_from_slice(text);
        let digit = |byte: &u8| byte.is_ascii_digit().then(|| u64::from(byte - b'0'));
        let seconds = text.iter().map(digit).try_fold(0, |sum: u64, digit| Some(sum * 10 + digit?))?;
        (!text.is_empty()).then_some(Self { digits, length: text.len(), seconds })
    }

    /// The digits.
    pub(super) fn text(&self) -> &[u8] {
        &self.digits[..self.length]
    }

    /// Whether it is at most `tolerance` before or after `now`, in whole seconds, like the sender's.
    pub(super) fn is_within(&self, tolerance: Duration, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        now.abs_diff(self.seconds) <= tolerance.as_secs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_hex_of_the_right_length_is_read() {
        for byte in 0..=255 {
            assert_eq!(lower_hex(hex::encode([byte]).as_bytes()), Some([byte]));
        }
        for other in (0..=255).filter(|byte: &u8| !b"0123456789abcdef".contains(byte)) {
            assert_eq!([lower_hex::<1>(&[b'0', other]), lower_hex::<1>(&[other, b'0'])], [None, None], "{other}");
        }
        for text in ["", "0", "000", "0000"] {
            assert_eq!(lower_hex::<1>(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(lower_hex(b"00ff"), Some([0, 255]));
    }
}
