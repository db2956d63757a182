//! The side that listens.

use std::{path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, ServerConnection, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{Ends, Read, TlsError, authorities, chain, key, provider};
use crate::reload::{Counts, Files, FilesError};

/// Where a listener's certificates are.
#[derive(Debug, Clone)]
pub struct ServerTlsFiles {
    /// The chain in PEM, the listener's own certificate first.
    pub certificate: PathBuf,
    /// Its private key in PEM.
    pub key: PathBuf,
    /// The authorities of client certificates in PEM, and whether a client has to have one.
    pub client_ca: Option<(PathBuf, ClientAuth)>,
}

/// Whether a client has to have a certificate. One that is shown is always verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// Without one there is no connection.
    Required,
    /// A client without one is identified by a token, or not at all.
    Optional,
}

/// The names in a client's certificate, which has been verified.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientCertificate {
    /// Its alternative names that are URIs, such as SPIFFE ids.
    pub uris: Vec<String>,
    /// Its alternative names that are DNS names.
    pub dns_names: Vec<String>,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The client took too long.
    #[error("the TLS handshake took too long")]
    TimedOut,
    /// It failed.
    #[error("the TLS handshake failed")]
    Failed(#[source] std::io::Error),
}

/// A listener's TLS. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct ServerTls {
    files: Arc<Files<Read<ServerConfig>>>,
}

impl ServerTls {
    /// Reads the files and tries the certificate in a handshake. `protocols` are offered by ALPN, such as `h2`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, certificates that do not fit together, or TLS that does not work at all.
    pub fn read(files: &ServerTlsFiles, protocols: &'static [&'static [u8]]) -> Result<Self, FilesError> {
        let mut paths = vec![files.certificate.clone(), files.key.clone()];
        let client_auth = files.client_ca.as_ref().map(|(path, auth)| {
            paths.push(path.clone());
            *auth
        });
        let files = Files::read("certificates of the listener", paths, move |content| {
            let client_ca = client_auth.map(|auth| (content[2].as_slice(), auth));
            let config = server_config(&content[0], &content[1], client_ca, protocols)?;
            self_test(&content[0], &content[1])?;
            Ok(Read::new(config, Some(content[0].as_slice()), client_ca.map(|(pem, _)| pem))?)
        })?;
        Ok(Self { files: Arc::new(files) })
    }

    /// Checks the files every `pause`, for ever. Dropping the future ends it.
    pub async fn watch(self, pause: Duration) {
        self.files.watch(pause).await;
    }

    /// How often the files changed.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.files.counts()
    }

    /// When the certificates in use end.
    #[must_use]
    pub fn ends(&self) -> Ends {
        self.files.current().ends()
    }

    /// The handshake, with the certificates as they are now, within `limit`.
    ///
    /// The accept loop has to bound how many are under way. Handshakes wait for their clients, and take no more memory than the
    /// connections that follow; a limited number of places among them would be held by silent peers (W15).
    ///
    /// # Errors
    ///
    /// A client that takes too long, speaks no TLS, or shows no certificate that will do.
    pub async fn accept<T>(
        &self,
        stream: T,
        limit: Duration,
    ) -> Result<(TlsStream<T>, Option<ClientCertificate>), HandshakeError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let accepted = timeout(limit, TlsAcceptor::from(self.files.current().config.clone()).accept(stream)).await;
        let stream = accepted.map_err(|_| HandshakeError::TimedOut)?.map_err(HandshakeError::Failed)?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(names);
        Ok((stream, certificate))
    }
}

/// The names of a verified certificate; none if it cannot be parsed here, which leaves its holder without rights.
fn names(certificate: &CertificateDer<'_>) -> ClientCertificate {
    let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) else { return ClientCertificate::default() };
    ClientCertificate {
        uris: parsed.valid_uri_names().map(str::to_owned).collect(),
        dns_names: parsed.valid_dns_names().map(str::to_owned).collect(),
    }
}

fn server_config(
    certificate: &[u8],
    private_key: &[u8],
    client_ca: Option<(&[u8], ClientAuth)>,
    protocols: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Provider)?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some((pem, auth)) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities(pem)?), provider);
            let verifier = match auth {
                ClientAuth::Required => verifier,
                ClientAuth::Optional => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(TlsError::Verifier)?)
        }
    };
    let mut config = builder.with_single_cert(chain(certificate)?, key(private_key)?).map_err(TlsError::Pair)?;
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    // No resumption: it would accept a client's certificate without checking its validity and authority again. gRPC keeps its
    // connections, so few handshakes would be saved.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A handshake in memory, in which the client accepts this very certificate: the provider works, the key signs for the
/// certificate, and both sides find a version and a cipher suite (T52).
fn self_test(certificate: &[u8], private_key: &[u8]) -> Result<(), TlsError> {
    let server = server_config(certificate, private_key, None, &[])?;
    let own = chain(certificate)?.swap_remove(0);
    let provider = provider();
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Provider)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Exactly { own, provider }))
        .with_no_client_auth();
    let handshake = || -> Result<bool, rustls::Error> {
        let name = ServerName::from(std::net::Ipv4Addr::LOCALHOST);
        let mut client = ClientConnection::new(Arc::new(client), name)?;
        let mut server = ServerConnection::new(Arc::new(server))?;
        // Two round trips are the most that a handshake takes.
        for _ in 0..8 {
            let mut wire = Vec::new();
            let broken = |_| rustls::Error::General("a vector cannot be written to".into());
            while client.wants_write() {
                client.write_tls(&mut wire).map_err(broken)?;
            }
            let mut from_client = wire.as_slice();
            while !from_client.is_empty() {
                server.read_tls(&mut from_client).map_err(broken)?;
                server.process_new_packets()?;
            }
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).map_err(broken)?;
            }
            let mut from_server = wire.as_slice();
            while !from_server.is_empty() {
                client.read_tls(&mut from_server).map_err(broken)?;
                client.process_new_packets()?;
            }
            if !client.is_handshaking() && !server.is_handshaking() {
                return Ok(true);
            }
        }
        Ok(false)
    };
    match handshake() {
        Ok(true) => Ok(()),
        Ok(false) => Err(TlsError::SelfTest(rustls::Error::HandshakeNotComplete)),
        Err(error) => Err(TlsError::SelfTest(error)),
    }
}

/// Accepts one certificate, whoever issued it; its signature is verified all the same.
#[derive(Debug)]
struct Exactly {
    own: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Exactly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.own {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::InvalidCertificate(rustls::CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
