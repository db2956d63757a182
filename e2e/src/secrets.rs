//! Whether what a program wrote tells a secret that it was given, in any form that code tends to print.

use std::fmt::Write as _;

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};

/// What is shorter is found by accident, and is no secret.
const BYTES_MIN: usize = 8;

/// Secrets of one program.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// Takes up a secret. Lists are taken apart at commas, as the settings are.
    pub fn add(&mut self, secret: &str) {
        for part in secret.split(',').map(str::trim) {
            if part.len() >= BYTES_MIN && !self.0.iter().any(|known| known == part) {
                self.0.push(part.to_owned());
            }
        }
    }

    /// Takes up what is secret in a setting of the program, judged by its name: secrets and passwords whole, of URLs the
    /// password.
    pub fn add_setting(&mut self, name: &str, value: &str) {
        let file = name.ends_with("_FILE");
        if !file && (name.contains("SECRET") && name != "GATEWAY_SECRET_RELOAD" || name.contains("PASSWORD")) {
            self.add(value);
        }
        if !file
            && name.ends_with("_URL")
            && let Some((_, rest)) = value.split_once("://")
            && let Some((credentials, _)) = rest.split('/').next().unwrap_or_default().rsplit_once('@')
            && let Some((_, password)) = credentials.split_once(':')
        {
            self.add(password);
        }
    }

    /// The first secret that the text tells, and in which form.
    pub fn told_in(&self, text: &str) -> Option<String> {
        let lower = text.to_ascii_lowercase();
        self.0.iter().enumerate().find_map(|(number, secret)| {
            let found = forms(secret)
                .into_iter()
                .find(|(_, form)| text.contains(form.as_str()) || lower.contains(&form.to_ascii_lowercase()));
            // Not the secret itself: the message ends up in the log of the tests.
            found.map(|(form, _)| format!("secret {number}, of {} bytes, in the form: {form}", secret.len()))
        })
    }
}

/// What a secret may look like in a log. Of base64 the part that does not depend on what follows.
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
    // What the base64 of a Standard Webhooks secret stands for is the key itself.
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
            secrets.0
        };
        assert_eq!(
            told("STRIPE_WEBHOOK_SECRET", "whsec_number_one, whsec_number_two"),
            ["whsec_number_one", "whsec_number_two"]
        );
        assert_eq!(told("DATABASE_URL", "postgres://me:a-pass-word@db.example/payments"), ["a-pass-word"]);
        assert_eq!(told("REDIS_PASSWORD", "a-pass-word"), ["a-pass-word"]);
        for (name, value) in
            [("DATABASE_URL", "postgres://me@db.example/a:b@c"), ("STRIPE_WEBHOOK_SECRET_FILE", "/run/secrets/stripe")]
        {
            assert_eq!(told(name, value), [""; 0]);
        }
    }
}
