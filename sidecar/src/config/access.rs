//! Who may call, as configured: TLS, identities, and what has to be said out loud.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::ValueEnum;
use oncegate_runtime::{
    config::{Checks, Problem, ShownDuration},
    reload::Files,
    server::Address,
    tls::{self, ServerTls, ServerTlsFiles},
};

use super::Options;
use crate::access::{self, Directory};

/// gRPC is spoken over HTTP/2 and nothing else.
const PROTOCOLS: &[&[u8]] = &[b"h2"];

/// Whether callers have to have a certificate.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// Without one there is no connection.
    Required,
    /// Whoever has none is known by a token.
    Optional,
}

/// Who may call the service on its listener, and how it is protected.
#[derive(Clone, Debug)]
pub struct Access {
    /// TLS on the listener.
    pub tls: Option<ServerTls>,
    /// The identities that may call; None: everybody may do everything.
    pub directory: Option<Arc<Files<Directory>>>,
    /// How often their files are checked for changes.
    pub reload: Duration,
}

impl Access {
    /// No TLS, and everybody may do everything: for listeners that only this process or machine reaches.
    #[must_use]
    pub fn open() -> Self {
        Self { tls: None, directory: None, reload: access::RELOAD }
    }
}

pub(super) fn access(options: &Options, checks: &mut Checks) -> Access {
    let tls = tls(options, checks);
    let directory = options.sidecar_tokens_file.as_deref().filter(|path| is_given(path)).and_then(|path| {
        let read = Directory::read(path.to_owned());
        read.map_err(|error| checks.push(Problem::from_error("SIDECAR_TOKENS_FILE", &error))).ok()
    });
    let has_client_ca = options.sidecar_tls_client_ca_file.as_deref().is_some_and(is_given);
    if let Some(directory) = &directory
        && directory.current().has_certificates()
        && !has_client_ca
    {
        checks.problem(
            "SIDECAR_TOKENS_FILE",
            "there are identities that are known by certificates, and no SIDECAR_TLS_CLIENT_CA_FILE to verify them by",
        );
    }
    checks.within(
        "SIDECAR_ACCESS_RELOAD",
        ShownDuration(options.sidecar_access_reload),
        ShownDuration(Duration::from_millis(10))..=ShownDuration(Duration::from_secs(3_600)),
    );
    if !options.sidecar_listen.is_local() && !options.insecure {
        let mut missing = Vec::new();
        if !options.sidecar_tls_cert_file.as_deref().is_some_and(is_given) {
            missing.push("TLS (SIDECAR_TLS_CERT_FILE, SIDECAR_TLS_KEY_FILE)");
        }
        // Client certificates alone say who calls, but not what they may do: every holder of one could Resolve and
        // Cleanup.
        if !options.sidecar_tokens_file.as_deref().is_some_and(is_given) {
            missing.push("a list of who may call what (SIDECAR_TOKENS_FILE)");
        }
        if !missing.is_empty() {
            checks.problem(
                "SIDECAR_LISTEN",
                format!(
                    "{} can be reached by others, and the service lacks {}: give it that, listen on a loopback address \
                     or a Unix socket, or say --insecure",
                    options.sidecar_listen,
                    missing.join(", and ")
                ),
            );
        }
    }
    Access { tls, directory: directory.map(Arc::new), reload: options.sidecar_access_reload }
}

fn tls(options: &Options, checks: &mut Checks) -> Option<ServerTls> {
    let client_ca = given(options.sidecar_tls_client_ca_file.clone());
    match (given(options.sidecar_tls_cert_file.clone()), given(options.sidecar_tls_key_file.clone())) {
        (None, None) => {
            if client_ca.is_some() {
                checks.problem("SIDECAR_TLS_CLIENT_CA_FILE", "given without SIDECAR_TLS_CERT_FILE: there is no TLS");
            }
            None
        }
        (Some(_), None) => {
            checks.problem("SIDECAR_TLS_KEY_FILE", "missing: the certificate in SIDECAR_TLS_CERT_FILE needs its key");
            None
        }
        (None, Some(_)) => {
            checks.problem("SIDECAR_TLS_CERT_FILE", "missing: the key in SIDECAR_TLS_KEY_FILE needs its certificate");
            None
        }
        (Some(_), Some(_)) if matches!(options.sidecar_listen, Address::Unix(_)) => {
            checks.problem(
                "SIDECAR_TLS_CERT_FILE",
                format!("given, but no TLS is spoken on {}: leave it out", options.sidecar_listen),
            );
            None
        }
        (Some(certificate), Some(key)) => {
            let auth = match options.sidecar_tls_client_auth {
                ClientAuth::Required => tls::ClientAuth::Required,
                ClientAuth::Optional => tls::ClientAuth::Optional,
            };
            let files = ServerTlsFiles { certificate, key, client_ca: client_ca.map(|path| (path, auth)) };
            let read = ServerTls::read(&files, PROTOCOLS);
            let mut settings =
                vec![("SIDECAR_TLS_CERT_FILE", &*files.certificate), ("SIDECAR_TLS_KEY_FILE", &*files.key)];
            settings.extend(files.client_ca.as_ref().map(|(path, _)| ("SIDECAR_TLS_CLIENT_CA_FILE", &**path)));
            read.map_err(|error| checks.push(Problem::from_error(error.setting(&settings), &error))).ok()
        }
    }
}

/// A blank value in a composed environment switches a setting off.
pub(super) fn given(path: Option<PathBuf>) -> Option<PathBuf> {
    path.filter(|path| is_given(path))
}

pub(super) fn is_given(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}
