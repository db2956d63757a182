//! Finds out whether a program's output reveals a secret that it was given, in any form that code tends to print.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};

/// Anything shorter would be found by accident, and is not a secret.
const BYTES_MIN: usize = 8;

/// All secrets of this test process, for searching text of any origin.
static ALL: Mutex<Secrets> = Mutex::new(Secrets { known: Vec::new(), files: Vec::new() });

/// The first secret of any program of this process that the text reveals.
pub fn told_by_anybody(text: &str) -> Option<String> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner).told_in(text)
}

/// Secrets of one program.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    known: Vec<String>,
    /// Files that contain more of them, or will.
    files: Vec<PathBuf>,
}

impl Secrets {
    /// Adds a secret. Lists are split at commas, as the settings are.
    pub fn add(&mut self, secret: &str) {
        for part in secret.split(',').map(str::trim) {
            if part.len() >= BYTES_MIN && !self.known.iter().any(|known| known == part) {
                self.known.push(part.to_owned());
                let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
                if !all.known.iter().any(|known| known == part) {
                    all.known.push(part.to_owned());
                }
            }
        }
    }

    /// Adds what is secret in a setting of the program, judging by its name: secrets, passwords, tokens and keys as a whole,
    /// the password of URLs, the values of headers, and the content of the file that it names.
    pub fn add_setting(&mut self, name: &str, value: &str) {
        let secret = ["SECRET", "PASSWORD", "TOKEN", "KEY"].iter().any(|word| name.contains(word));
        if name.ends_with("_FILE") {
            if secret || name.ends_with("_URL_FILE") {
                self.files.push(value.into());
            }
        } else if name == "ONCEGATE_CONFIG" {
            self.files.push(value.into());
        } else if name.contains("HEADERS") {
            for (_, value) in value.split(',').filter_map(|header| header.split_once('=')) {
                self.add(value);
            }
        } else if secret && name != "GATEWAY_SECRET_RELOAD" {
            self.add(value);
        } else if name.ends_with("_URL") {
            self.add_password(value);
        }
    }

    fn add_password(&mut self, url: &str) {
        let parameters = url.split_once('?').map_or("", |(_, query)| query).split('&');
        for (_, value) in parameters.filter_map(|one| one.split_once('=')).filter(|(name, _)| name.contains("password"))
        {
            self.add(value);
        }
        if let Some((_, rest)) = url.split_once("://")
            && let Some((credentials, _)) = rest.split('/').next().unwrap_or_default().rsplit_once('@')
            && let Some((_, password)) = credentials.split_once(':')
        {
            self.add(password);
        }
    }

    /// Adds the current content of the files. Their names are relative to `directory`.
    pub fn read_files(&mut self, directory: &Path) {
        for file in self.files.clone() {
            // A test may be about a missing one.
            if let Ok(text) = fs::read_to_string(directory.join(file)) {
                self.add_text(&text);
            }
        }
    }

    /// A key in PEM, a URL, TOML with members that are secret, or the bare secrets.
    fn add_text(&mut self, text: &str) {
        if text.contains("-----BEGIN") {
            let mut private = false;
            for line in text.lines() {
                if line.starts_with("-----") {
                    private = line.starts_with("-----BEGIN") && line.contains("PRIVATE KEY");
                } else if private {
                    self.add(line);
                }
            }
        } else if text.contains("://") && text.lines().count() == 1 {
            self.add_password(text.trim());
        } else if text.contains("[[") {
            for line in text.lines() {
                let Some((member, value)) = line.split_once('=') else { continue };
                if ["secret", "secrets", "token", "password"].contains(&member.trim()) {
                    value.split('"').skip(1).step_by(2).for_each(|secret| self.add(secret));
                }
            }
        } else {
            text.lines().for_each(|line| self.add(line));
        }
    }

    /// The first secret that the text reveals, and in which form.
    pub fn told_in(&self, text: &str) -> Option<String> {
        let lower = text.to_ascii_lowercase();
        self.known.iter().enumerate().find_map(|(number, secret)| {
            let found = forms(secret)
                .into_iter()
                .find(|(_, form)| text.contains(form.as_str()) || lower.contains(&form.to_ascii_lowercase()));
            // Not the secret itself: the message ends up in the log of the tests.
            found.map(|(form, _)| format!("secret {number}, of {} bytes, in the form: {form}", secret.len()))
        })
    }
}

/// What a secret may look like in a log. For base64, the part that does not depend on what follows.
fn forms(secret: &str) -> Vec<(&'static str, String)> {
    let bytes = secret.as_bytes();
    let whole = |encoded: String| encoded[..encoded.len() - usize::from(!bytes.len().is_multiple_of(3)) * 2].to_owned();
    let mut forms = vec![
        ("plain", secret.to_owned()),
        ("hex", hex::encode(bytes)),
        ("base64", whole(STANDARD_NO_PAD.encode(bytes))),
        ("base64 for URLs", whole(URL_SAFE_NO_PAD.encode(bytes))),
        ("bytes as numbers", bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(", ")),
        ("bytes as Rust escapes them", bytes.escape_ascii().to_string()),
    ];
    let percent = bytes.iter().fold(String::new(), |mut text, &byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    });
    forms.push(("percent-encoded", percent));
    // The decoded base64 of a Standard Webhooks secret is the key itself.
    if let Some(key) = secret.strip_prefix("whsec_").and_then(|key| STANDARD.decode(key).ok()) {
        forms.push(("the key that it stands for, as hex", hex::encode(&key)));
        forms.push(("the key that it stands for, as base64", STANDARD_NO_PAD.encode(&key)));
    }
    forms
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "sk_live_h!dden/of tests";

    #[test]
    fn a_planted_leak_is_found_in_every_form() {
        let mut secrets = Secrets::default();
        secrets.add(SECRET);
        assert_eq!(secrets.told_in("nothing to see: sk_live_, dden, 115, 107"), None);
        for (name, form) in forms(SECRET) {
            let told = secrets.told_in(&format!("{{\"message\":\"before {form} after\"}}"));
            assert!(told.is_some_and(|told| !told.contains(SECRET)), "{name}");
        }
        assert!(secrets.told_in(&hex::encode_upper(SECRET)).is_some());
        assert!(secrets.told_in(&STANDARD.encode(format!("{SECRET} and more"))).is_some());
    }

    #[test]
    fn what_is_secret_is_told_by_the_name_of_the_setting() {
        let told = |name: &str, value: &str| {
            let mut secrets = Secrets::default();
            secrets.add_setting(name, value);
            secrets.known
        };
        assert_eq!(
            told("STRIPE_WEBHOOK_SECRET", "whsec_number_one, whsec_number_two"),
            ["whsec_number_one", "whsec_number_two"]
        );
        assert_eq!(told("DATABASE_URL", "postgres://me:a-pass-word@db.example/payments"), ["a-pass-word"]);
        assert_eq!(
            told("DATABASE_URL", "postgres://db/payments?user=some-body&password=a-pass-word&sslpassword=another-one"),
            ["a-pass-word", "another-one"]
        );
        assert_eq!(told("REDIS_PASSWORD", "a-pass-word"), ["a-pass-word"]);
        assert_eq!(told("SIDECAR_TOKEN", "a-to-ken"), ["a-to-ken"]);
        assert_eq!(
            told("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a-key-of-mine,x=another-key"),
            ["a-key-of-mine", "another-key"]
        );
        for (name, value) in
            [("DATABASE_URL", "postgres://me@db.example/a:b@c"), ("STRIPE_WEBHOOK_SECRET_FILE", "/run/secrets/stripe")]
        {
            assert_eq!(told(name, value), [""; 0]);
        }
    }

    #[test]
    fn what_is_secret_in_a_file_is_taken_up() {
        let directory = tempfile::tempdir().expect("a directory");
        let found = |name: &str, text: &str| {
            fs::write(directory.path().join("file"), text).expect("a file");
            let mut secrets = Secrets::default();
            secrets.add_setting(name, "file");
            secrets.read_files(directory.path());
            secrets.known
        };
        assert_eq!(
            found("STRIPE_WEBHOOK_SECRET_FILE", "whsec_one_of,whsec_two_of\n"),
            ["whsec_one_of", "whsec_two_of"]
        );
        assert_eq!(found("DATABASE_URL_FILE", "postgres://me:a-pass-word@db/x\n"), ["a-pass-word"]);
        let key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG\nByqGSM49AgEG\n-----END PRIVATE KEY-----\n";
        assert_eq!(found("SIDECAR_TLS_KEY_FILE", key), ["MIGHAgEAMBMG", "ByqGSM49AgEG"]);
        assert_eq!(found("SIDECAR_CLIENT_KEY_FILE", &key.replace("PRIVATE KEY", "CERTIFICATE")), [""; 0]);
        let tokens =
            "[[identity]]\nname = \"somebody\"\ntoken = \"a-token-of-somebody\"\ntoken_sha256 = \"00112233\"\n";
        assert_eq!(found("SIDECAR_TOKENS_FILE", tokens), ["a-token-of-somebody"]);
        let routes = "[[route]]\nsecrets = [\"whsec_first\", \"whsec_second\"]\nsecret_file = \"/run/secrets/x\"\n";
        assert_eq!(found("ONCEGATE_CONFIG", routes), ["whsec_first", "whsec_second"]);
        assert_eq!(found("SIDECAR_CA_FILE", "anything at all"), [""; 0]);
    }
}
