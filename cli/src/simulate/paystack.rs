//! Webhooks as Paystack sends them.

use std::path::PathBuf;

use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderName, HeaderValue};
use oncegate_runtime::secret::{Secret, SecretText, file};
use sha2::Sha512;

use super::{Sending, Webhook, number, spoil_unless};
use crate::failure::Failure;

/// Where the gateway takes them.
pub(crate) const PATH: &str = "/webhooks/payments/paystack";

/// Send webhooks signed as Paystack signs them
///
/// Sends one event, or one event several times, and shows how each was answered. Without --url and a secret it uses
/// what `oncegate dev` in the same directory made up.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate simulate paystack --duplicates 5
  oncegate simulate paystack --event-type transfer.success --concurrent --duplicates 63
  PAYSTACK_WEBHOOK_SECRET=sk_test_... oncegate simulate paystack --url https://pay.example.com --body event.json")]
pub(super) struct Paystack {
    /// The secret key to sign with. Other users of the machine see arguments: prefer the environment
    #[arg(long, env = "PAYSTACK_WEBHOOK_SECRET", hide_env_values = true, value_name = "SECRET")]
    secret: Option<SecretText>,

    /// A file with the secret key to sign with
    #[arg(long, env = "PAYSTACK_WEBHOOK_SECRET_FILE", value_name = "FILE", value_parser = file)]
    secret_file: Option<PathBuf>,

    /// The event's type
    #[arg(long, default_value = "charge.success", value_name = "TYPE", conflicts_with = "body")]
    event_type: String,

    #[command(flatten)]
    sending: Sending,
}

impl Paystack {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let target = self.sending.target(PATH)?;
        let secret = target.secret("paystack", "PAYSTACK_WEBHOOK_SECRET", self.secret, self.secret_file)?;
        let body = match self.sending.body()? {
            Some(body) => body,
            None => event(&reference(), &self.event_type),
        };
        self.sending.send(&target, webhook(body, secret)).await
    }
}

/// A webhook with its signature: HMAC-SHA-512 over the body, in hexadecimal digits.
pub(crate) fn webhook(body: Bytes, secret: Secret) -> Webhook {
    let signed = body.clone();
    let sign = move |_, genuine| {
        let mut mac =
            Hmac::<Sha512>::new_from_slice(secret.expose().as_bytes()).expect("HMAC takes a key of any length");
        mac.update(&signed);
        let signature = hex::encode(spoil_unless(genuine, mac.finalize().into_bytes().to_vec()));
        let value = HeaderValue::try_from(signature).expect("hexadecimals make a header");
        vec![(HeaderName::from_static("x-paystack-signature"), value)]
    };
    Webhook { body, sign: Box::new(sign) }
}

/// A reference as a merchant might choose it.
pub(crate) fn reference() -> String {
    format!("T{}", uuid::Uuid::new_v4().simple())
}

/// An event. Paystack gives its events no id: the type, the reference and the status together identify one.
pub(crate) fn event(reference: &str, event_type: &str) -> Bytes {
    let event = serde_json::json!({
        "event": event_type,
        "data": {
            "id": number(),
            "domain": "test",
            "status": "success",
            "reference": reference,
            "amount": 420_000,
            "currency": "NGN",
            "channel": "card",
            "customer": { "id": number(), "email": "customer@example.com" },
        },
    });
    event.to_string().into()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn signs_as_paystack_does() {
        let webhook = webhook(Bytes::from_static(b"{}"), Secret::new("sk_test").unwrap());
        let [genuine, forged] = [true, false].map(|genuine| (webhook.sign)(UNIX_EPOCH, genuine)[0].1.clone());
        // printf '{}' | openssl dgst -sha512 -hmac sk_test
        assert_eq!(
            genuine,
            "85366dd0d9c880311bafd0515acb0fec6e339c79d2929d8e908ce6f47824d3b9\
             68f3931cff33efc0397d3578c10cf101044e881d2e4a248127cb743caef4d586"
        );
        assert_ne!(genuine, forged);
        assert_eq!(genuine.len(), forged.len());
    }
}
