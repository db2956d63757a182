//! Whose certificate is PayPal's: one that leads to a trusted root now, bears exactly PayPal's name, may authenticate a
//! server, and has an RSA key of decent size.
//!
//! Revocation is not checked: PayPal's own certificate has been revoked while in use, and a strict check would have lost
//! every event.

use std::{fmt, ops::RangeInclusive, time::SystemTime};

use aws_lc_rs::rsa::PublicEncryptingKey;
use oncegate_runtime::tls;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime, pem::PemObject as _};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert, aws_lc_rs as algorithms};

use super::Environment;
use crate::providers::Refusal;

/// How many certificates of one answer are looked at. A chain has three.
const CERTIFICATES_MAX: usize = 8;

/// Bits of a key: the fewest that are safe, and the most that the algorithm takes.
const KEY_BITS: RangeInclusive<usize> = 2_048..=8_192;

/// Bytes of the longest signature, in base64.
pub(super) const SIGNATURE_BYTES_MAX: usize = (*KEY_BITS.end() / 8).div_ceil(3) * 4;

/// Whom to trust.
pub(crate) struct Trust {
    anchors: Vec<TrustAnchor<'static>>,
    /// For answers that hold only the leaf, as PayPal's have done.
    intermediates: Vec<CertificateDer<'static>>,
    name: &'static str,
    /// When the files' certificates expire, in seconds since 1970: the last of the anchors, the first of the intermediates.
    /// None without a file.
    pub(crate) anchors_end: Option<u64>,
    pub(crate) intermediates_end: Option<u64>,
}

/// Why a file with certificates cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PemError {
    #[error("holds no certificate in PEM")]
    None,
    #[error("holds something that is no certificate")]
    Broken,
}

impl Trust {
    /// Trusts the public roots that are compiled in, or instead of them the certificates in `anchors`.
    pub(crate) fn new(
        environment: Environment,
        anchors: Option<&[u8]>,
        intermediates: Option<&[u8]>,
    ) -> Result<Self, TrustError> {
        let (anchors, anchors_end) = match anchors {
            None => (webpki_roots::TLS_SERVER_ROOTS.to_vec(), None),
            Some(pem) => {
                let roots = certificates(pem).map_err(TrustError::Anchors)?;
                let anchors = roots.iter().map(|root| anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()));
                let anchors = anchors.collect::<Result<_, _>>().map_err(|_| TrustError::Anchors(PemError::Broken))?;
                (anchors, tls::last_end(&roots))
            }
        };
        let intermediates = match intermediates {
            None => Vec::new(),
            Some(pem) => certificates(pem).map_err(TrustError::Intermediates)?,
        };
        let intermediates_end = tls::first_end(&intermediates);
        Ok(Self { anchors, intermediates, name: name(environment), anchors_end, intermediates_end })
    }

    /// Trusts nobody.
    pub(crate) fn in_nobody(environment: Environment) -> Self {
        Self {
            anchors: Vec::new(),
            intermediates: Vec::new(),
            name: name(environment),
            anchors_end: None,
            intermediates_end: None,
        }
    }

    /// Whether the chain's leaf is PayPal's at `now`.
    pub(crate) fn verify(&self, chain: &Chain, now: SystemTime) -> Result<(), Refusal> {
        let untrusted = |_| Refusal::UntrustedCertificate;
        let leaf = EndEntityCert::try_from(&chain.leaf).map_err(untrusted)?;
        let intermediates: Vec<CertificateDer<'_>> =
            chain.rest.iter().chain(&self.intermediates).map(|der| CertificateDer::from(der.as_ref())).collect();
        let now = now.duration_since(SystemTime::UNIX_EPOCH).map_err(|_| Refusal::UntrustedCertificate)?;
        leaf.verify_for_usage(
            ALL_VERIFICATION_ALGS,
            &self.anchors,
            &intermediates,
            UnixTime::since_unix_epoch(now),
            KeyUsage::server_auth(),
            None,
            None,
        )
        .map_err(untrusted)?;
        if !self.is_named(&leaf) {
            return Err(Refusal::UntrustedCertificate);
        }
        let key = PublicEncryptingKey::from_der(&leaf.subject_public_key_info());
        if !KEY_BITS.contains(&key.map_or(0, |key| key.key_size_bits())) {
            return Err(Refusal::UntrustedCertificate);
        }
        Ok(())
    }

    /// When a chain of PayPal's expires, in seconds since 1970, even if that has passed. None for anybody else's.
    pub(crate) fn end(&self, chain: &Chain) -> Option<u64> {
        if !self.is_named(&EndEntityCert::try_from(&chain.leaf).ok()?) {
            return None;
        }
        let whole = std::iter::once(&chain.leaf).chain(&chain.rest);
        whole.filter_map(|certificate| tls::first_end(std::slice::from_ref(certificate))).min()
    }

    /// Compared as a whole: a certificate with a wildcard for PayPal's hosts is not the one that signs messages.
    fn is_named(&self, leaf: &EndEntityCert<'_>) -> bool {
        leaf.valid_dns_names().any(|name| name.eq_ignore_ascii_case(self.name))
    }
}

/// The name on the certificate that signs messages.
fn name(environment: Environment) -> &'static str {
    match environment {
        Environment::Live => "messageverificationcerts.paypal.com",
        Environment::Sandbox => "messageverificationcerts.sandbox.paypal.com",
    }
}

/// Which of the two kinds of certificates cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrustError {
    Anchors(PemError),
    Intermediates(PemError),
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("name", &self.name)
            .field("anchors", &self.anchors.len())
            .field("intermediates", &self.intermediates.len())
            .finish()
    }
}

/// A certificate with those that came with it. Not trusted yet.
#[derive(Debug)]
pub(crate) struct Chain {
    leaf: CertificateDer<'static>,
    rest: Vec<CertificateDer<'static>>,
}

impl Chain {
    /// Reads an answer: PEM, the leaf first. Anything else (an HTML page, nothing) is not a certificate.
    pub(crate) fn parse(pem: &[u8]) -> Option<Self> {
        let mut certificates = certificates(pem).ok()?;
        if certificates.len() > CERTIFICATES_MAX {
            return None;
        }
        let rest = certificates.split_off(1);
        let leaf = certificates.pop()?;
        EndEntityCert::try_from(&leaf).ok()?;
        Some(Self { leaf, rest })
    }

    /// Whether the leaf's key signed `message`: PKCS#1 v1.5, SHA-256.
    pub(crate) fn verify_signature(&self, message: &[u8], signature: &[u8]) -> bool {
        EndEntityCert::try_from(&self.leaf)
            .is_ok_and(|leaf| leaf.verify_signature(algorithms::RSA_PKCS1_2048_8192_SHA256, message, signature).is_ok())
    }
}

/// Whether a permitted key could have made it: an RSA signature is as long as its key.
pub(super) fn may_be_signature(bytes: &[u8]) -> bool {
    KEY_BITS.contains(&(bytes.len() * 8))
}

/// The certificates in a PEM text; at least one.
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| PemError::Broken)?;
    if certificates.is_empty() { Err(PemError::None) } else { Ok(certificates) }
}
