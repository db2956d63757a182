//! The payment providers: how each signs, and what names its events. One file each.

pub mod stripe;

use std::time::SystemTime;

use http::{HeaderMap, HeaderName};
use oncegate_runtime::secret::Secret;

use crate::key::{self, Identity, MalformedBody};

/// Why a request was not accepted as the provider's. The names are those of the signature vectors, and label metrics;
/// the provider is told none of it: one 401 for all (G6, W4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// No signature header.
    #[error("missing_header")]
    MissingHeader,
    /// A signature header that cannot be read, or more than one (W7).
    #[error("malformed_header")]
    MalformedHeader,
    /// A body without what the scheme verifies in it.
    #[error("malformed_body")]
    MalformedBody,
    /// No signature matches.
    #[error("bad_signature")]
    BadSignature,
    /// A signature that matches, too old or too far in the future (W3).
    #[error("timestamp_out_of_tolerance")]
    TimestampOutOfTolerance,
    /// No secret to verify with: refused, never let through.
    #[error("missing_secret")]
    MissingSecret,
    /// An algorithm other than the configured one (W6).
    #[error("unsupported_algorithm")]
    UnsupportedAlgorithm,
    /// A certificate address off the allow-list (W8).
    #[error("untrusted_cert_url")]
    UntrustedCertUrl,
    /// A certificate that no trusted root vouches for, or of somebody else (W9).
    #[error("untrusted_certificate")]
    UntrustedCertificate,
    /// The certificate cannot be had now: the one refusal that waiting mends.
    #[error("cert_unavailable")]
    CertUnavailable,
}

impl Refusal {
    /// All, for tables.
    pub const ALL: [Self; 10] = [
        Self::MissingHeader,
        Self::MalformedHeader,
        Self::MalformedBody,
        Self::BadSignature,
        Self::TimestampOutOfTolerance,
        Self::MissingSecret,
        Self::UnsupportedAlgorithm,
        Self::UntrustedCertUrl,
        Self::UntrustedCertificate,
        Self::CertUnavailable,
    ];

    /// The name, as in the vectors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MissingHeader => "missing_header",
            Self::MalformedHeader => "malformed_header",
            Self::MalformedBody => "malformed_body",
            Self::BadSignature => "bad_signature",
            Self::TimestampOutOfTolerance => "timestamp_out_of_tolerance",
            Self::MissingSecret => "missing_secret",
            Self::UnsupportedAlgorithm => "unsupported_algorithm",
            Self::UntrustedCertUrl => "untrusted_cert_url",
            Self::UntrustedCertificate => "untrusted_certificate",
            Self::CertUnavailable => "cert_unavailable",
        }
    }
}

/// A provider with what its verification needs.
#[derive(Debug)]
pub enum Provider {
    /// Stripe.
    Stripe(stripe::Stripe),
}

impl Provider {
    /// The `provider` of its events in the ledger.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stripe(_) => "stripe",
        }
    }

    /// Reads the signature headers: all that can be refused before the body is read (G2). Allocates at most the list
    /// of signatures.
    ///
    /// # Errors
    ///
    /// The verdict, when the headers alone decide it.
    pub fn begin(&self, headers: &HeaderMap) -> Result<Verification, Refusal> {
        match self {
            Self::Stripe(stripe) => stripe.begin(headers).map(Verification::Stripe),
        }
    }

    /// Names the event in a verified body (G4). `digest` is the SHA-256 of `body`.
    ///
    /// # Errors
    ///
    /// The body is not a JSON object, or names the event twice.
    pub fn identify(&self, body: &[u8], digest: &[u8; 32]) -> Result<Identity, MalformedBody> {
        match self {
            Self::Stripe(_) => key::identify(&stripe::MEMBERS, body, digest),
        }
    }

    /// The headers that go to the application beside `content-type`, so that it can verify again (G7).
    #[must_use]
    pub fn signature_headers(&self) -> &'static [HeaderName] {
        match self {
            Self::Stripe(_) => &stripe::SIGNATURE_HEADERS,
        }
    }

    /// Puts other secrets in place (W5). Verifications that have begun go on with the old ones.
    pub fn replace_secrets(&self, secrets: &[Secret]) {
        match self {
            Self::Stripe(stripe) => stripe.replace_secrets(secrets),
        }
    }
}

/// A request whose headers were read and whose body is still to come.
#[derive(Debug)]
pub enum Verification {
    /// Stripe's.
    Stripe(stripe::Verification),
}

impl Verification {
    /// Verifies the bytes received. A future because some schemes have to fetch a certificate first.
    ///
    /// # Errors
    ///
    /// The verdict.
    pub async fn finish(self, body: &[u8], now: SystemTime) -> Result<(), Refusal> {
        match self {
            Self::Stripe(verification) => verification.finish(body, now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_display_their_names() {
        for refusal in Refusal::ALL {
            assert_eq!(refusal.to_string(), refusal.name());
        }
    }
}
