//! Webhooks as Stripe sends them.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderName, HeaderValue};
use oncegate_runtime::secret::{Secret, SecretText, file};
use sha2::Sha256;

use super::{Sending, Webhook};
use crate::failure::Failure;

/// Where the gateway takes them.
pub(crate) const PATH: &str = "/webhooks/payments/stripe";
/// The header that carries the signature.
pub(crate) const SIGNATURE: HeaderName = HeaderName::from_static("stripe-signature");

/// Send webhooks signed as Stripe signs them
///
/// Sends one event, or one event several times, and shows how each was answered. Without --url and a secret it uses
/// what `oncegate dev` in the same directory made up.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate simulate stripe --duplicates 5
  oncegate simulate stripe --duplicates 63 --concurrent
  oncegate simulate stripe --event-type charge.refunded
  oncegate simulate stripe --bad-signature
  STRIPE_WEBHOOK_SECRET=whsec_... oncegate simulate stripe --url https://pay.example.com --body event.json")]
pub(super) struct Stripe {
    /// The secret to sign with. Other users of the machine see arguments: prefer the environment
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET", hide_env_values = true, value_name = "SECRET")]
    secret: Option<SecretText>,

    /// A file with the secret to sign with
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET_FILE", value_name = "FILE", value_parser = file)]
    secret_file: Option<PathBuf>,

    /// The event's type
    #[arg(long, default_value = "payment_intent.succeeded", value_name = "TYPE", conflicts_with = "body")]
    event_type: String,

    #[command(flatten)]
    sending: Sending,
}

impl Stripe {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let target = self.sending.target(PATH)?;
        let secret = target.secret("stripe", "STRIPE_WEBHOOK_SECRET", self.secret, self.secret_file)?;
        let body = match self.sending.body()? {
            Some(body) => body,
            None => event(&event_id(), &self.event_type, SystemTime::now()),
        };
        self.sending.send(&target, webhook(body, secret)).await
    }
}

/// A webhook that is signed each time it is sent, as Stripe does.
pub(crate) fn webhook(body: Bytes, secret: Secret) -> Webhook {
    let signed = body.clone();
    let sign = move |now, good| {
        let signature = sign(&secret, &signed, now);
        vec![(SIGNATURE, header(if good { signature } else { spoil(signature) }))]
    };
    Webhook { body, sign: Box::new(sign) }
}

/// The genuine value of the header for a body that is sent now.
pub(crate) fn signature(secret: &Secret, body: &[u8], now: SystemTime) -> HeaderValue {
    header(sign(secret, body, now))
}

fn header(signature: String) -> HeaderValue {
    HeaderValue::try_from(signature).expect("digits, hexadecimals and punctuation make a header")
}

/// An event id in Stripe's style.
pub(crate) fn event_id() -> String {
    format!("evt_{}", uuid::Uuid::new_v4().simple())
}

/// A snapshot event.
pub(crate) fn event(id: &str, event_type: &str, now: SystemTime) -> Bytes {
    let seconds = since_1970(now).as_secs();
    let object = event_type.split('.').next().unwrap_or_default();
    let event = serde_json::json!({
        "id": id,
        "object": "event",
        "api_version": "2026-08-27",
        "created": seconds,
        "data": {
            "object": {
                "id": format!("pi_{}", uuid::Uuid::new_v4().simple()),
                "object": object,
                "amount": 4200,
                "currency": "eur",
                "created": seconds,
                "livemode": false,
            },
        },
        "livemode": false,
        "pending_webhooks": 1,
        "request": { "id": null, "idempotency_key": null },
        "type": event_type,
    });
    format!("{event:#}").into()
}

/// The value of `Stripe-Signature`: HMAC-SHA-256 over the time, a full stop and the body, with the secret used as it
/// is.
fn sign(secret: &Secret, body: &[u8], now: SystemTime) -> String {
    let time = since_1970(now).as_secs().to_string();
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes()).expect("HMAC takes a key of any length");
    mac.update(time.as_bytes());
    mac.update(b".");
    mac.update(body);
    format!("t={time},v1={}", hex::encode(mac.finalize().into_bytes()))
}

/// A signature of the right form that is wrong in its last digit.
fn spoil(mut signature: String) -> String {
    let wrong = if signature.pop() == Some('0') { '1' } else { '0' };
    signature.push(wrong);
    signature
}

fn since_1970(now: SystemTime) -> Duration {
    // A clock before 1970 signs for 1970, which the gateway then refuses as too old.
    now.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_stripe_does() {
        let secret = Secret::new("whsec_test").unwrap();
        let signature = sign(&secret, b"{}", UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        // printf '1700000000.{}' | openssl dgst -sha256 -hmac whsec_test
        let expected = "t=1700000000,v1=35495024f4ef3f94e5a93e22221544c4b75e9a42300cd965ab81cb85cd994e91";
        assert_eq!(signature, expected);
        let spoilt = spoil(signature.clone());
        assert_eq!(spoilt.len(), signature.len());
        assert_ne!(spoilt, signature);
    }
}
