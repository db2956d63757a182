//! The payment providers: how each signs, and what names its events. One file each.

mod credentials;
pub mod flutterwave;
pub mod paypal;
pub mod paystack;
pub mod standard_webhooks;
pub mod stripe;

use std::time::SystemTime;

use http::{HeaderMap, HeaderName};
use oncegate_runtime::{labels, secret::Secret};

use crate::{
    failures::Source,
    key::{self, Identity, MalformedBody, Members, Sent},
};

/// Why a request was not accepted as the provider's. Its sender is told none of this: there is one 401 for all (G6, W4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{}", self.name())]
pub enum Refusal {
    /// No signature header.
    MissingHeader,
    /// A signature header that cannot be read, or more than one (W7).
    MalformedHeader,
    /// A body that lacks what the scheme verifies in it.
    MalformedBody,
    /// No signature matches.
    BadSignature,
    /// A matching signature that is too old or too far in the future (W3).
    TimestampOutOfTolerance,
    /// No secret to verify with: refused, never let through.
    MissingSecret,
    /// An algorithm other than the configured one (W6).
    UnsupportedAlgorithm,
    /// A certificate address off the allow-list (W8).
    UntrustedCertUrl,
    /// A certificate that no trusted root vouches for, or somebody else's (W9).
    UntrustedCertificate,
    /// The certificate is unavailable now: the one refusal that waiting mends.
    CertUnavailable(Lack),
}

/// Why a certificate is unavailable. The refusal has one name for both: a genuine sender is told to come again either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lack {
    /// The network or the answer is to blame, and not the sender.
    Source,
    /// There is none by that name, or too many were asked for: the usual result of made-up names.
    Name,
}

labels! {
    /// The names of the refusals: those of the signature vectors, which label metrics.
    pub(crate) enum Verdict {
        MissingHeader => "missing_header",
        MalformedHeader => "malformed_header",
        MalformedBody => "malformed_body",
        BadSignature => "bad_signature",
        TimestampOutOfTolerance => "timestamp_out_of_tolerance",
        MissingSecret => "missing_secret",
        UnsupportedAlgorithm => "unsupported_algorithm",
        UntrustedCertUrl => "untrusted_cert_url",
        UntrustedCertificate => "untrusted_certificate",
        CertUnavailable => "cert_unavailable",
    }
}

impl Refusal {
    /// Whether it counts against its sender (W14).
    pub(crate) fn is_the_senders(self) -> bool {
        match self {
            Self::MissingSecret | Self::CertUnavailable(Lack::Source) => false,
            Self::MissingHeader
            | Self::MalformedHeader
            | Self::MalformedBody
            | Self::BadSignature
            | Self::TimestampOutOfTolerance
            | Self::UnsupportedAlgorithm
            | Self::UntrustedCertUrl
            | Self::UntrustedCertificate
            | Self::CertUnavailable(Lack::Name) => true,
        }
    }

    pub(crate) fn verdict(self) -> Verdict {
        match self {
            Self::MissingHeader => Verdict::MissingHeader,
            Self::MalformedHeader => Verdict::MalformedHeader,
            Self::MalformedBody => Verdict::MalformedBody,
            Self::BadSignature => Verdict::BadSignature,
            Self::TimestampOutOfTolerance => Verdict::TimestampOutOfTolerance,
            Self::MissingSecret => Verdict::MissingSecret,
            Self::UnsupportedAlgorithm => Verdict::UnsupportedAlgorithm,
            Self::UntrustedCertUrl => Verdict::UntrustedCertUrl,
            Self::UntrustedCertificate => Verdict::UntrustedCertificate,
            Self::CertUnavailable(_) => Verdict::CertUnavailable,
        }
    }

    /// The name, as in the vectors.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.verdict().name()
    }
}

/// A secret that cannot be used. The message says why and never what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct BadSecret {
    reason: &'static str,
}

impl BadSecret {
    pub(crate) const fn new(reason: &'static str) -> Self {
        Self { reason }
    }
}

/// Whether each is one secret, for those of Stripe and Paystack, which have neither commas nor white space: what was meant as
/// two would match nothing. A comma separates secrets in the environment and in a file of their own, but not in the file with
/// routes; white space separates them nowhere.
pub(crate) fn each_is_one(secrets: &[Secret]) -> Result<(), BadSecret> {
    let several = |text: &str| text.contains(|part: char| part == ',' || part.is_whitespace());
    if secrets.iter().any(|secret| several(secret.expose())) {
        return Err(BadSecret::new(
            "holds a comma or white space; write several secrets as a list of texts, or with commas",
        ));
    }
    Ok(())
}

/// What a verified request says outside its body.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The sender's name for this delivery: the same one with another body is refused.
    pub delivery_id: Option<String>,
    /// The event's id, where it stands in a signed header.
    pub event_id: Option<String>,
    /// The place of the secret that matched, in the order of the configuration (W5).
    pub secret: usize,
}

labels! {
    /// The providers, by their names in the ledger and in the configuration.
    #[derive(clap::ValueEnum)]
    #[value(rename_all = "snake_case")]
    pub(crate) enum ProviderKind {
        Stripe => "stripe",
        // Not "pay_pal".
        #[value(name = "paypal")]
        PayPal => "paypal",
        Flutterwave => "flutterwave",
        Paystack => "paystack",
        StandardWebhooks => "standard_webhooks",
    }
}

/// A provider with what its verification needs.
#[derive(Debug)]
pub enum Provider {
    /// Stripe.
    Stripe(stripe::Stripe),
    /// PayPal.
    PayPal(Box<paypal::PayPal>),
    /// Flutterwave, v3 or v4.
    Flutterwave(flutterwave::Flutterwave),
    /// Paystack.
    Paystack(paystack::Paystack),
    /// Your own services, and any other sender that follows Standard Webhooks.
    StandardWebhooks(standard_webhooks::StandardWebhooks),
}

impl Provider {
    /// Which one it is.
    pub(crate) fn kind(&self) -> ProviderKind {
        match self {
            Self::Stripe(_) => ProviderKind::Stripe,
            Self::PayPal(_) => ProviderKind::PayPal,
            Self::Flutterwave(_) => ProviderKind::Flutterwave,
            Self::Paystack(_) => ProviderKind::Paystack,
            Self::StandardWebhooks(_) => ProviderKind::StandardWebhooks,
        }
    }

    /// The `provider` of its events in the ledger.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// Whether a genuine request proves nothing about its body (G11).
    #[must_use]
    pub fn is_weak(&self) -> bool {
        matches!(self, Self::Flutterwave(flutterwave) if flutterwave.version() == flutterwave::Version::V3)
    }

    /// Whether the names of its events are unique only within one sender: message ids of services, references of shops, row
    /// numbers of Flutterwave v3. Stripe's, PayPal's and Flutterwave v4's are unique across all senders.
    pub(crate) fn names_are_the_senders(&self) -> bool {
        match self {
            Self::Stripe(_) | Self::PayPal(_) => false,
            Self::Flutterwave(_) => self.is_weak(),
            Self::Paystack(_) | Self::StandardWebhooks(_) => true,
        }
    }

    /// PayPal, which has certificates.
    pub(crate) fn paypal(&self) -> Option<&paypal::PayPal> {
        match self {
            Self::PayPal(paypal) => Some(paypal),
            Self::Stripe(_) | Self::Flutterwave(_) | Self::Paystack(_) | Self::StandardWebhooks(_) => None,
        }
    }

    /// Reads the signature headers, and refuses whatever can be refused before the body is read (G2). Allocates at most the
    /// list of signatures.
    ///
    /// # Errors
    ///
    /// The verdict, when the headers alone decide it.
    pub fn begin(&self, headers: &HeaderMap) -> Result<Verification, Refusal> {
        match self {
            Self::Stripe(stripe) => stripe.begin(headers).map(Verification::Stripe),
            Self::PayPal(paypal) => paypal.begin(headers).map(|begun| Verification::PayPal(Box::new(begun))),
            Self::Flutterwave(flutterwave) => flutterwave.begin(headers).map(Verification::Flutterwave),
            Self::Paystack(paystack) => paystack.begin(headers).map(Verification::Paystack),
            Self::StandardWebhooks(standard) => standard.begin(headers).map(Verification::StandardWebhooks),
        }
    }

    /// Names the event in a verified body (G4). `digest` computes the SHA-256 of `body`, and is called only if that becomes
    /// the name.
    ///
    /// # Errors
    ///
    /// The body is not a JSON object, or names the event twice.
    pub fn identify(
        &self,
        signed: &Signed,
        body: &[u8],
        digest: impl Fn() -> [u8; 32],
    ) -> Result<Identity, MalformedBody> {
        key::identify(self.members(), signed.event_id.as_deref(), body, digest)
    }

    /// The provider's own id and type of the event in a verified body.
    pub(crate) fn sent(&self, signed: &Signed, body: &[u8]) -> Result<Sent, MalformedBody> {
        key::sent(self.members(), signed.event_id.as_deref(), body)
    }

    fn members(&self) -> &'static Members {
        match self {
            Self::Stripe(_) => &stripe::MEMBERS,
            Self::PayPal(_) => &paypal::MEMBERS,
            Self::Flutterwave(flutterwave) => match flutterwave.version() {
                flutterwave::Version::V3 => &flutterwave::MEMBERS_V3,
                flutterwave::Version::V4 => &flutterwave::MEMBERS_V4,
            },
            Self::Paystack(_) => &paystack::MEMBERS,
            Self::StandardWebhooks(_) => &standard_webhooks::MEMBERS,
        }
    }

    /// The headers that go to the application beside `content-type`, so that it can verify again (G7).
    #[must_use]
    pub fn signature_headers(&self) -> &'static [HeaderName] {
        match self {
            Self::Stripe(_) => &stripe::SIGNATURE_HEADERS,
            Self::PayPal(_) => &paypal::SIGNATURE_HEADERS,
            Self::Flutterwave(flutterwave) => match flutterwave.version() {
                flutterwave::Version::V3 => &flutterwave::SIGNATURE_HEADERS_V3,
                flutterwave::Version::V4 => &flutterwave::SIGNATURE_HEADERS_V4,
            },
            Self::Paystack(_) => &paystack::SIGNATURE_HEADERS,
            Self::StandardWebhooks(_) => &standard_webhooks::SIGNATURE_HEADERS,
        }
    }

    /// Replaces the secrets (W5). Verifications that have begun go on with the old ones.
    ///
    /// # Errors
    ///
    /// One of them cannot be used. The old ones stay in place.
    pub fn replace_secrets(&self, secrets: &[Secret]) -> Result<(), BadSecret> {
        match self {
            Self::Stripe(stripe) => {
                each_is_one(secrets)?;
                stripe.replace_secrets(secrets);
            }
            Self::PayPal(paypal) => return paypal.replace_secrets(secrets),
            Self::Flutterwave(flutterwave) => flutterwave.replace_secrets(secrets),
            Self::Paystack(paystack) => {
                each_is_one(secrets)?;
                return paystack.replace_secrets(secrets);
            }
            Self::StandardWebhooks(standard) => return standard.replace_secrets(secrets),
        }
        Ok(())
    }
}

/// A request whose headers have been read and whose body is still to come.
#[derive(Debug)]
pub enum Verification {
    /// Stripe's.
    Stripe(stripe::Verification),
    /// PayPal's.
    PayPal(Box<paypal::Verification>),
    /// Flutterwave's.
    Flutterwave(flutterwave::Verification),
    /// Paystack's.
    Paystack(paystack::Verification),
    /// By Standard Webhooks.
    StandardWebhooks(standard_webhooks::Verification),
}

impl Verification {
    /// Says who sent the request: senders that have named certificates that do not exist may cause fewer fetches than
    /// others.
    #[must_use]
    pub(crate) fn sent_by(mut self, sender: Option<Source>) -> Self {
        if let Self::PayPal(verification) = &mut self {
            verification.sender = sender;
        }
        self
    }

    /// Verifies the bytes received. Async because PayPal's certificate may have to be fetched first.
    ///
    /// # Errors
    ///
    /// The verdict.
    pub async fn finish(self, body: &[u8], now: SystemTime) -> Result<Signed, Refusal> {
        let signed = |secret| Signed { secret, ..Signed::default() };
        match self {
            Self::Stripe(verification) => verification.finish(body, now).map(signed),
            // Boxed, so that the other providers' futures do not carry room for a fetch.
            Self::PayPal(verification) => Box::pin(verification.finish(body, now)).await.map(|(id, secret)| Signed {
                delivery_id: Some(id),
                secret,
                ..Signed::default()
            }),
            Self::Flutterwave(verification) => verification.finish(body).map(signed),
            Self::Paystack(verification) => verification.finish(body).map(signed),
            Self::StandardWebhooks(verification) => {
                let verified = verification.finish(body, now);
                verified.map(|(id, secret)| Signed { event_id: Some(id), secret, ..Signed::default() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn w5_secrets_that_match_nothing_replace_none() {
        let secrets = |text: &str| [Secret::new(text).unwrap()];
        let stripe = Provider::Stripe(stripe::Stripe::new(&secrets("whsec_a"), stripe::TOLERANCE));
        let paystack = Provider::Paystack(paystack::Paystack::new(&secrets("sk_a")));
        for provider in [stripe, paystack] {
            assert!(provider.replace_secrets(&secrets("one")).is_ok());
            for several in ["hunter2 hunter2", "hunter2\thunter2", "hunter2,hunter2"] {
                let error = provider.replace_secrets(&secrets(several)).unwrap_err().to_string();
                assert!(error.contains("comma or white space") && !error.contains("hunter2"), "{error}");
            }
        }
    }

    #[test]
    fn providers_are_configured_by_their_names_in_the_ledger() {
        for kind in ProviderKind::ALL {
            assert_eq!(kind.to_possible_value().unwrap().get_name(), kind.name());
        }
    }
}
