//! Webhooks as PayPal sends them, signed with a certificate of `dev`.

use std::{fs, path::PathBuf, time::SystemTime};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use jiff::Timestamp;
use oncegate_runtime::{
    config::Problem,
    secret::{self, Secret, SecretText},
};
use rcgen::SigningKey as _;

use super::{Sending, Target, Webhook, spoil_unless};
use crate::{
    dev::{certificate::Signer, file},
    failure::Failure,
};

/// Where the gateway takes them.
pub(crate) const PATH: &str = "/webhooks/payments/paypal";

/// Send webhooks signed as PayPal signs them
///
/// Sends one event, or one event several times, and shows how each was answered. Nobody but PayPal has PayPal's key: the
/// gateway has to trust another certificate for this (PAYPAL_TRUST_ANCHORS_FILE, PAYPAL_CERT_DIR). `oncegate dev` makes
/// one, and without options this uses it.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate simulate paypal --duplicates 5
  oncegate simulate paypal --event-type PAYMENT.CAPTURE.REFUNDED
  oncegate simulate paypal --url http://127.0.0.1:8080 --key key.pem \\
      --cert-url https://api.sandbox.paypal.com/v1/notifications/certs/CERT-test")]
pub(super) struct PayPal {
    /// The id of the webhook, which is part of what is signed
    #[arg(long, env = "PAYPAL_WEBHOOK_ID", hide_env_values = true, value_name = "ID")]
    webhook_id: Option<SecretText>,

    /// A file with the id of the webhook
    #[arg(long, env = "PAYPAL_WEBHOOK_ID_FILE", value_name = "FILE", value_parser = secret::file)]
    webhook_id_file: Option<PathBuf>,

    /// A file with the RSA key to sign with, in PEM (PKCS #8) [default: that of `dev`]
    #[arg(long, value_name = "FILE", requires = "cert_url")]
    key: Option<PathBuf>,

    /// Where the certificate of that key is said to be
    #[arg(long, value_name = "URL", requires = "key")]
    cert_url: Option<String>,

    /// The event's type
    #[arg(long, default_value = "PAYMENT.CAPTURE.COMPLETED", value_name = "TYPE", conflicts_with = "body")]
    event_type: String,

    #[command(flatten)]
    sending: Sending,
}

impl PayPal {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let target = self.sending.target(PATH)?;
        let signer = self.signer(&target)?;
        let webhook_id = target.secret("paypal", "PAYPAL_WEBHOOK_ID", self.webhook_id, self.webhook_id_file)?;
        let body = match self.sending.body()? {
            Some(body) => body,
            None => event(&event_id(), &self.event_type, SystemTime::now()),
        };
        self.sending.send(&target, webhook(body, webhook_id, signer)?).await
    }

    fn signer(&self, target: &Target) -> Result<Signer, Failure> {
        if let (Some(path), Some(url)) = (&self.key, &self.cert_url) {
            let pem = fs::read_to_string(path)
                .map_err(|error| Problem::new("--key", format!("cannot read {}: {error}", path.display())))?;
            return Ok(Signer::new(&pem, url.clone()).map_err(|error| Problem::new("--key", format!("{error:#}")))?);
        }
        match target.dev.as_ref().and_then(|dev| dev.paypal.as_ref()) {
            Some(made) => Ok(made.signer()?),
            None => Err(Problem::new(
                "--key",
                format!("needed to sign with: give it, or run this where `oncegate dev` has left its {}", file::NAME),
            )
            .into()),
        }
    }
}

/// A webhook that is signed each time it is sent, always as the same transmission.
pub(crate) fn webhook(body: Bytes, webhook_id: Secret, signer: Signer) -> Result<Webhook, Problem> {
    let transmission_id = uuid::Uuid::new_v4().to_string();
    let cert_url =
        HeaderValue::try_from(&signer.cert_url).map_err(|_| Problem::new("--cert-url", "cannot stand in a header"))?;
    let crc = crc32fast::hash(&body);
    let sign = move |now: SystemTime, genuine| {
        let time = time(now);
        let message = format!("{transmission_id}|{time}|{}|{crc}", webhook_id.expose());
        let signature = signer.key.sign(message.as_bytes()).expect("an RSA key signs any message");
        let text = |text: String| HeaderValue::try_from(text).expect("plain ASCII makes a header");
        vec![
            (HeaderName::from_static("paypal-transmission-id"), text(transmission_id.clone())),
            (HeaderName::from_static("paypal-transmission-time"), text(time)),
            (
                HeaderName::from_static("paypal-transmission-sig"),
                text(BASE64_STANDARD.encode(spoil_unless(genuine, signature))),
            ),
            (HeaderName::from_static("paypal-cert-url"), cert_url.clone()),
            (HeaderName::from_static("paypal-auth-algo"), HeaderValue::from_static("SHA256withRSA")),
            (HeaderName::from_static("paypal-auth-version"), HeaderValue::from_static("v2")),
        ]
    };
    Ok(Webhook { body, sign: Box::new(sign) })
}

/// An event id in PayPal's style.
pub(crate) fn event_id() -> String {
    let id = uuid::Uuid::new_v4().simple().to_string().to_uppercase();
    format!("WH-{}-{}", &id[..17], &id[15..])
}

/// An event.
pub(crate) fn event(id: &str, event_type: &str, now: SystemTime) -> Bytes {
    let event = serde_json::json!({
        "id": id,
        "event_version": "1.0",
        "create_time": time(now),
        "resource_type": "capture",
        "event_type": event_type,
        "summary": "Payment completed for EUR 42.0 EUR",
        "resource": {
            "id": uuid::Uuid::new_v4().simple().to_string()[..17].to_uppercase(),
            "status": "COMPLETED",
            "amount": { "currency_code": "EUR", "value": "42.00" },
        },
    });
    event.to_string().into()
}

/// A time to the second, as PayPal writes it.
fn time(now: SystemTime) -> String {
    // By the time that this cannot represent, there will be no PayPal any more.
    let seconds = Timestamp::try_from(now).unwrap_or_default().as_second();
    Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::dev::certificate::Certificate;

    #[test]
    fn the_message_is_signed_with_the_key_of_the_certificate() {
        let made = Certificate::make().unwrap();
        let webhook = webhook(Bytes::from_static(b"{}"), Secret::new("WID").unwrap(), made.signer().unwrap()).unwrap();
        let headers = |genuine| (webhook.sign)(UNIX_EPOCH + Duration::from_secs(1_700_000_000), genuine);
        let genuine = headers(true);
        let value = |name: &str| {
            let found = genuine.iter().find(|(header, _)| header == name).unwrap();
            found.1.to_str().unwrap().to_owned()
        };
        assert_eq!(value("paypal-transmission-time"), "2023-11-14T22:13:20Z");
        // RSASSA-PKCS1-v1_5 is deterministic. 2745614147 is the CRC-32 of {}.
        let message = format!("{}|2023-11-14T22:13:20Z|WID|2745614147", value("paypal-transmission-id"));
        let expected = made.signer().unwrap().key.sign(message.as_bytes()).unwrap();
        assert_eq!(value("paypal-transmission-sig"), BASE64_STANDARD.encode(expected));
        assert_ne!(headers(false)[2].1, genuine[2].1);
        assert_eq!(headers(true)[0].1, genuine[0].1, "a duplicate is the same transmission");
    }
}
