//! Verifies one recorded request with the server's code: what is the verdict, and why (`oncegate verify`).
//!
//! A [`Case`] holds the request, the configuration and the clock, in the format of the signature vectors; a [`Report`] the
//! verdict, the event's names and an explanation for people. That never holds a secret, nor the signature that would have
//! been right, with which a reader could sign a body.

mod explain;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};
use oncegate_runtime::{config::Problem, secret::Secret};
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest as _, Sha256};

use crate::key::Sent;
use crate::providers::{
    Provider, Refusal,
    flutterwave::{Flutterwave, Version},
    paypal::{
        Certificates, Environment, Fetcher, PayPal,
        store::Source,
        trust::{Trust, TrustError},
    },
    paystack::Paystack,
    standard_webhooks::{self, StandardWebhooks},
    stripe::{self, Stripe},
};

/// The last second of the year 9999: later clocks are set to this.
const LATEST: u64 = 253_402_300_799;

/// A request, the receiver's configuration, and the clock. Unknown fields are ignored.
#[derive(Deserialize, Clone, Default)]
#[serde(default)]
pub struct Case {
    /// Comes back in the report.
    #[serde(deserialize_with = "null_is_nothing")]
    pub id: String,
    /// `stripe`, `paypal`, `flutterwave_v3`, `flutterwave_v4`, `paystack` or `standard_webhooks`.
    #[serde(deserialize_with = "null_is_nothing")]
    pub provider: String,
    /// The headers as they came, names in any case.
    #[serde(deserialize_with = "null_is_nothing")]
    pub headers: BTreeMap<String, Values>,
    /// The body exactly as it came, in base64.
    #[serde(deserialize_with = "null_is_nothing")]
    pub body_base64: String,
    /// The secrets that may have signed it. Blank ones do not count.
    #[serde(deserialize_with = "null_is_nothing")]
    pub secrets: Vec<String>,
    /// The age limit in seconds: 300 if absent, none for PayPal.
    pub tolerance_secs: Option<u64>,
    /// The clock at verification, in Unix seconds.
    #[serde(deserialize_with = "null_is_nothing")]
    pub now_unix: u64,
    /// PayPal: the id of the endpoint, or several.
    pub webhook_id: Option<Values>,
    /// PayPal: `live` or `sandbox`. Live if absent.
    pub environment: Option<String>,
    /// PayPal: the answers at certificate URLs. A URL that is not listed, or whose value is not a text, cannot be fetched.
    pub cert_responses: Option<HashMap<String, serde_json::Value>>,
    /// PayPal: a directory with certificates instead of answers (`PAYPAL_CERT_DIR`).
    pub cert_dir: Option<PathBuf>,
    /// PayPal: fetch the certificate from PayPal, if there are neither answers nor a directory.
    #[serde(deserialize_with = "null_is_nothing")]
    pub fetch_certificates: bool,
    /// PayPal: certificates between the leaf and the roots.
    pub extra_intermediates_pem: Option<String>,
    /// PayPal: whom to trust instead of the public roots.
    pub trust_anchors_pem: Option<String>,
}

/// A member that is null counts as absent.
fn null_is_nothing<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// One text or several, such as a header that was sent twice.
#[derive(Deserialize, Debug, Clone)]
#[serde(untagged)]
pub enum Values {
    /// One.
    One(String),
    /// Several, in order.
    Many(Vec<String>),
}

impl Values {
    fn iter(&self) -> impl Iterator<Item = &str> {
        let texts = match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::Many(texts) => texts,
        };
        texts.iter().map(String::as_str)
    }
}

impl From<&str> for Values {
    fn from(text: &str) -> Self {
        Self::One(text.to_owned())
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("id", &self.id).field("provider", &self.provider).finish_non_exhaustive()
    }
}

/// The result of a case. As JSON it is one line of `oncegate verify --cases`.
#[derive(Serialize, Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The case's.
    pub id: String,
    /// `valid`, one of the names of [`Refusal`], or `unsupported_provider`.
    pub verdict: &'static str,
    /// The event's id as the provider sent it. Only for a valid request, like the following two.
    pub event_id: Option<String>,
    /// The event's type as the provider sent it.
    pub event_type: Option<String>,
    /// The event's name in the ledger. None if the body names no event: the gateway answers 400.
    pub key: Option<String>,
    /// For people: what is wrong, and what to look at.
    #[serde(skip)]
    pub explanation: String,
}

impl Case {
    /// Verifies the request with the same code as the server. Never panics, whatever the case holds. Has to be called
    /// inside a tokio runtime.
    pub async fn verify(&self) -> Report {
        let report = |verdict, explanation| Report {
            id: self.id.clone(),
            verdict,
            event_id: None,
            event_type: None,
            key: None,
            explanation,
        };
        let Some(provider) = self.provider() else {
            return report("unsupported_provider", explain::unsupported(&self.provider));
        };
        let provider = match provider {
            Ok(provider) => provider,
            Err(why) => return report(Refusal::MissingSecret.name(), why),
        };
        let Some(headers) = self.headers() else {
            return report(Refusal::MalformedHeader.name(), explain::unsendable());
        };
        let Ok(body) = STANDARD.decode(&self.body_base64) else {
            return report(Refusal::MalformedBody.name(), "body_base64 is not base64.".to_owned());
        };
        let now = self.now();
        let signed = match attempt(&provider, &headers, &body, now).await {
            Ok(signed) => signed,
            Err(refusal) => {
                let explanation =
                    explain::Refused { case: self, provider: &provider, headers: &headers, body: &body, now }
                        .explain(refusal)
                        .await;
                return report(refusal.name(), explanation);
            }
        };
        let identity = provider.identify(&signed, &body, || Sha256::digest(&body).into()).ok();
        let explanation = explain::valid(&provider, identity.as_ref());
        let Sent { event_id, event_type } = provider.sent(&signed, &body).unwrap_or_default();
        let key = identity.map(|identity| identity.event_id);
        Report { event_id, event_type, key, ..report("valid", explanation) }
    }

    /// The provider as configured. `None` if there is no such provider, an explanation if its secrets cannot be used.
    fn provider(&self) -> Option<Result<Provider, String>> {
        // In the server, blank secrets never reach a provider either: they are dropped when the configuration is read.
        let secrets = secrets(self.secrets.iter().map(String::as_str));
        let tolerance = |default| self.tolerance_secs.map_or(default, Duration::from_secs);
        let bad_secret = |error: crate::providers::BadSecret| format!("A secret cannot be used: {error}.");
        Some(Ok(match self.provider.as_str() {
            "stripe" => Provider::Stripe(Stripe::new(&secrets, tolerance(stripe::TOLERANCE))),
            "paypal" => return Some(self.paypal().map_err(bad_secret)),
            "flutterwave_v3" => Provider::Flutterwave(Flutterwave::new(&secrets, Version::V3)),
            "flutterwave_v4" => Provider::Flutterwave(Flutterwave::new(&secrets, Version::V4)),
            "paystack" => Provider::Paystack(Paystack::new(&secrets)),
            "standard_webhooks" => {
                let standard = StandardWebhooks::new(&secrets, tolerance(standard_webhooks::TOLERANCE));
                return Some(standard.map(Provider::StandardWebhooks).map_err(bad_secret));
            }
            _ => return None,
        }))
    }

    /// Whether a gateway would start with the certificates of this case. If not, says what is wrong with them, as a problem of
    /// the setting that they come from: the one for whom to trust, or the one for what is between.
    ///
    /// # Errors
    ///
    /// A text that holds no certificate in PEM, or something else besides.
    pub fn check_certificates(&self, anchors: &'static str, intermediates: &'static str) -> Result<(), Problem> {
        // The environment has no part in it.
        self.trust(Environment::Live).map(drop).map_err(|error| match error {
            TrustError::Anchors(error) => Problem::from_error(anchors, &error),
            TrustError::Intermediates(error) => Problem::from_error(intermediates, &error),
        })
    }

    fn trust(&self, environment: Environment) -> Result<Trust, TrustError> {
        let anchors = self.trust_anchors_pem.as_deref().map(str::as_bytes);
        let intermediates = self.extra_intermediates_pem.as_deref().map(str::as_bytes);
        Trust::new(environment, anchors, intermediates)
    }

    fn paypal(&self) -> Result<Provider, crate::providers::BadSecret> {
        let environment = match self.environment.as_deref() {
            Some("sandbox") => Environment::Sandbox,
            _ => Environment::Live,
        };
        // What is not a certificate vouches for nobody.
        let trust = Arc::new(self.trust(environment).unwrap_or_else(|_| Trust::in_nobody(environment)));
        let certificates = match (&self.cert_responses, &self.cert_dir) {
            (None, Some(directory)) => PayPal::certificates(Source::Directory(directory.clone()), &trust),
            (None, None) if self.fetch_certificates => match Fetcher::new() {
                Ok(fetcher) => PayPal::certificates(Source::Network(Box::new(fetcher)), &trust),
                Err(_) => Certificates::Given(Arc::default()),
            },
            (answers, _) => {
                let answers = answers.iter().flatten();
                let given = answers.filter_map(|(url, answer)| Some((url.clone(), answer.as_str()?.to_owned())));
                Certificates::Given(Arc::new(given.collect()))
            }
        };
        // The ids may be given as secrets, as for the other providers.
        let given = self.webhook_id.iter().flat_map(Values::iter).chain(self.secrets.iter().map(String::as_str));
        let ids = secrets(given.flat_map(|text| text.split(',')).map(str::trim));
        let tolerance = self.tolerance_secs.map(Duration::from_secs);
        PayPal::new(&ids, environment, certificates, trust, tolerance).map(|paypal| Provider::PayPal(Box::new(paypal)))
    }

    /// `None` if a value cannot be sent in a header at all.
    fn headers(&self) -> Option<HeaderMap> {
        let mut headers = HeaderMap::new();
        for (name, values) in &self.headers {
            // No provider has a header of this name.
            let Ok(name) = HeaderName::try_from(name) else { continue };
            for value in values.iter() {
                headers.try_append(name.clone(), HeaderValue::from_bytes(value.as_bytes()).ok()?).ok()?;
            }
        }
        Some(headers)
    }

    fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.now_unix.min(LATEST))
    }
}

fn secrets<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<Secret> {
    texts.filter_map(|text| Secret::new(text).ok()).collect()
}

/// The same steps as the server's for a request.
async fn attempt(
    provider: &Provider,
    headers: &HeaderMap,
    body: &[u8],
    now: SystemTime,
) -> Result<crate::providers::Signed, Refusal> {
    provider.begin(headers)?.finish(body, now).await
}

#[cfg(test)]
mod tests;
