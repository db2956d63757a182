//! Webhooks as Flutterwave sends them.

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderName, HeaderValue};
use oncegate_gateway::config::FlutterwaveVersion as Version;
use oncegate_runtime::{
    config::Problem,
    secret::{Secret, SecretText, file},
};
use sha2::Sha256;

use super::{Sending, Webhook, number, spoil_unless};
use crate::failure::Failure;

/// Where the gateway takes them.
pub(crate) const PATH: &str = "/webhooks/payments/flutterwave";

const SETTING: &str = "FLUTTERWAVE_WEBHOOK_SECRET";

/// Send webhooks signed as Flutterwave signs them
///
/// Sends one event, or one event several times, and shows how each was answered. Without --url and a secret it uses
/// what `oncegate dev` in the same directory made up, which takes v4.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate simulate flutterwave --duplicates 5
  oncegate simulate flutterwave --signature v3 --secret-file hash --url http://127.0.0.1:8080
  FLUTTERWAVE_WEBHOOK_SECRET=... oncegate simulate flutterwave --url https://pay.example.com --body event.json")]
pub(super) struct Flutterwave {
    /// The secret hash to sign with. Other users of the machine see arguments: prefer the environment
    #[arg(long, env = "FLUTTERWAVE_WEBHOOK_SECRET", hide_env_values = true, value_name = "SECRET")]
    secret: Option<SecretText>,

    /// A file with the secret hash to sign with
    #[arg(long, env = "FLUTTERWAVE_WEBHOOK_SECRET_FILE", value_name = "FILE", value_parser = file)]
    secret_file: Option<PathBuf>,

    /// v4 signs the body; v3 repeats the secret hash
    #[arg(long, env = "FLUTTERWAVE_SIGNATURE", default_value = "v4", value_name = "VERSION")]
    signature: Version,

    /// The event's type
    #[arg(long, default_value = "charge.completed", value_name = "TYPE", conflicts_with = "body")]
    event_type: String,

    #[command(flatten)]
    sending: Sending,
}

impl Flutterwave {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let target = self.sending.target(PATH)?;
        let secret = target.secret("flutterwave", SETTING, self.secret, self.secret_file)?;
        let body = match (self.sending.body()?, self.signature) {
            (Some(body), _) => body,
            (None, Version::V4) => event(&event_id(), &self.event_type, SystemTime::now()),
            (None, Version::V3) => event_v3(&self.event_type),
        };
        self.sending.send(&target, webhook(body, secret, self.signature)?).await
    }
}

/// A webhook with the header that authenticates it.
pub(crate) fn webhook(body: Bytes, secret: Secret, version: Version) -> Result<Webhook, Problem> {
    let sign: Box<super::SignFn> = match version {
        Version::V4 => {
            let signed = body.clone();
            Box::new(move |_, genuine| {
                let mut mac =
                    Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes()).expect("HMAC takes a key of any length");
                mac.update(&signed);
                let signature = BASE64_STANDARD.encode(spoil_unless(genuine, mac.finalize().into_bytes().to_vec()));
                let value = HeaderValue::try_from(signature).expect("base64 makes a header");
                vec![(HeaderName::from_static("flutterwave-signature"), value)]
            })
        }
        Version::V3 => {
            let mut value = HeaderValue::from_bytes(secret.expose().as_bytes())
                .map_err(|_| Problem::new(SETTING, "holds a character that no header can have"))?;
            value.set_sensitive(true);
            Box::new(move |_, genuine| {
                let value = if genuine { value.clone() } else { HeaderValue::from_static("not the secret hash") };
                vec![(HeaderName::from_static("verif-hash"), value)]
            })
        }
    };
    Ok(Webhook { body, sign })
}

/// An event id in the style of v4.
pub(crate) fn event_id() -> String {
    format!("wbk_{}", uuid::Uuid::new_v4().simple())
}

/// An event of v4.
pub(crate) fn event(id: &str, event_type: &str, now: SystemTime) -> Bytes {
    let milliseconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let event = serde_json::json!({
        "webhook_id": id,
        "timestamp": u64::try_from(milliseconds).unwrap_or_default(),
        "type": event_type,
        "data": {
            "id": format!("chg_{}", uuid::Uuid::new_v4().simple()),
            "amount": 4200,
            "currency": "NGN",
            "reference": uuid::Uuid::new_v4().to_string(),
            "status": "succeeded",
        },
    });
    event.to_string().into()
}

/// An event of v3, which has no id of its own: the type, the number of the charge and its status together identify
/// it.
fn event_v3(event_type: &str) -> Bytes {
    let event = serde_json::json!({
        "event": event_type,
        "data": {
            "id": number(),
            "tx_ref": uuid::Uuid::new_v4().to_string(),
            "flw_ref": format!("FLW-{}", number()),
            "amount": 4200,
            "currency": "NGN",
            "status": "successful",
        },
    });
    event.to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_flutterwave_does() {
        let headers = |version, genuine| {
            let webhook = webhook(Bytes::from_static(b"{}"), Secret::new("hash").unwrap(), version).unwrap();
            let (name, value) = (webhook.sign)(UNIX_EPOCH, genuine).remove(0);
            format!("{name}: {}", value.to_str().unwrap())
        };
        // printf '{}' | openssl dgst -sha256 -hmac hash -binary | base64
        assert_eq!(headers(Version::V4, true), "flutterwave-signature: ndI1NBYZLEZLtsI3TE7/HgBUyv5GQhioXVYNEhBQ3y8=");
        assert_ne!(headers(Version::V4, true), headers(Version::V4, false));
        assert_eq!(headers(Version::V3, true), "verif-hash: hash");
        assert_ne!(headers(Version::V3, true), headers(Version::V3, false));
    }
}
