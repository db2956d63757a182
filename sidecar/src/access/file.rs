//! The file with identities: TOML, an `[[identity]]` each.

use std::{collections::BTreeSet, sync::Arc};

use jiff::Timestamp;
use serde::Deserialize;
use toml::value::Datetime;

use super::{Directory, Identity, Role, Tenants, TokenDigest};

/// A shorter token could be guessed from its digest.
const TOKEN_BYTES_MIN: usize = 16;

/// Why the file cannot be used. Shows no token.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not TOML, or with unknown members. Only the place and kind of the mistake are reported: the line may contain a
    /// token.
    #[error("line {line}: {message}")]
    Toml {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// What is wrong with identities, each by its number or name.
    #[error("{}", .0.join("; "))]
    Identities(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    identity: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    role: Role,
    #[serde(default)]
    tenants: Vec<String>,
    token: Option<String>,
    token_sha256: Option<OneOrMore>,
    #[serde(default)]
    certificates: Vec<String>,
    expires: Option<Datetime>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

pub(super) fn parse(text: &str) -> Result<Directory, FileError> {
    let document: Document = toml::from_str(text).map_err(|error| {
        let before = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text.get(..before).map_or(1, |before| before.matches('\n').count() + 1);
        FileError::Toml { line, message: error.message().to_owned() }
    })?;
    let mut directory = Directory::default();
    let mut problems = Vec::new();
    let mut names = BTreeSet::new();
    for entry in document.identity {
        let name = entry.name.clone();
        if name.trim().is_empty() || name.chars().any(char::is_control) || !names.insert(name.clone()) {
            problems.push(format!("{name:?}: every identity has a name of its own"));
        }
        entry.read(&mut directory, &mut |problem: &str| problems.push(format!("{name}: {problem}")));
    }
    if names.is_empty() && problems.is_empty() {
        problems.push("there is no [[identity]] in it, and nobody could call".to_owned());
    }
    if problems.is_empty() { Ok(directory) } else { Err(FileError::Identities(problems)) }
}

impl Entry {
    fn read(self, directory: &mut Directory, problem: &mut dyn FnMut(&str)) {
        let tenants = match self.tenants.as_slice() {
            [] if self.role == Role::Caller => {
                problem("a caller is bound to tenants: tenants = [\"default\"], or [\"*\"] for all");
                Tenants::Only(BTreeSet::new())
            }
            [] => Tenants::All,
            [all] if all == "*" => Tenants::All,
            some => {
                if some.iter().any(|tenant| tenant.is_empty() || tenant == "*") {
                    problem("tenants are names, or [\"*\"] alone for all");
                }
                Tenants::Only(some.iter().cloned().collect())
            }
        };
        let expires = self.expires.and_then(|at| {
            let parsed = at.to_string().parse::<Timestamp>();
            parsed.map_err(|_| problem("expires needs date, time and offset, as 2030-01-01T00:00:00Z")).ok()
        });
        let identity = Arc::new(Identity { name: self.name, role: self.role, tenants, expires });

        let mut digests = Vec::new();
        if let Some(token) = self.token {
            if token.len() < TOKEN_BYTES_MIN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                problem("token has at least 16 characters, without blanks");
            }
            digests.push(TokenDigest::of(&token));
        }
        let given = match self.token_sha256 {
            None => Vec::new(),
            Some(OneOrMore::One(digest)) => vec![digest],
            Some(OneOrMore::More(digests)) => digests,
        };
        for digest in given {
            match hex::decode(&digest).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()) {
                Some(digest) => digests.push(TokenDigest(digest)),
                None => problem("token_sha256 is the SHA-256 of a token, 64 hexadecimal digits"),
            }
        }
        if digests.is_empty() && self.certificates.is_empty() {
            problem("needs token_sha256, token or certificates to be known by");
        }
        for digest in digests {
            if directory.tokens.iter().any(|(known, _)| *known == digest) {
                problem("its token is also another's");
            }
            directory.tokens.push((digest, identity.clone()));
        }
        for name in self.certificates {
            if name.strip_prefix("uri:").or(name.strip_prefix("dns:")).is_none_or(str::is_empty) {
                problem("certificates are named as uri:spiffe://... or dns:...");
            }
            if directory.certificates.iter().any(|(known, _)| *known == name) {
                problem("its certificate is also another's");
            }
            directory.certificates.push((name, identity.clone()));
        }
    }
}
