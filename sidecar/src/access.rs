//! Who may do what: identities with a role and tenants, known by a token or by the names in their certificate (W20, W21).
//!
//! Once identities are configured, what is not permitted here is refused.

mod file;

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

pub use file::FileError;
use jiff::Timestamp;
use oncegate_runtime::{
    reload::{Files, FilesError},
    tls::ClientCertificate,
};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

use crate::method::{Called, Method};

/// The rights of a kind of caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Processes events of its tenants, and reads their History and Stats.
    Caller,
    /// Looks after all events: History, Stats, Resolve, Cleanup. Processes none.
    Operator,
    /// Calls only Cleanup: for the job that runs it every night.
    Cleanup,
}

impl Role {
    /// Whether the role may call it at all. Tenants are checked separately.
    pub fn permits(self, called: Called) -> bool {
        match self {
            Role::Caller => matches!(
                called,
                Called::Api(
                    Method::CheckAndLock
                        | Method::ExtendLock
                        | Method::MarkCompleted
                        | Method::MarkFailed
                        | Method::History
                        | Method::Stats
                ) | Called::Health
            ),
            Role::Operator => matches!(
                called,
                Called::Api(Method::History | Method::Stats | Method::Resolve | Method::Cleanup)
                    | Called::Reflection
                    | Called::Health
            ),
            Role::Cleanup => matches!(called, Called::Api(Method::Cleanup) | Called::Health),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Caller => "caller",
            Role::Operator => "operator",
            Role::Cleanup => "cleanup",
        })
    }
}

/// The tenants that an identity is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tenants {
    /// All of them.
    All,
    /// These; never empty.
    Only(BTreeSet<String>),
}

impl Tenants {
    /// Whether a tenant is among them.
    pub fn include(&self, tenant: &str) -> bool {
        match self {
            Tenants::All => true,
            Tenants::Only(tenants) => tenants.contains(tenant),
        }
    }
}

/// Somebody who is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// For logs.
    pub name: String,
    /// Its rights.
    pub role: Role,
    /// Whose events.
    pub tenants: Tenants,
    /// When its rights end.
    pub expires: Option<Timestamp>,
}

/// Why a caller could not be identified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// Neither token nor certificate.
    NoCredentials,
    /// A token that is in no list, or not sent as `authorization: Bearer`.
    UnknownToken,
    /// A certificate of the right authority, whose names are in no list.
    UnknownCertificate(Arc<ClientCertificate>),
    /// Known, but no longer.
    Expired(Arc<Identity>),
}

/// All known callers. `Debug` shows no token.
#[derive(Debug, Default)]
pub struct Directory {
    tokens: Vec<(TokenDigest, Arc<Identity>)>,
    /// Names in certificates, as `uri:spiffe://...` or `dns:...`.
    certificates: Vec<(String, Arc<Identity>)>,
}

/// SHA-256 of a token.
#[derive(Clone, Copy, PartialEq, Eq)]
struct TokenDigest([u8; 32]);

impl TokenDigest {
    fn of(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenDigest(***)")
    }
}

impl Directory {
    /// Reads the file, again whenever it changes.
    ///
    /// # Errors
    /// When it cannot be read or has anything wrong in it.
    pub fn read(path: std::path::PathBuf) -> Result<Files<Directory>, FilesError> {
        Files::read("identities", vec![path], |content| {
            let text = std::str::from_utf8(&content[0])?;
            Ok(file::parse(text)?)
        })
    }

    /// Whether anybody is known by a certificate.
    pub fn has_certificates(&self) -> bool {
        !self.certificates.is_empty()
    }

    /// Who presents these credentials at `now`. A token takes precedence over a certificate: sending one is deliberate.
    ///
    /// # Errors
    /// When it is nobody known.
    pub fn identify(
        &self,
        authorization: Option<&[u8]>,
        certificate: Option<&Arc<ClientCertificate>>,
        now: Timestamp,
    ) -> Result<Arc<Identity>, Unknown> {
        let identity = match (authorization, certificate) {
            (Some(header), _) => bearer(header).and_then(|token| self.by_token(token)).ok_or(Unknown::UnknownToken)?,
            (None, Some(certificate)) => {
                self.by_certificate(certificate).ok_or_else(|| Unknown::UnknownCertificate(certificate.clone()))?
            }
            (None, None) => return Err(Unknown::NoCredentials),
        };
        if identity.expires.is_some_and(|expires| expires <= now) {
            return Err(Unknown::Expired(identity));
        }
        Ok(identity)
    }

    /// All are compared, in constant time, so that the time taken tells nothing (W4).
    fn by_token(&self, token: &str) -> Option<Arc<Identity>> {
        let digest = TokenDigest::of(token);
        let mut found = u32::MAX;
        for (index, (known, _)) in (0u32..).zip(&self.tokens) {
            let equal: Choice = known.0.ct_eq(&digest.0);
            found.conditional_assign(&index, equal);
        }
        self.tokens.get(usize::try_from(found).ok()?).map(|(_, identity)| identity.clone())
    }

    fn by_certificate(&self, certificate: &ClientCertificate) -> Option<Arc<Identity>> {
        let uris = certificate.uris.iter().map(|name| ("uri:", name));
        let names = certificate.dns_names.iter().map(|name| ("dns:", name));
        uris.chain(names).find_map(|(kind, name)| {
            let matches = |known: &str| known.strip_prefix(kind).is_some_and(|known| known == name);
            self.certificates.iter().find(|(known, _)| matches(known)).map(|(_, identity)| identity.clone())
        })
    }
}

/// The token of `authorization: Bearer TOKEN`. The scheme's case does not matter (RFC 9110, section 11.1).
fn bearer(header: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(header).ok()?;
    let (scheme, token) = text.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// How often the files with tokens and certificates are checked for changes by default.
pub const RELOAD: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
