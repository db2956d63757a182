//! PayPal: RSA PKCS#1 v1.5 with SHA-256 over `transmission id|time|webhook id|CRC-32 of the body`, verified with a
//! certificate whose address stands in the request.
//!
//! That does not mean that the request is trusted: the address has to be one of PayPal's (`cert_url`), the certificate has
//! to lead to a public root and bear PayPal's name (`trust`), and strangers can make the gateway fetch only a little
//! (`store`). The webhook id is configuration, never taken from the request: it ties a notification to this endpoint.
//!
//! The signature covers only a CRC of the body. Whoever has seen one genuine set of headers can use it with any body padded
//! to the same CRC; so the transmission id goes to the ledger, which refuses it with another body.

mod address;
pub(crate) mod cert_url;
mod fetch;
pub(crate) mod store;
pub(crate) mod trust;

use std::{
    collections::HashMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
pub(crate) use cert_url::CertUrl;
pub(crate) use fetch::Fetcher;
use http::{HeaderMap, HeaderName};
use oncegate_runtime::secret::Secret;
use store::{Source, Store};
use trust::{Chain, Trust};

use super::{BadSecret, Lack, Refusal, credentials};
use crate::{
    failures::Source as Sender,
    key::{Members, Paths},
};

/// What names an event: `id` alone. The id of the resource repeats over types.
pub(crate) static MEMBERS: Members = Members {
    paths: Paths::new(&[&["id"], &["event_type"]]),
    key: &[&[0]],
    naming: 0,
    sent_id: &[0],
    event_type: &[1],
    shape: None,
};

const ID: HeaderName = HeaderName::from_static("paypal-transmission-id");
const TIME: HeaderName = HeaderName::from_static("paypal-transmission-time");
const SIGNATURE: HeaderName = HeaderName::from_static("paypal-transmission-sig");
const CERT_URL: HeaderName = HeaderName::from_static("paypal-cert-url");
const ALGORITHM: HeaderName = HeaderName::from_static("paypal-auth-algo");
const VERSION: HeaderName = HeaderName::from_static("paypal-auth-version");

/// Passed on to the application (G7).
pub(crate) static SIGNATURE_HEADERS: [HeaderName; 6] = [ID, TIME, SIGNATURE, CERT_URL, ALGORITHM, VERSION];

/// The headers, with the longest value of each that PayPal's own verification API takes; but for the signature, of which it takes
/// 500 bytes: that is what a key of 3,000 bits makes, and larger ones are permitted.
const HEADERS: [(HeaderName, usize); 5] =
    [(ID, 50), (TIME, 100), (SIGNATURE, trust::SIGNATURE_BYTES_MAX), (CERT_URL, 500), (ALGORITHM, 100)];

/// The one algorithm (W6). The name in the header is compared with it and chooses nothing.
const ALGORITHM_NAME: &[u8] = b"SHA256withRSA";

/// The webhook id that PayPal's simulator signs with: accepting it means accepting made-up events from anybody.
const SIMULATOR_WEBHOOK_ID: &str = "WEBHOOK_ID";

/// Bytes of a webhook id; PayPal's have 17.
const WEBHOOK_ID_BYTES_MAX: usize = 50;

/// Which of PayPal's two worlds an endpoint belongs to. Neither takes the other's events.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Environment {
    /// Real money.
    Live,
    /// Play money.
    Sandbox,
}

/// PayPal with the webhook ids of its endpoint.
pub struct PayPal {
    webhook_ids: credentials::Keys<Box<str>>,
    environment: Environment,
    certificates: Certificates,
    trust: Arc<Trust>,
    tolerance: Option<Duration>,
}

/// Where certificates come from.
#[derive(Clone)]
pub(crate) enum Certificates {
    /// Fetched or read from a directory, and kept.
    Store(Arc<Store>),
    /// Given beforehand, by URL, to examine a single request.
    Given(Arc<HashMap<String, String>>),
}

impl PayPal {
    pub(crate) fn new(
        secrets: &[Secret],
        environment: Environment,
        certificates: Certificates,
        trust: Arc<Trust>,
        tolerance: Option<Duration>,
    ) -> Result<Self, BadSecret> {
        let webhook_ids = credentials::Keys::new(webhook_ids(secrets, environment)?);
        Ok(Self { webhook_ids, environment, certificates, trust, tolerance })
    }

    /// The certificates of one endpoint, fetched or from a directory.
    pub(crate) fn certificates(source: Source, trust: &Arc<Trust>) -> Certificates {
        Certificates::Store(Store::new(source, trust.clone()))
    }

    /// Whom it trusts to issue certificates.
    pub(crate) fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Where its certificates are kept.
    pub(crate) fn store(&self) -> Option<&Arc<Store>> {
        match &self.certificates {
            Certificates::Store(store) => Some(store),
            Certificates::Given(_) => None,
        }
    }

    pub(super) fn replace_secrets(&self, secrets: &[Secret]) -> Result<(), BadSecret> {
        self.webhook_ids.replace(webhook_ids(secrets, self.environment)?);
        Ok(())
    }

    pub(super) fn begin(&self, headers: &HeaderMap) -> Result<Verification, Refusal> {
        let webhook_ids = self.webhook_ids.get()?;
        // A missing header is reported before a malformed one, whatever their order.
        if HEADERS.iter().any(|(name, _)| !headers.contains_key(name)) {
            return Err(Refusal::MissingHeader);
        }
        let [id, time, signature, url, algorithm] = HEADERS.each_ref().map(|(name, bytes_max)| {
            let value = credentials::single(headers, name)?;
            if value.len() > *bytes_max { Err(Refusal::MalformedHeader) } else { Ok(value) }
        });
        let (id, time) = (signed_text(id?)?, signed_text(time?)?);
        let (signature, url, algorithm) = (signature?, url?, algorithm?);
        if algorithm != ALGORITHM_NAME {
            return Err(Refusal::UnsupportedAlgorithm);
        }
        let url = CertUrl::parse(url, self.environment).ok_or(Refusal::UntrustedCertUrl)?;
        // What does not decode, or has the length of no key, matches nothing; refused here, it costs no fetch.
        let signature = STANDARD.decode(signature).ok().filter(|signature| trust::may_be_signature(signature));
        let signature = signature.ok_or(Refusal::BadSignature)?;
        let sent = match self.tolerance {
            None => None,
            Some(_) => Some(humantime::parse_rfc3339(time).map_err(|_| Refusal::MalformedHeader)?),
        };
        Ok(Verification {
            webhook_ids,
            certificates: self.certificates.clone(),
            trust: self.trust.clone(),
            id: id.to_owned(),
            time: time.to_owned(),
            url,
            signature,
            limit: self.tolerance.zip(sent),
            sender: None,
        })
    }
}

/// A part of the signed text. A bar in it would shift the boundaries between the parts.
fn signed_text(value: &[u8]) -> Result<&str, Refusal> {
    let permitted = |byte: &u8| (0x21..=0x7E).contains(byte) && *byte != b'|';
    let text = std::str::from_utf8(value).ok().filter(|text| !text.is_empty() && text.as_bytes().iter().all(permitted));
    text.ok_or(Refusal::MalformedHeader)
}

impl fmt::Debug for PayPal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PayPal")
            .field("environment", &self.environment)
            .field("tolerance", &self.tolerance)
            .finish_non_exhaustive()
    }
}

fn webhook_ids(secrets: &[Secret], environment: Environment) -> Result<Arc<[Box<str>]>, BadSecret> {
    secrets
        .iter()
        .map(|secret| {
            let id = secret.expose();
            let permitted = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            if id.len() > WEBHOOK_ID_BYTES_MAX || !id.bytes().all(permitted) {
                return Err(BadSecret::new("not a webhook id, which is letters and digits, at most 50"));
            }
            if id == SIMULATOR_WEBHOOK_ID {
                if environment == Environment::Live {
                    return Err(BadSecret::new(
                        "WEBHOOK_ID is what PayPal's simulator signs with: anybody could send events",
                    ));
                }
                tracing::warn!("events of PayPal's simulator are taken, which anybody can send");
            }
            Ok(id.into())
        })
        .collect()
}

/// A request of PayPal's whose headers were read.
pub struct Verification {
    webhook_ids: Arc<[Box<str>]>,
    certificates: Certificates,
    trust: Arc<Trust>,
    id: String,
    /// As sent: this text was signed.
    time: String,
    url: CertUrl,
    signature: Vec<u8>,
    /// The age limit, with the time when the request was sent.
    limit: Option<(Duration, SystemTime)>,
    /// Who sent it, where that is known.
    pub(super) sender: Option<Sender>,
}

impl Verification {
    /// The transmission id, and the place of the webhook id that it was signed for.
    pub(super) async fn finish(self, body: &[u8], now: SystemTime) -> Result<(String, usize), Refusal> {
        let chain = self.chain(now).await?;
        let crc = crc32fast::hash(body);
        let signed = self.webhook_ids.iter().position(|webhook_id| {
            let message = format!("{}|{}|{webhook_id}|{crc}", self.id, self.time);
            chain.verify_signature(message.as_bytes(), &self.signature)
        });
        let place = signed.ok_or(Refusal::BadSignature)?;
        if let Some((limit, sent)) = self.limit {
            let apart = now.duration_since(sent).unwrap_or_else(|error| error.duration());
            if apart.as_secs() > limit.as_secs() {
                return Err(Refusal::TimestampOutOfTolerance);
            }
        }
        Ok((self.id, place))
    }

    /// The certificate, trusted at `now`.
    async fn chain(&self, now: SystemTime) -> Result<Arc<Chain>, Refusal> {
        match &self.certificates {
            Certificates::Store(store) => store.get(&self.url, now, self.sender).await,
            Certificates::Given(answers) => {
                let answer = answers.get(&self.url.to_string()).ok_or(Refusal::CertUnavailable(Lack::Name))?;
                let chain = Chain::parse(answer.as_bytes()).ok_or(Refusal::CertUnavailable(Lack::Source))?;
                self.trust.verify(&chain, now)?;
                Ok(Arc::new(chain))
            }
        }
    }
}

impl fmt::Debug for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verification").field("url", &self.url).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
