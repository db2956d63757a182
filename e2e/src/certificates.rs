//! Certificates of a test's own authority, as files.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType, date_time_ymd,
};

/// An authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// Where they were written to.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Authority {
    /// A new one, which nobody else trusts.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A name different from those of the certificates it issues: some libraries judge by the names whether a
        // certificate is self-signed.
        params.distinguished_name.push(DnType::CommonName, "authority of a test");
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Its own certificate in PEM, which is to be trusted.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for a server on this machine.
    pub fn server(&self) -> Result<Issued> {
        self.issue(for_this_machine()?)
    }

    /// A certificate for a server somewhere else.
    pub fn server_elsewhere(&self) -> Result<Issued> {
        self.issue(CertificateParams::new(vec!["elsewhere.example".to_owned()])?)
    }

    /// The same as for a server on this machine, valid until the beginning of a year.
    pub fn server_until(&self, year: i32) -> Result<Issued> {
        let mut params = for_this_machine()?;
        params.not_after = date_time_ymd(year, 1, 1);
        self.issue(params)
    }

    /// A client's certificate named by a URI; one that expired long ago if `expired`.
    pub fn client(&self, uri: &str, expired: bool) -> Result<Issued> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names.push(SanType::URI(uri.try_into()?));
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        self.issue(params)
    }

    fn issue(&self, mut params: CertificateParams) -> Result<Issued> {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        Ok(Issued { certificate: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }
}

fn for_this_machine() -> Result<CertificateParams> {
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "127.0.0.2".to_owned()];
    Ok(CertificateParams::new(names)?)
}

/// The beginning of a year, in seconds since 1970.
pub fn beginning_of(year: i32) -> i64 {
    date_time_ymd(year, 1, 1).unix_timestamp()
}

impl Issued {
    /// Writes both, as `NAME.crt` and `NAME.key`.
    pub fn write(&self, directory: &Path, name: &str) -> Result<Files> {
        let files =
            Files { certificate: directory.join(format!("{name}.crt")), key: directory.join(format!("{name}.key")) };
        fs::write(&files.certificate, &self.certificate)?;
        fs::write(&files.key, &self.key)?;
        Ok(files)
    }
}

/// Files that are replaced all at once, as Kubernetes does with those of a Secret: links through a link to a
/// directory.
#[derive(Debug)]
pub struct Projected {
    directory: PathBuf,
    version: u32,
}

impl Projected {
    /// A directory of files.
    pub fn new(directory: &Path, files: &[(&str, &str)]) -> Result<Self> {
        fs::create_dir(directory)?;
        let mut projected = Self { directory: directory.to_owned(), version: 0 };
        for (name, _) in files {
            symlink(Path::new("..data").join(name), directory.join(name))?;
        }
        projected.replace(files)?;
        Ok(projected)
    }

    /// Replaces them.
    pub fn replace(&mut self, files: &[(&str, &str)]) -> Result<()> {
        self.version += 1;
        let version = format!("..version-{}", self.version);
        fs::create_dir(self.directory.join(&version))?;
        for (name, content) in files {
            fs::write(self.directory.join(&version).join(name), content)?;
        }
        let link = self.directory.join("..data-new");
        symlink(&version, &link)?;
        fs::rename(link, self.directory.join("..data"))?;
        Ok(())
    }

    /// Where a file is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}
