//! A certificate to sign PayPal's webhooks with, since nobody but PayPal has PayPal's own.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize,
};
use serde::{Deserialize, Serialize};

/// The name of the certificate that signs messages in PayPal's sandbox.
const NAME: &str = "messageverificationcerts.sandbox.paypal.com";

/// Where PayPal's sandbox has its certificates.
const DIRECTORY_URL: &str = "https://api.sandbox.paypal.com/v1/notifications/certs/";

/// The other file in the gateway's directory, beside the certificate.
const ROOTS: &str = "roots.pem";

/// A certificate with its key, and its root. The root's key is thrown away: nothing else is ever issued.
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct Certificate {
    /// The last part of its URL.
    name: String,
    key: String,
    certificate: String,
    root: String,
}

// Not derived: it holds a private key.
impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A key with the address of its certificate.
pub(crate) struct Signer {
    /// The key.
    pub(crate) key: KeyPair,
    /// The stated address of the certificate.
    pub(crate) cert_url: String,
}

impl Signer {
    /// A signer by a key in PEM.
    pub(crate) fn new(pem: &str, cert_url: String) -> Result<Self> {
        let key = KeyPair::from_pem_and_sign_algo(pem, &PKCS_RSA_SHA256)
            // Without its cause, which might quote the key.
            .map_err(|_| anyhow::anyhow!("not an RSA key in PEM (PKCS #8)"))?;
        Ok(Self { key, cert_url })
    }
}

impl Certificate {
    /// Makes one.
    pub(crate) fn make() -> Result<Self> {
        let make = || -> Result<Self, rcgen::Error> {
            let mut params = CertificateParams::new(Vec::new())?;
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params.distinguished_name.push(DnType::CommonName, "oncegate dev: trust nowhere else");
            let root = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;

            let mut params = CertificateParams::new(vec![NAME.to_owned()])?;
            params.distinguished_name.push(DnType::CommonName, NAME);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?;
            let certificate = params.signed_by(&key, &root)?;
            Ok(Self {
                name: format!("CERT-dev-{}", uuid::Uuid::new_v4().simple()),
                key: key.serialize_pem(),
                certificate: certificate.pem(),
                root: root.pem(),
            })
        };
        make().context("cannot make a certificate")
    }

    /// A signer that uses it.
    pub(crate) fn signer(&self) -> Result<Signer> {
        Signer::new(&self.key, format!("{DIRECTORY_URL}{}", self.name))
    }

    /// Writes what the gateway needs into a directory: the certificate for `PAYPAL_CERT_DIR`. Returns the path of the
    /// roots.
    pub(super) fn write(&self, directory: &Path) -> Result<std::path::PathBuf> {
        let roots = directory.join(ROOTS);
        for (path, text) in
            [(directory.join(format!("{}.pem", self.name)), &self.certificate), (roots.clone(), &self.root)]
        {
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(roots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_shown_nowhere_and_can_be_read_again() {
        let made = Certificate::make().unwrap();
        assert!(!format!("{made:?}").contains("PRIVATE"), "{made:?}");
        let signer = made.signer().unwrap();
        assert!(signer.cert_url.starts_with(DIRECTORY_URL));
        let directory = tempfile::tempdir().unwrap();
        let roots = made.write(directory.path()).unwrap();
        assert!(fs::read_to_string(roots).unwrap().contains("BEGIN CERTIFICATE"));
        for entry in fs::read_dir(directory.path()).unwrap() {
            assert!(!fs::read_to_string(entry.unwrap().path()).unwrap().contains("PRIVATE"));
        }
        assert!(Signer::new("rubbish", String::new()).is_err());
    }
}
