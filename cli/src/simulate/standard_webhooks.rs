//! Webhooks in the Standard Webhooks format, as sent by one's own services.

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
    prelude::BASE64_STANDARD,
};
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderName, HeaderValue};
use oncegate_runtime::{
    config::Problem,
    secret::{Secret, SecretText, file},
};
use sha2::Sha256;

use super::{Sending, Webhook, spoil_unless};
use crate::failure::Failure;

/// Where the gateway of `dev` takes them. Elsewhere the configuration file says where.
pub(crate) const PATH: &str = "/webhooks/payments/standard_webhooks";

const SETTING: &str = "STANDARD_WEBHOOKS_SECRET";

/// People copy secrets with or without the padding at their end.
const SECRET_BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Send webhooks signed by Standard Webhooks
///
/// Sends one event, or one event several times, and shows how each was answered. Without --url and a secret it uses
/// what `oncegate dev` in the same directory made up.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate simulate standard-webhooks --duplicates 5
  STANDARD_WEBHOOKS_SECRET=whsec_... oncegate simulate standard-webhooks --url http://127.0.0.1:8080/hooks/own")]
pub(super) struct StandardWebhooks {
    /// The secret to sign with, in base64. Other users of the machine see arguments: prefer the environment
    #[arg(long, env = "STANDARD_WEBHOOKS_SECRET", hide_env_values = true, value_name = "SECRET")]
    secret: Option<SecretText>,

    /// A file with the secret to sign with
    #[arg(long, env = "STANDARD_WEBHOOKS_SECRET_FILE", value_name = "FILE", value_parser = file)]
    secret_file: Option<PathBuf>,

    /// The event's id [default: one made up]
    #[arg(long, value_name = "ID")]
    event_id: Option<String>,

    /// The event's type
    #[arg(long, default_value = "invoice.paid", value_name = "TYPE", conflicts_with = "body")]
    event_type: String,

    #[command(flatten)]
    sending: Sending,
}

impl StandardWebhooks {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let target = self.sending.target(PATH)?;
        let secret = target.secret("standard_webhooks", SETTING, self.secret, self.secret_file)?;
        let body = match self.sending.body()? {
            Some(body) => body,
            None => event(&self.event_type),
        };
        let id = self.event_id.unwrap_or_else(event_id);
        self.sending.send(&target, webhook(&id, body, &secret)?).await
    }
}

/// A webhook that is signed each time it is sent, always with the same id.
pub(crate) fn webhook(id: &str, body: Bytes, secret: &Secret) -> Result<Webhook, Problem> {
    let text = secret.expose();
    let key = SECRET_BASE64
        .decode(text.strip_prefix("whsec_").unwrap_or(text))
        .map_err(|_| Problem::new(SETTING, "is not base64, with or without whsec_ before it"))?;
    let mac = Hmac::<Sha256>::new_from_slice(&key).expect("HMAC takes a key of any length");
    let id = HeaderValue::try_from(id).map_err(|_| Problem::new("--event-id", "cannot stand in a header"))?;
    let signed = body.clone();
    let sign = move |now: SystemTime, genuine| {
        // A clock before 1970 signs for 1970, which the gateway then refuses as too old.
        let time = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut mac = mac.clone();
        for part in [id.as_bytes(), b".", time.to_string().as_bytes(), b".", &signed] {
            mac.update(part);
        }
        let signature = BASE64_STANDARD.encode(spoil_unless(genuine, mac.finalize().into_bytes().to_vec()));
        let signature = HeaderValue::try_from(format!("v1,{signature}")).expect("base64 makes a header");
        vec![
            (HeaderName::from_static("webhook-id"), id.clone()),
            (HeaderName::from_static("webhook-timestamp"), time.into()),
            (HeaderName::from_static("webhook-signature"), signature),
        ]
    };
    Ok(Webhook { body, sign: Box::new(sign) })
}

/// An event id in the style of the specification's examples.
pub(crate) fn event_id() -> String {
    format!("msg_{}", uuid::Uuid::new_v4().simple())
}

/// An event. Its id is not in it, but in a header.
pub(crate) fn event(event_type: &str) -> Bytes {
    let event = serde_json::json!({
        "type": event_type,
        "data": { "id": format!("inv_{}", uuid::Uuid::new_v4().simple()), "amount": 4200, "currency": "EUR" },
    });
    event.to_string().into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn signs_as_the_specification_does() {
        // The example of the specification's own libraries.
        let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let body = Bytes::from_static(br#"{"test": 2432232314}"#);
        let webhook = webhook("msg_p5jXN8AQM9LWM0D4loKWxJek", body, &secret).unwrap();
        let at = UNIX_EPOCH + Duration::from_secs(1_614_265_330);
        let signature = |genuine| (webhook.sign)(at, genuine).remove(2).1;
        assert_eq!(signature(true), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_ne!(signature(true), signature(false));
        assert!(super::webhook("id", Bytes::new(), &Secret::new("no base64!").unwrap()).is_err());
    }
}
