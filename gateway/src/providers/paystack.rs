//! Paystack: `x-paystack-signature`, HMAC-SHA512 of the body in lower-case hex, keyed with the account's API secret key.
//!
//! Paystack has no separate secret for webhooks, and sends neither a time nor an event id: what the ledger has recorded is
//! the only defence against a replay (W2).

use std::{fmt, sync::Arc};

use hmac::Hmac;
use http::{HeaderMap, HeaderName};
use oncegate_runtime::secret::Secret;
use sha2::Sha512;

use super::{BadSecret, Refusal, credentials};
use crate::key::{Members, Paths};

/// What names an event. The row number in `data.id` comes last: refunds lack it, and transactions, transfers and disputes
/// are numbered independently of each other.
pub(crate) static MEMBERS: Members = Members {
    paths: Paths::new(&[
        &["event"],
        &["data", "refund_reference"],
        &["data", "transfer_code"],
        &["data", "reference"],
        &["data", "subscription_code"],
        &["data", "invoice_code"],
        &["data", "id"],
        &["data", "status"],
    ]),
    key: &[&[0], &[1, 2, 3, 4, 5, 6], &[7]],
    naming: 1,
    sent_id: &[],
    event_type: &[0],
    shape: None,
};

const HEADER: HeaderName = HeaderName::from_static("x-paystack-signature");

/// Passed on to the application (G7).
pub(crate) static SIGNATURE_HEADERS: [HeaderName; 1] = [HEADER];

type KeyState = Hmac<Sha512>;

/// The prefixes of the keys of the two modes.
const TEST_KEY: &str = "sk_test_";
const LIVE_KEY: &str = "sk_live_";

/// Paystack with its key, or the old and the new one while it is replaced.
pub struct Paystack {
    keys: credentials::Keys<KeyState>,
}

impl Paystack {
    /// Accepts what is signed with any of `secrets`. Without one everything is refused with `missing_secret`.
    #[must_use]
    pub fn new(secrets: &[Secret]) -> Self {
        Self { keys: credentials::Keys::new(credentials::hmac_keys(secrets)) }
    }

    pub(super) fn replace_secrets(&self, secrets: &[Secret]) -> Result<(), BadSecret> {
        one_mode(secrets)?;
        self.keys.replace(credentials::hmac_keys(secrets));
        Ok(())
    }

    pub(super) fn begin(&self, headers: &HeaderMap) -> Result<Verification, Refusal> {
        let keys = self.keys.get()?;
        let value = credentials::single(headers, &HEADER)?;
        let candidate = credentials::lower_hex(value).ok_or(Refusal::BadSignature)?;
        Ok(Verification { keys, candidate })
    }
}

/// Refuses keys of test and live mode side by side. Shops number orders in both, and an event is named by the order's
/// reference: the test of `order-1` would make the payment of `order-1` a duplicate.
pub(crate) fn one_mode<'a>(secrets: impl IntoIterator<Item = &'a Secret> + Clone) -> Result<(), BadSecret> {
    let any = |start: &str| secrets.clone().into_iter().any(|secret| secret.expose().starts_with(start));
    if any(TEST_KEY) && any(LIVE_KEY) {
        return Err(BadSecret::new(
            "keys of test mode (sk_test_) beside those of live mode (sk_live_): a test event would pass for the payment with \
             its reference; make a route with a tenant of its own for test mode",
        ));
    }
    Ok(())
}

impl fmt::Debug for Paystack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paystack").finish_non_exhaustive()
    }
}

/// A request of Paystack's whose headers were read.
pub struct Verification {
    keys: Arc<[KeyState]>,
    candidate: [u8; 64],
}

impl Verification {
    /// The place of the secret that matched.
    pub(super) fn finish(self, body: &[u8]) -> Result<usize, Refusal> {
        credentials::hmac_matches(&self.keys, &[body], &[self.candidate]).ok_or(Refusal::BadSignature)
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
    use sha2::{Digest as _, Sha256};

    use super::*;

    fn sign(key: &str, body: &[u8]) -> String {
        let mut mac = KeyState::new_from_slice(key.as_bytes()).unwrap();
        mac.update(body);
        hex::encode(mac.finalize().into_bytes())
    }

    fn verdict(keys: &[&str], values: &[&str]) -> Result<(), Refusal> {
        let keys: Vec<_> = keys.iter().map(|key| Secret::new(*key).unwrap()).collect();
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(HEADER, HeaderValue::from_str(value).unwrap());
        }
        Paystack::new(&keys).begin(&headers)?.finish(b"{}").map(drop)
    }

    #[test]
    fn one_header_in_lower_case_hex_signed_with_any_key() {
        let good = sign("sk_live", b"{}");
        assert_eq!(verdict(&["sk_test", "sk_live"], &[&good]), Ok(()));
        assert_eq!(verdict(&["sk_test"], &[&good]), Err(Refusal::BadSignature));
        assert_eq!(verdict(&["sk_live"], &[&good, &good]), Err(Refusal::MalformedHeader));
        assert_eq!(verdict(&["sk_live"], &[]), Err(Refusal::MissingHeader));
        assert_eq!(verdict(&[], &[&good]), Err(Refusal::MissingSecret));
        for wrong in ["", "zz", &good.to_uppercase(), &good[..126], &format!("{good}00"), &format!("sha512={good}")] {
            assert_eq!(verdict(&["sk_live"], &[wrong]), Err(Refusal::BadSignature), "{wrong}");
        }
    }

    #[test]
    fn w5_a_reload_that_mixes_test_and_live_mode_keeps_the_old_keys() {
        let secrets = |keys: &[&str]| -> Vec<_> { keys.iter().map(|key| Secret::new(*key).unwrap()).collect() };
        let paystack = Paystack::new(&secrets(&["sk_live_a"]));
        assert!(paystack.replace_secrets(&secrets(&["sk_live_a", "sk_test_b"])).is_err());
        assert_eq!(paystack.keys.get().unwrap().len(), 1);
        assert_eq!(paystack.replace_secrets(&secrets(&["sk_live_a", "sk_live_b"])), Ok(()));
        assert_eq!(paystack.keys.get().unwrap().len(), 2);
    }

    // docs/providers.md says what an application does that needs them.
    #[test]
    fn what_happens_again_to_one_subscription_or_dispute_has_the_same_name() {
        let name = |body: &str| crate::key::identify(&MEMBERS, None, body.as_bytes(), || [0; 32]).unwrap().event_id;
        for (first, second) in [
            (
                r#"{"event":"subscription.not_renew","data":{"subscription_code":"SUB_1","status":"non-renewing","n":1}}"#,
                r#"{"event":"subscription.not_renew","data":{"subscription_code":"SUB_1","status":"non-renewing","n":2}}"#,
            ),
            (
                r#"{"event":"subscription.disable","data":{"subscription_code":"SUB_1","status":"complete","cron":"1"}}"#,
                r#"{"event":"subscription.disable","data":{"subscription_code":"SUB_1","status":"complete","cron":"2"}}"#,
            ),
            (
                r#"{"event":"charge.dispute.remind","data":{"id":2867,"status":"pending","dueAt":"1"}}"#,
                r#"{"event":"charge.dispute.remind","data":{"id":2867,"status":"pending","dueAt":"2"}}"#,
            ),
        ] {
            assert_eq!(name(first), name(second));
        }
    }

    #[test]
    fn refunds_and_transfers_have_names_of_their_own() {
        for (body, key) in [
            (
                r#"{"event":"refund.processed","data":{"refund_reference":"R-1","reference":"x","id":1,"status":"processed"}}"#,
                "refund.processed:R-1:processed",
            ),
            (r#"{"event":"refund.processed","data":{"refund_reference":null,"reference":"x"}}"#, "refund.processed:x:"),
            (
                r#"{"event":"transfer.success","data":{"transfer_code":"TRF_1","reference":"x","status":"success"}}"#,
                "transfer.success:TRF_1:success",
            ),
            (
                r#"{"event":"subscription.create","data":{"subscription_code":"SUB_1","id":9,"status":"active"}}"#,
                "subscription.create:SUB_1:active",
            ),
            (
                r#"{"event":"charge.dispute.create","data":{"id":2867,"status":"awaiting-merchant-feedback"}}"#,
                "charge.dispute.create:2867:awaiting-merchant-feedback",
            ),
        ] {
            let identity =
                crate::key::identify(&MEMBERS, None, body.as_bytes(), || unreachable!("it has a name")).unwrap();
            assert_eq!(identity.event_id, key);
            let sent = crate::key::sent(&MEMBERS, None, body.as_bytes()).unwrap();
            assert_eq!(sent.event_id, None);
        }
        // Only the body tells one from another.
        let body = br#"{"event":"customeridentification.success","data":{"customer_id":"1","status":"ok"}}"#;
        let digest: [u8; 32] = Sha256::digest(body).into();
        let identity = crate::key::identify(&MEMBERS, None, body, || digest).unwrap();
        assert_eq!(identity.event_id, format!("sha256:{}", hex::encode(digest)));
    }
}
