//! How the providers sign, implemented independently from their documentation, so that a mistake in the product's code is
//! not repeated here. Stripe's is in [`crate::stripe`].

use std::{path::Path, time::SystemTime};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    PKCS_RSA_SHA256, RsaKeySize, SigningKey as _,
};
use sha2::{Sha256, Sha512};

/// Headers of a webhook.
pub type Headers = Vec<(&'static str, String)>;

fn sha256(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().to_vec()
}

/// Flutterwave v4: base64 of an HMAC-SHA256 over the body.
pub fn flutterwave_v4(secret: &str, body: &[u8]) -> Headers {
    vec![("flutterwave-signature", STANDARD.encode(sha256(secret.as_bytes(), &[body])))]
}

/// Flutterwave v3: the secret itself.
pub fn flutterwave_v3(secret: &str) -> Headers {
    vec![("verif-hash", secret.to_owned())]
}

/// Paystack: hex of an HMAC-SHA512 over the body.
pub fn paystack(secret: &str, body: &[u8]) -> Headers {
    let mut mac = Hmac::<Sha512>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(body);
    vec![("x-paystack-signature", hex::encode(mac.finalize().into_bytes()))]
}

/// Standard Webhooks: base64 of an HMAC-SHA256 over id, time and body, keyed by the decoded base64 of the secret.
pub fn standard_webhooks(secret: &str, id: &str, body: &[u8]) -> Headers {
    let key = STANDARD.decode(secret.trim_start_matches("whsec_")).expect("a secret in base64");
    let time = now_seconds().to_string();
    let signature = sha256(&key, &[id.as_bytes(), b".", time.as_bytes(), b".", body]);
    vec![
        ("webhook-id", id.to_owned()),
        ("webhook-timestamp", time),
        ("webhook-signature", format!("v1,{}", STANDARD.encode(signature))),
    ]
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("the clock stands after 1970").as_secs()
}

/// PayPal, with a certification authority of its own.
pub struct PayPal {
    key: KeyPair,
    root_pem: String,
    leaf_pem: String,
    webhook_id: String,
}

impl PayPal {
    /// The last part of the URL that names the certificate.
    pub const CERTIFICATE: &str = "CERT-360caa42-fca2a594-ab47cb26";

    /// Makes the authority, and a certificate like PayPal's live ones.
    pub fn new(webhook_id: &str) -> Result<Self> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "Root of the tests");
        let root = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        let mut leaf = CertificateParams::new(vec!["messageverificationcerts.paypal.com".to_owned()])?;
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?;
        let leaf_pem = leaf.signed_by(&key, &root)?.pem();
        Ok(Self { key, root_pem: root.pem(), leaf_pem, webhook_id: webhook_id.to_owned() })
    }

    /// Writes the certificate into a directory, as `PAYPAL_CERT_DIR` expects it, and the root into a file.
    pub fn write(&self, directory: &Path, root: &Path) -> Result<()> {
        std::fs::write(directory.join(Self::CERTIFICATE), &self.leaf_pem).context("cannot write the certificate")?;
        std::fs::write(root, &self.root_pem).context("cannot write the root")
    }

    /// The headers of one transmission.
    pub fn sign(&self, transmission_id: &str, body: &[u8]) -> Result<Headers> {
        let time = "2026-11-24T12:00:00Z";
        let message = format!("{transmission_id}|{time}|{}|{}", self.webhook_id, crc32(body));
        Ok(vec![
            ("paypal-transmission-id", transmission_id.to_owned()),
            ("paypal-transmission-time", time.to_owned()),
            ("paypal-transmission-sig", STANDARD.encode(self.key.sign(message.as_bytes())?)),
            ("paypal-cert-url", format!("https://api.paypal.com/v1/notifications/certs/{}", Self::CERTIFICATE)),
            ("paypal-auth-algo", "SHA256withRSA".to_owned()),
            ("paypal-auth-version", "v2".to_owned()),
        ])
    }
}

/// CRC-32/ISO-HDLC, bit by bit.
fn crc32(body: &[u8]) -> u32 {
    !body.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn crc_of_the_check_string_is_the_published_one() {
        assert_eq!(super::crc32(b"123456789"), 0xCBF4_3926);
    }
}
