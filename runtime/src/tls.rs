//! TLS for listeners and for calls, with certificates that are read again when their files change.
//!
//! There is one provider of cryptography, aws-lc-rs, and it is named wherever a configuration is built: none has to be
//! installed for the process, so nothing here can panic for lack of one (T52).

mod client;
mod expiry;
mod server;

use std::sync::Arc;

pub use client::{ClientTls, ClientTlsFiles, Trust, http_client_config};
pub use expiry::{Lent, first_end, last_end};
use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::VerifierBuilderError,
};
pub use server::{ClientAuth, ClientCertificate, HandshakeError, ServerTls, ServerTlsFiles};

/// Why certificates cannot be used. Never shows a key.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM.
    #[error("the {0} is not PEM")]
    NotPem(&'static str),
    /// PEM without what is needed.
    #[error("there is no {0} in the file")]
    Missing(&'static str),
    /// Certificate and key do not go together, or are of a kind that is not supported.
    #[error("certificate and key cannot be used together")]
    Pair(#[source] rustls::Error),
    /// A certificate of an authority cannot be used.
    #[error("a certificate of the authority cannot be used")]
    Authority(#[source] rustls::Error),
    /// Client certificates could not be verified with it.
    #[error("client certificates could not be verified by this authority")]
    Verifier(#[source] VerifierBuilderError),
    /// The provider of cryptography cannot do TLS.
    #[error("TLS cannot be set up")]
    Provider(#[source] rustls::Error),
    /// The self-test failed: a handshake with itself, tried at the start and with every new certificate.
    #[error("the handshake that tests the certificate failed")]
    SelfTest(#[source] rustls::Error),
    /// The system has no trust roots.
    #[error("the system has no trust roots; name a file with the authority's certificates")]
    NoSystemRoots,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| TlsError::NotPem("certificate"))?;
    if chain.is_empty() { Err(TlsError::Missing("certificate")) } else { Ok(chain) }
}

fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => TlsError::Missing("private key"),
        _ => TlsError::NotPem("private key"),
    })
}

fn authorities(pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(pem)? {
        roots.add(certificate).map_err(TlsError::Authority)?;
    }
    Ok(roots)
}

/// What was made from files, and when their certificates expire.
#[derive(Debug)]
struct Read<T> {
    config: Arc<T>,
    /// The own chain.
    own_end: Option<u64>,
    authorities_end: Option<u64>,
}

/// When the certificates in use expire, in seconds since 1970. None: there are none, or it cannot be determined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The own chain.
    pub own: Option<u64>,
    /// The authorities that must have issued the other side's certificate.
    pub authorities: Option<u64>,
}

impl<T> Read<T> {
    fn new(config: T, own: Option<&[u8]>, authorities: Option<&[u8]>) -> Result<Self, TlsError> {
        let end = |pem: Option<&[u8]>, of: fn(&[CertificateDer<'_>]) -> Option<u64>| {
            pem.map_or(Ok(None), |pem| chain(pem).map(|certificates| of(&certificates)))
        };
        let (own_end, authorities_end) = (end(own, first_end)?, end(authorities, last_end)?);
        Ok(Self { config: Arc::new(config), own_end, authorities_end })
    }

    fn ends(&self) -> Ends {
        Ends { own: self.own_end, authorities: self.authorities_end }
    }
}

#[cfg(test)]
mod tests;
