//! `DATABASE_URL`: what of it goes to sqlx, and what is refused before.

use std::{fmt, path::PathBuf, str::FromStr as _};

use form_urlencoded::Parse;
use oncegate_runtime::config::scheme;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::OpenError;

/// The parameters that sqlx knows, each by all its names.
const PARAMETERS: [&[&str]; 14] = [
    &["sslmode", "ssl-mode"],
    &["sslrootcert", "ssl-root-cert", "ssl-ca"],
    &["sslcert", "ssl-cert"],
    &["sslkey", "ssl-key"],
    &["host"],
    &["hostaddr"],
    &["port"],
    &["dbname"],
    &["user"],
    &["password"],
    &["application_name"],
    &["options"],
    &["options[NAME]"],
    &["statement-cache-capacity"],
];

/// Why a URL is not taken.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// It is of something else, which sqlx does not ask about.
    #[error("it does not begin with postgres://")]
    Scheme,
    /// It cannot be parsed.
    #[error(transparent)]
    Invalid(sqlx::Error),
    /// It has parameters that nobody heeds.
    #[error(transparent)]
    Parameters(UnknownParameters),
}

/// Parameters of a URL that nobody heeds. What they are set to is not kept: a password with a typo in its name is one too.
#[derive(Debug)]
pub struct UnknownParameters(Vec<Unknown>);

#[derive(Debug)]
enum Unknown {
    Named(String),
    /// By its number, from 1.
    Nameless(usize),
}

impl Unknown {
    /// Longer than any name that a driver of Postgres knows.
    const NAME_MAX: usize = 32;

    /// What does not look like a name may be the rest of a password in which a `?` or `&` was not escaped.
    fn new(number: usize, name: &str, has_value: bool) -> Self {
        let is_name = name.len() <= Self::NAME_MAX
            && name.bytes().any(|byte| byte.is_ascii_lowercase())
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || matches!(byte, b'_' | b'-'));
        if is_name && has_value { Self::Named(name.to_owned()) } else { Self::Nameless(number) }
    }
}

impl fmt::Display for UnknownParameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown: Vec<String> = self
            .0
            .iter()
            .map(|unknown| match unknown {
                Unknown::Named(name) => name.clone(),
                Unknown::Nameless(number) => format!("number {number}, which is not of the form name=value"),
            })
            .collect();
        let known: Vec<&str> = PARAMETERS.iter().filter_map(|names| names.first().copied()).collect();
        write!(
            f,
            "has parameters that are not known: {}; known are {} (in a password ?, &, # and @ are written %3F, %26, %23 and \
             %40)",
            unknown.join(", "),
            known.join(", ")
        )
    }
}

impl std::error::Error for UnknownParameters {}

/// Whether it is the scheme of a Postgres database's URL.
pub(crate) fn is_scheme(scheme: &str) -> bool {
    ["postgres", "postgresql"].iter().any(|wanted| wanted.eq_ignore_ascii_case(scheme))
}

/// Parses a URL.
pub(crate) fn options(url: &str) -> Result<PgConnectOptions, OpenError> {
    if !scheme(url.trim()).is_some_and(is_scheme) {
        return Err(UrlError::Scheme.into());
    }
    // Before sqlx sees them: it would go on without those that it does not know, and log each with what it is set to.
    known_only(url).map_err(UrlError::Parameters)?;
    let options = PgConnectOptions::from_str(url).map_err(UrlError::Invalid)?;
    // All results are binary: how floats are written out makes no difference, and poolers refuse a session that asks for it.
    Ok(options.application_name("oncegate").extra_float_digits(None))
}

fn known_only(url: &str) -> Result<(), UnknownParameters> {
    let is_known = |name: &str| {
        PARAMETERS.iter().any(|names| names.contains(&name))
            || name.strip_prefix("options[").is_some_and(|rest| rest.ends_with(']'))
    };
    // As `parameters` has them, with what it leaves out: whether a value was given.
    let given = query(url).split('&').filter(|parameter| !parameter.is_empty());
    let unknown: Vec<Unknown> = given
        .zip(parameters(url))
        .enumerate()
        .filter(|(_, (_, (name, _)))| !is_known(name))
        .map(|(place, (given, (name, _)))| Unknown::new(place + 1, &name, given.contains('=')))
        .collect();
    if unknown.is_empty() { Ok(()) } else { Err(UnknownParameters(unknown)) }
}

fn query(url: &str) -> &str {
    let url = url.split('#').next().unwrap_or_default();
    url.split_once('?').map_or("", |(_, query)| query)
}

fn parameters(url: &str) -> Parse<'_> {
    form_urlencoded::parse(query(url).as_bytes())
}

/// The certificate files that the URL names for TLS to the database. None where the server is not verified: then they are not
/// read.
pub(crate) fn certificate_files(url: &str) -> Vec<(CertificateFile, PathBuf)> {
    if !options(url).is_ok_and(|options| is_verified(&options)) {
        return Vec::new();
    }
    let mut files: Vec<(CertificateFile, PathBuf)> = Vec::new();
    for (name, path) in parameters(url) {
        let file = match &*name {
            "sslrootcert" | "ssl-root-cert" | "ssl-ca" => CertificateFile::Authorities,
            "sslcert" | "ssl-cert" => CertificateFile::Own,
            _ => continue,
        };
        // The connection takes the last of two.
        files.retain(|(known, _)| *known != file);
        files.push((file, PathBuf::from(path.into_owned())));
    }
    files
}

/// What a file is to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CertificateFile {
    /// What the server's certificate has to lead to.
    Authorities,
    /// The sidecar's own.
    Own,
}

/// Whether the server has to prove who it is.
pub(super) fn is_verified(options: &PgConnectOptions) -> bool {
    matches!(options.get_ssl_mode(), PgSslMode::VerifyCa | PgSslMode::VerifyFull)
}

#[cfg(test)]
mod tests {
    use super::{
        CertificateFile::{Authorities, Own},
        *,
    };

    #[test]
    fn certificates_are_read_where_the_server_is_verified() {
        let both = "sslrootcert=/a/ca%20file&sslcert=/a/own&sslkey=/a/key";
        let files = [(Authorities, "/a/ca file".into()), (Own, "/a/own".into())];
        for mode in ["verify-full", "verify-ca"] {
            let url = format!("postgres://db.example/x?sslrootcert=/overridden&sslmode={mode}&{both}#part");
            assert_eq!(certificate_files(&url), files);
        }
        for url in [
            format!("postgres://db.example/x?{both}"),
            format!("postgres://db.example/x?sslmode=require&{both}"),
            "postgres://db.example/x?sslmode=verify-full".to_owned(),
            format!("no URL?sslmode=verify-full&{both}"),
        ] {
            assert_eq!(certificate_files(&url), [], "{url}");
        }
    }

    fn complaint(url: &str) -> Option<String> {
        known_only(url).err().map(|unknown| unknown.to_string())
    }

    #[test]
    fn every_parameter_that_is_taken_is_one_that_sqlx_heeds() {
        // Of those that sqlx refuses by themselves, what it takes.
        let value = |name| match name {
            "sslmode" | "ssl-mode" => "require",
            "hostaddr" => "127.0.0.1",
            _ => "1",
        };
        for name in PARAMETERS.iter().copied().flatten() {
            let url = format!("postgres://h/db?{name}={}", value(name));
            let with = format!("{:?}", PgConnectOptions::from_str(&url).expect("a URL"));
            let without = format!("{:?}", PgConnectOptions::from_str("postgres://h/db").expect("a URL"));
            assert_ne!(with, without, "{name}");
            assert_eq!(complaint(&url), None);
        }
    }

    #[test]
    fn parameters_that_nobody_heeds_are_refused_by_name_and_never_by_value() {
        for (query, named) in [
            ("sslpassword=hunter2", "known: sslpassword; known are sslmode, sslrootcert,"),
            ("sslmode=require&pasword=hunter2&channel_binding=hunter2", "known: pasword, channel_binding;"),
            ("%70asword=hunter2#part", "known: pasword;"),
            ("options[hunter2=1", "known: number 1, which is not of the form name=value;"),
            // What is left of a password that was not escaped.
            ("password=a&hunter2", "number 2,"),
            ("&password=a&hunter2=&sslmode=require", "number 2,"),
            ("hunter2@h/db?x=y", "number 1,"),
            ("Hunter=2", "number 1,"),
            ("", ""),
            ("options=-c%20a=b&options[work_mem]=1MB&user=a&password=hunter2", ""),
        ] {
            let complaint = complaint(&format!("postgres://h/db?{query}")).unwrap_or_default();
            assert!(complaint.contains(named) && complaint.is_empty() == named.is_empty(), "{query}: {complaint}");
            assert!(!complaint.contains("unter"), "{query}: {complaint}");
        }
        assert_eq!(complaint("postgres://h/db#part?x=y"), None, "of no query");
    }
}
