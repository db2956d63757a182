//! Why a signature fails, in words. Nothing here holds a secret or a signature.

use std::time::{SystemTime, UNIX_EPOCH};

use http::HeaderMap;

use super::{Case, attempt};
use crate::{
    key::Identity,
    providers::{Provider, Refusal, flutterwave::Version},
};

pub(super) fn unsupported(provider: &str) -> String {
    format!(
        "There is no provider {provider:?}; there are stripe, paypal, flutterwave_v3, flutterwave_v4, paystack and \
         standard_webhooks."
    )
}

pub(super) fn unsendable() -> String {
    "A header's value holds bytes that HTTP does not carry (a line break or another control character).".to_owned()
}

pub(super) fn valid(provider: &Provider, identity: Option<&Identity>) -> String {
    let mut text = "The signature is right.".to_owned();
    if provider.is_weak() {
        text =
            "The header repeats the secret. That proves nothing about the body: Flutterwave v3 signs none.".to_owned();
    }
    if identity.is_none() {
        text.push_str(
            " But the body is not one JSON object that names its event once, so the gateway answers 400 malformed_body.",
        );
    }
    text
}

/// A refused request, with what is needed to find out why.
pub(super) struct Refused<'a> {
    pub(super) case: &'a Case,
    pub(super) provider: &'a Provider,
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a [u8],
    pub(super) now: SystemTime,
}

impl Refused<'_> {
    pub(super) async fn explain(&self, refusal: Refusal) -> String {
        match refusal {
            Refusal::MissingHeader => self.missing_header(),
            Refusal::MalformedHeader => self.malformed_header(),
            Refusal::MissingSecret => "No secret was given, or only blank ones.".to_owned(),
            Refusal::BadSignature => self.bad_signature().await,
            Refusal::TimestampOutOfTolerance => self.skew(),
            Refusal::UnsupportedAlgorithm => {
                "paypal-auth-algo is not SHA256withRSA, the one algorithm that is accepted.".to_owned()
            }
            Refusal::UntrustedCertUrl => "paypal-cert-url is not the address of a certificate at PayPal for this \
                 environment: https://api.paypal.com or api-m.paypal.com (live), api.sandbox.paypal.com or \
                 api-m.sandbox.paypal.com (sandbox), then /v1/notifications/certs/ and a name. An event of the other \
                 environment looks like this too."
                .to_owned(),
            Refusal::UntrustedCertificate => "The certificate is not PayPal's: it leads to no trusted root at this time \
                 (an intermediate may be missing: --intermediates-file here, PAYPAL_INTERMEDIATES_FILE for the gateway), is \
                 not valid at this time, bears another name, or has too short a key."
                .to_owned(),
            Refusal::CertUnavailable(_) => "The certificate cannot be had at the moment, or what was answered is no \
                 certificate. The gateway answers 503, and PayPal sends the event again."
                .to_owned(),
            Refusal::MalformedBody => "The body lacks what the scheme verifies in it.".to_owned(),
        }
    }

    /// The headers that the scheme needs.
    fn needed(&self) -> Vec<&'static str> {
        match self.provider {
            Provider::Stripe(_) => vec!["stripe-signature"],
            Provider::PayPal(_) => vec![
                "paypal-transmission-id",
                "paypal-transmission-time",
                "paypal-transmission-sig",
                "paypal-cert-url",
                "paypal-auth-algo",
            ],
            Provider::Flutterwave(flutterwave) => match flutterwave.version() {
                Version::V3 => vec!["verif-hash"],
                Version::V4 => vec!["flutterwave-signature"],
            },
            Provider::Paystack(_) => vec!["x-paystack-signature"],
            Provider::StandardWebhooks(_) if self.headers.keys().any(|name| name.as_str().starts_with("svix-")) => {
                vec!["svix-id", "svix-timestamp", "svix-signature"]
            }
            Provider::StandardWebhooks(_) => vec!["webhook-id", "webhook-timestamp", "webhook-signature"],
        }
    }

    fn missing_header(&self) -> String {
        let missing: Vec<_> = self.needed().into_iter().filter(|name| !self.headers.contains_key(*name)).collect();
        let mut text = format!("Missing: {}.", missing.join(", "));
        if let Provider::Flutterwave(flutterwave) = self.provider {
            let (other, version) = match flutterwave.version() {
                Version::V3 => ("flutterwave-signature", "v4"),
                Version::V4 => ("verif-hash", "v3"),
            };
            if self.headers.contains_key(other) {
                text.push_str(&format!(" There is {other}: Flutterwave signs {version} here."));
            }
        } else {
            text.push_str(" Either the request is not the provider's, or a proxy on the way drops the header.");
        }
        text
    }

    fn malformed_header(&self) -> String {
        for name in self.needed() {
            let times = self.headers.get_all(name).iter().count();
            if times > 1 {
                return format!("{name} stands {times} times in the request; which one counts would be a guess.");
            }
        }
        match self.provider {
            Provider::Stripe(_) => {
                "stripe-signature is not t=<seconds>,v1=<signature>: exactly one t, digits only, at least one v1, no blanks."
            }
            Provider::PayPal(_) => {
                "A paypal- header is too long, is empty, or holds what PayPal never sends in it; with a limit of age, \
                 paypal-transmission-time has to be a time such as 2026-02-02T02:39:41Z."
            }
            Provider::StandardWebhooks(_) => {
                "The id may not hold a full stop or a blank, the timestamp is digits only, the signature holds at least one \
                 v1 or v1a entry, and webhook-* and svix-* are not mixed."
            }
            Provider::Flutterwave(_) | Provider::Paystack(_) => "The signature header cannot be read.",
        }
        .to_owned()
    }

    async fn bad_signature(&self) -> String {
        if let Some(change) = self.changed_body().await {
            return format!("The secret is right, but the body was changed on the way: it fits {change}.");
        }
        let mut text = match self.provider {
            Provider::Stripe(_) => {
                "No signature in the header fits. Either the secret is of another endpoint, or of test instead of live mode \
                 (each has its own), or the body is not the bytes that were sent. The key is the whole text, whsec_ \
                 included."
            }
            Provider::PayPal(_) => {
                "The signature does not fit transmission id, time, webhook id and body. Most often the webhook id is of \
                 another endpoint (events of the simulator are signed with the id WEBHOOK_ID); or the body is not the bytes \
                 that were sent."
            }
            Provider::Flutterwave(flutterwave) => match flutterwave.version() {
                Version::V3 => "The header is not the secret hash of the dashboard.",
                Version::V4 => {
                    "The signature does not fit. Either the secret hash is another one than in the dashboard, or the body is \
                     not the bytes that were sent."
                }
            },
            Provider::Paystack(_) => {
                "The signature does not fit. The key is the account's API secret key, and those of test and live mode \
                 differ; or the body is not the bytes that were sent."
            }
            Provider::StandardWebhooks(_) => {
                "No signature in the header fits. Either the secret is another one, or id, time or body are not those that \
                 were signed."
            }
        }
        .to_owned();
        if let Some(hint) = self.form_of_signature() {
            text.push(' ');
            text.push_str(hint);
        }
        text
    }

    /// Says if the header does not even have the form of a signature.
    fn form_of_signature(&self) -> Option<&'static str> {
        let value = |name: &str| self.headers.get(name).map(|value| value.as_bytes().to_vec());
        match self.provider {
            Provider::Paystack(_) => {
                let value = value("x-paystack-signature")?;
                let fits = value.len() == 128 && value.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
                (!fits).then_some("It does not look like Paystack's, which is 128 digits of lower-case hex.")
            }
            Provider::Flutterwave(flutterwave) if flutterwave.version() == Version::V4 => {
                (value("flutterwave-signature")?.len() != 44)
                    .then_some("It does not look like one of v4, which is 44 characters of base64.")
            }
            Provider::Stripe(_) | Provider::PayPal(_) | Provider::Flutterwave(_) | Provider::StandardWebhooks(_) => {
                None
            }
        }
    }

    /// Undoes changes that proxies, editors and frameworks make to bodies, and names the one without which the signature
    /// fits.
    async fn changed_body(&self) -> Option<&'static str> {
        let body = self.body;
        let stripped = body.strip_suffix(b"\n").map(|body| body.strip_suffix(b"\r").unwrap_or(body));
        let mut variants = vec![("with one more line break at its end", [body, b"\n"].concat())];
        variants.extend(stripped.map(|body| ("without the line break at its end", body.to_vec())));
        if body.contains(&b'\r') {
            variants.push(("with plain line breaks", body.iter().copied().filter(|&byte| byte != b'\r').collect()));
        } else if body.contains(&b'\n') {
            let text = String::from_utf8_lossy(body).replace('\n', "\r\n");
            variants.push(("with CR LF as line breaks", text.into_bytes()));
        }
        if let Some(body) = body.strip_prefix(b"\xEF\xBB\xBF") {
            variants.push(("without the byte order mark", body.to_vec()));
        }
        if let Ok(value) = serde_json::from_slice::<&serde_json::value::RawValue>(body) {
            variants.push(("without white space between its parts", without_blanks(value.get())));
        }
        for (what, variant) in variants {
            let fits = attempt(self.provider, self.headers, &variant, self.now).await;
            if variant != body && matches!(fits, Ok(_) | Err(Refusal::TimestampOutOfTolerance)) {
                return Some(what);
            }
        }
        None
    }

    fn skew(&self) -> String {
        let text = |name: &str| self.headers.get(name).and_then(|value| value.to_str().ok());
        let seconds = match self.provider {
            Provider::Stripe(_) => text("stripe-signature")
                .and_then(|value| value.split(',').find_map(|item| item.strip_prefix("t=")))
                .and_then(|digits| digits.parse().ok()),
            Provider::PayPal(_) => text("paypal-transmission-time")
                .and_then(|time| humantime::parse_rfc3339(time).ok())
                .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
                .map(|since| since.as_secs()),
            Provider::Flutterwave(_) | Provider::Paystack(_) | Provider::StandardWebhooks(_) => {
                text("webhook-timestamp").or_else(|| text("svix-timestamp")).and_then(|digits| digits.parse().ok())
            }
        };
        let limit = self.case.tolerance_secs.unwrap_or(300);
        let now = self.now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        match seconds {
            Some(seconds) if seconds < now => format!(
                "The signature is right, but {} s old; at most {limit} s are accepted. The request was held up or is a \
                 replay, or the clock here is fast.",
                now - seconds
            ),
            Some(seconds) => format!(
                "The signature is right, but its time lies {} s in the future; at most {limit} s are accepted. The clock \
                 here is slow, or the sender's is fast.",
                seconds - now
            ),
            None => format!("The signature is right, but more than {limit} s old or ahead."),
        }
    }
}

/// The JSON without white space outside strings.
fn without_blanks(json: &str) -> Vec<u8> {
    let mut compact = Vec::with_capacity(json.len());
    let (mut in_string, mut escaped) = (false, false);
    for byte in json.bytes() {
        if !in_string && byte.is_ascii_whitespace() {
            continue;
        }
        compact.push(byte);
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ => {}
        }
    }
    compact
}
