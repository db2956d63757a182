//! The side that calls.

use std::{path::PathBuf, sync::Arc, time::Duration};

use rustls::{ClientConfig, RootCertStore, client::Resumption, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{Ends, Read, TlsError, authorities, chain, key, provider};
use crate::reload::{Counts, Files, FilesError};

/// Where a caller's certificates are.
#[derive(Debug, Clone, Default)]
pub struct ClientTlsFiles {
    /// The authorities that must have issued the server's certificate, in PEM; None: the system's.
    pub ca: Option<PathBuf>,
    /// The caller's own chain and private key in PEM, where the server asks for them.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A caller's TLS. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct ClientTls {
    files: Arc<Files<Read<ClientConfig>>>,
}

impl ClientTls {
    /// Reads the files. `protocols` are offered by ALPN.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, certificates that do not fit together, or a system without trust roots.
    pub fn read(files: &ClientTlsFiles, protocols: &'static [&'static [u8]]) -> Result<Self, FilesError> {
        let mut paths: Vec<PathBuf> = files.ca.iter().cloned().collect();
        let (has_ca, has_identity) = (files.ca.is_some(), files.identity.is_some());
        if let Some((certificate, key)) = &files.identity {
            paths.extend([certificate.clone(), key.clone()]);
        }
        let files = Files::read("certificates of the caller", paths, move |content| {
            let (ca, rest) = if has_ca { (content.first(), &content[1..]) } else { (None, content) };
            let identity = if has_identity { Some((rest[0].as_slice(), rest[1].as_slice())) } else { None };
            let ca = ca.map(Vec::as_slice);
            let config = client_config(ca, identity, protocols)?;
            Ok(Read::new(config, identity.map(|(certificate, _)| certificate), ca)?)
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

    /// The current configuration, for clients that make their connections themselves.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        self.files.current().config.clone()
    }

    /// The handshake, with the certificates as they are now. Has no time-out of its own.
    ///
    /// # Errors
    ///
    /// A server whose certificate was not issued by the authorities or is not for `name`, or that refuses
    /// ours.
    pub async fn connect(&self, name: ServerName<'static>, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        TlsConnector::from(self.config()).connect(name, stream).await
    }
}

fn client_config(
    ca: Option<&[u8]>,
    identity: Option<(&[u8], &[u8])>,
    protocols: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    let roots = match ca {
        Some(pem) => authorities(pem)?,
        None => system_roots()?,
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Provider)?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, private_key)) => {
            builder.with_client_auth_cert(chain(certificate)?, key(private_key)?).map_err(TlsError::Pair)?
        }
    };
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    // A new connection presents the current certificate.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// What an HTTP client without a certificate of its own trusts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The system's roots, which are read for it: a hundred files on some systems.
    System,
    /// Nobody: for a client that is known not to use TLS.
    Nobody,
}

/// The TLS of an HTTP client that presents no certificate, for a connector that sets the protocols itself.
///
/// # Errors
///
/// [`Trust::System`] on a system that has no trust roots.
pub fn http_client_config(trust: Trust) -> Result<ClientConfig, TlsError> {
    let roots = match trust {
        Trust::System => system_roots()?,
        Trust::Nobody => RootCertStore::empty(),
    };
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    Ok(builder.map_err(TlsError::Provider)?.with_root_certificates(roots).with_no_client_auth())
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    // Some systems have a few that cannot be parsed; the others are enough.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(TlsError::NoSystemRoots) } else { Ok(roots) }
}
