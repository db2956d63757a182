//! How sidecars are reached, as configured, for the gateway and the operators' commands alike.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::{HeaderValue, Uri};
use oncegate_runtime::{
    config::{Checks, Problem, Problems, ShownDuration},
    reload::Files,
    secret::{Secret, SecretSource, SecretText},
    server::Address,
    tls::{ClientTls, ClientTlsFiles},
};

use super::{
    BoxError,
    dial::{self, Stream},
    pool::NoAddress,
    target::{self, SystemResolver, Target},
};

/// gRPC is spoken over HTTP/2 and nothing else.
const PROTOCOLS: &[&[u8]] = &[b"h2"];

/// The configuration, not yet checked. Problems are named after the environment variables.
#[derive(Debug, Clone)]
pub struct ReachOptions {
    /// SIDECAR_URL: `http://`, `https://` or `unix:`, several separated by commas.
    pub url: String,
    /// SIDECAR_CA_FILE: the authorities of the sidecar's certificate; None: the system's.
    pub ca_file: Option<PathBuf>,
    /// SIDECAR_CLIENT_CERT_FILE: our own certificate.
    pub cert_file: Option<PathBuf>,
    /// SIDECAR_CLIENT_KEY_FILE: its key.
    pub key_file: Option<PathBuf>,
    /// SIDECAR_TOKEN.
    pub token: Option<SecretText>,
    /// SIDECAR_TOKEN_FILE.
    pub token_file: Option<PathBuf>,
    /// SIDECAR_INSECURE: permits to send the token to another machine without TLS.
    pub insecure: bool,
    /// How long connecting may take, TLS included.
    pub connect_timeout: Duration,
    /// How often names are resolved again.
    pub resolve_interval: Duration,
    /// How often files are checked for changes.
    pub reload: Duration,
}

/// How sidecars are reached, checked. `Debug` shows no token.
#[derive(Debug, Clone)]
pub struct Reach {
    pub(super) targets: Arc<[Target]>,
    pub(super) tls: Option<ClientTls>,
    pub(super) token: Option<Token>,
    pub(super) connect_timeout: Duration,
    pub(super) resolve_interval: Duration,
    pub(super) reload: Duration,
}

/// The value of `authorization`.
#[derive(Debug, Clone)]
pub(super) enum Token {
    Value(HeaderValue),
    File(Arc<Files<HeaderValue>>),
}

impl Reach {
    /// Bytes to and from one sidecar, the first that can be reached, and the origin that calls have to name: no HTTP/2, no
    /// balancing, no retries and no token. For measuring a sidecar.
    ///
    /// # Errors
    ///
    /// What was wrong with the last address that was tried.
    pub async fn open(&self) -> Result<(Box<dyn Stream>, Uri), BoxError> {
        let mut last: BoxError = NoAddress.into();
        for target in self.targets.iter() {
            for dial in target.dials(&SystemResolver).await.unwrap_or_default() {
                match dial::connect(&dial, self.tls.as_ref(), self.connect_timeout).await {
                    Ok(stream) => return Ok((stream, dial::origin(&dial))),
                    Err(error) => last = error.into(),
                }
            }
        }
        Err(last)
    }

    /// Whether all of it leads to the sidecar that listens at `listener` on this machine, as far as that can be told without
    /// resolving a name.
    #[must_use]
    pub fn is_at(&self, listener: &Address) -> bool {
        self.targets.iter().all(|target| target.is_at(listener))
    }

    /// The value of `authorization` on calls.
    #[must_use]
    pub fn authorization(&self) -> Option<HeaderValue> {
        self.token.as_ref().map(Token::current)
    }
}

impl Token {
    pub(super) fn current(&self) -> HeaderValue {
        match self {
            Self::Value(value) => value.clone(),
            Self::File(file) => (*file.current()).clone(),
        }
    }
}

/// A token that cannot be sent.
#[derive(Debug, thiserror::Error)]
#[error("a token may hold neither blanks nor control characters")]
struct BadToken;

impl ReachOptions {
    /// Checks everything and reads the files.
    ///
    /// # Errors
    ///
    /// All problems.
    pub fn validate(self) -> Result<Reach, Problems> {
        let mut checks = Checks::new();
        let targets = checks.take(target::targets(&self.url)).unwrap_or_default();
        let tls = self.tls(targets.iter().any(Target::is_tls), &mut checks);
        let token = checks.take(token(self.token, self.token_file)).flatten();
        if token.is_some() && targets.iter().any(|target| !target.is_tls() && !target.is_local()) {
            const LISTENERS: &str = "the token is sent to the sidecar without TLS: whoever listens in can use it";
            if self.insecure {
                tracing::warn!("{LISTENERS}");
            } else {
                checks.problem(
                    "SIDECAR_URL",
                    format!(
                        "http:// to another machine, and {LISTENERS}; write https://, call a sidecar on this machine, or \
                         say SIDECAR_INSECURE=true"
                    ),
                );
            }
        }
        checks.within(
            "SIDECAR_RESOLVE_INTERVAL",
            ShownDuration(self.resolve_interval),
            ShownDuration(Duration::from_millis(10))..=ShownDuration(Duration::from_secs(3_600)),
        );
        checks.finish()?;
        Ok(Reach {
            targets: targets.into(),
            tls,
            token,
            connect_timeout: self.connect_timeout,
            resolve_interval: self.resolve_interval,
            reload: self.reload,
        })
    }

    fn tls(&self, wanted: bool, checks: &mut Checks) -> Option<ClientTls> {
        let given = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let (ca, certificate, key) = (given(&self.ca_file), given(&self.cert_file), given(&self.key_file));
        if !wanted {
            // Neither a forgotten `https://` nor a certificate that is never used must go unnoticed.
            if ca.is_some() || certificate.is_some() {
                checks.problem("SIDECAR_URL", "has no https://, and there are files for TLS: leave one or the other");
            }
            return None;
        }
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => {
                checks.problem("SIDECAR_CLIENT_KEY_FILE", "missing: the certificate needs its key");
                None
            }
            (None, Some(_)) => {
                checks.problem("SIDECAR_CLIENT_CERT_FILE", "missing: the key needs its certificate");
                None
            }
        };
        let files = ClientTlsFiles { ca, identity };
        let read = ClientTls::read(&files, PROTOCOLS);
        let mut settings: Vec<_> = files.ca.as_deref().map(|path| ("SIDECAR_CA_FILE", path)).into_iter().collect();
        if let Some((certificate, key)) = &files.identity {
            settings.extend([("SIDECAR_CLIENT_CERT_FILE", &**certificate), ("SIDECAR_CLIENT_KEY_FILE", &**key)]);
        }
        // Without any file, it is the system's authorities that cannot be read.
        if settings.is_empty() {
            settings.push(("SIDECAR_CA_FILE", Path::new("")));
        }
        read.map_err(|error| checks.push(Problem::from_error(error.setting(&settings), &error))).ok()
    }
}

fn token(value: Option<SecretText>, file: Option<PathBuf>) -> Result<Option<Token>, Problem> {
    match SecretSource::choose("SIDECAR_TOKEN", value, file)? {
        None => Ok(None),
        Some(SecretSource::File(path)) => {
            let read = Files::read("token for the sidecar", vec![path], |content| {
                let text = std::str::from_utf8(&content[0])?.trim();
                Ok(header(&Secret::new(text)?)?)
            });
            read.map(|file| Some(Token::File(Arc::new(file))))
                .map_err(|error| Problem::from_error("SIDECAR_TOKEN_FILE", &error))
        }
        Some(source) => {
            let secret = source.read_one().map_err(|error| Problem::from_error("SIDECAR_TOKEN", &error))?;
            let value = header(&secret).map_err(|error| Problem::from_error("SIDECAR_TOKEN", &error))?;
            Ok(Some(Token::Value(value)))
        }
    }
}

fn header(token: &Secret) -> Result<HeaderValue, BadToken> {
    let token = token.expose().trim();
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(BadToken);
    }
    let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| BadToken)?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_sent_in_the_clear_to_this_machine_only_or_when_said_out_loud() {
        let problems = |url: &str, token: Option<&str>, insecure: bool| {
            let options = ReachOptions {
                url: url.to_owned(),
                ca_file: None,
                cert_file: None,
                key_file: None,
                token: token.map(Into::into),
                token_file: None,
                insecure,
                connect_timeout: Duration::from_secs(1),
                resolve_interval: Duration::from_secs(1),
                reload: Duration::from_secs(1),
            };
            options.validate().err().map(|problems| problems.to_string()).unwrap_or_default()
        };
        let token = Some("a-token-of-sixteen-or-more");
        for (url, token, insecure) in [
            ("http://127.0.0.1:1,http://[::1]:2,http://localhost:3,unix:/run/s.sock", token, false),
            ("http://sidecar.example:1", None, false),
            ("http://sidecar.example:1", token, true),
        ] {
            assert_eq!(problems(url, token, insecure), "", "{url}");
        }
        for url in ["http://sidecar.example:1", "http://10.0.0.7:1", "http://127.0.0.1:1,http://sidecar.example:1"] {
            let said = problems(url, token, false);
            assert!(said.contains("SIDECAR_URL") && said.contains("SIDECAR_INSECURE"), "{url}: {said}");
            assert!(!said.contains("sixteen"), "{said}");
        }
    }
}
