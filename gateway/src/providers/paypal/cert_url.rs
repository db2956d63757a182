//! The address of a certificate: parsed by the narrowest grammar that serves PayPal, and rebuilt from its parts (W8).

use std::fmt;

use super::Environment;

const SCHEME: &str = "https://";
const PATH: &str = "/v1/notifications/certs/";

const LIVE_HOSTS: [&str; 2] = ["api.paypal.com", "api-m.paypal.com"];
const SANDBOX_HOSTS: [&str; 2] = ["api.sandbox.paypal.com", "api-m.sandbox.paypal.com"];

/// The address of one of PayPal's certificates. Displays as the URL; only its last part comes from the request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct CertUrl {
    host: &'static str,
    name: Box<str>,
}

impl CertUrl {
    /// `https`, one of the hosts of `environment`, and `/v1/notifications/certs/` with one more part of letters, digits,
    /// underscores and hyphens. Nothing else is a URL here: no user, port, query, fragment, dot segment, escape, other
    /// case or trailing dot can hide from a comparison of whole texts.
    pub(crate) fn parse(text: &[u8], environment: Environment) -> Option<Self> {
        let rest = std::str::from_utf8(text).ok()?.strip_prefix(SCHEME)?;
        let hosts = match environment {
            Environment::Live => &LIVE_HOSTS,
            Environment::Sandbox => &SANDBOX_HOSTS,
        };
        hosts.iter().find_map(|&host| {
            let name = rest.strip_prefix(host)?.strip_prefix(PATH)?;
            let permitted = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            (!name.is_empty() && name.bytes().all(permitted)).then(|| Self { host, name: name.into() })
        })
    }

    /// The last part, which is the name of a file with the certificate. Contains no separator and no dot.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The host, one of PayPal's.
    pub(crate) fn host(&self) -> &'static str {
        self.host
    }
}

impl fmt::Display for CertUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}{PATH}{}", self.host, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w8_only_the_addresses_of_the_environment_are_addresses() {
        for (text, live, sandbox) in [
            ("https://api.paypal.com/v1/notifications/certs/CERT-360caa42-fca2a594-0d0a11e5", true, false),
            ("https://api-m.paypal.com/v1/notifications/certs/a_B-9", true, false),
            ("https://api.sandbox.paypal.com/v1/notifications/certs/CERT-1", false, true),
            ("https://api-m.sandbox.paypal.com/v1/notifications/certs/CERT-1", false, true),
        ] {
            for (environment, wanted) in [(Environment::Live, live), (Environment::Sandbox, sandbox)] {
                let parsed = CertUrl::parse(text.as_bytes(), environment);
                assert_eq!(parsed.is_some(), wanted, "{text}");
                assert!(parsed.is_none_or(|url| url.to_string() == text), "rebuilt from its parts");
            }
        }
        for text in [
            "",
            "https://",
            "http://api.paypal.com/v1/notifications/certs/CERT-1",
            "HTTPS://api.paypal.com/v1/notifications/certs/CERT-1",
            "https://API.paypal.com/v1/notifications/certs/CERT-1",
            "https://api.paypal.com./v1/notifications/certs/CERT-1",
            "https://api.paypal.com:443/v1/notifications/certs/CERT-1",
            "https://api.paypal.com@evil.example/v1/notifications/certs/CERT-1",
            "https://u:p@api.paypal.com/v1/notifications/certs/CERT-1",
            "https://api.paypal.com.evil.example/v1/notifications/certs/CERT-1",
            "https://evil.example/api.paypal.com/v1/notifications/certs/CERT-1",
            "https://xapi.paypal.com/v1/notifications/certs/CERT-1",
            "https://www.paypal.com/v1/notifications/certs/CERT-1",
            "https://127.0.0.1/v1/notifications/certs/CERT-1",
            "https://api.paypal.com/v1/notifications/certs/",
            "https://api.paypal.com/v1/notifications/certs/a/b",
            "https://api.paypal.com/v1/notifications/certs/..",
            "https://api.paypal.com/v1/notifications/certs/../x",
            "https://api.paypal.com/v1/notifications/certs/%2e%2e",
            "https://api.paypal.com/v1/notifications/certs/CERT-1?x=y",
            "https://api.paypal.com/v1/notifications/certs/CERT-1#x",
            "https://api.paypal.com/v1/notifications/certs/CERT-1\\x",
            "https://api.paypal.com\\@evil.example/v1/notifications/certs/CERT-1",
            "https://api.paypal.com//v1/notifications/certs/CERT-1",
            "https://api.paypal.com/v2/notifications/certs/CERT-1",
            " https://api.paypal.com/v1/notifications/certs/CERT-1",
            "https://api.paypal.com/v1/notifications/certs/CERT-1 ",
            "https://api.paypal.com/v1/notifications/certs/CÉRT",
        ] {
            assert_eq!(CertUrl::parse(text.as_bytes(), Environment::Live), None, "{text}");
            assert_eq!(CertUrl::parse(text.as_bytes(), Environment::Sandbox), None, "{text}");
        }
    }
}
