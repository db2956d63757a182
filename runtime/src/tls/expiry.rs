//! When certificates expire, for those who have to renew them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, Error, KeyUsage};

use super::chain;
use crate::reload::{Files, FilesError};

/// Certificates in a file that a library reads for itself: only their expiry is known here.
#[derive(Debug, Clone)]
pub struct Lent {
    file: Arc<Files<Option<u64>>>,
}

impl Lent {
    /// Authorities.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or holds no certificates.
    pub fn authorities(path: PathBuf) -> Result<Self, FilesError> {
        Self::read(path, last_end)
    }

    /// A chain.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or holds no certificates.
    pub fn chain(path: PathBuf) -> Result<Self, FilesError> {
        Self::read(path, first_end)
    }

    fn read(path: PathBuf, end: fn(&[CertificateDer<'_>]) -> Option<u64>) -> Result<Self, FilesError> {
        let file = Files::read("certificates", vec![path], move |content| Ok(end(&chain(&content[0])?)))?;
        Ok(Self { file: Arc::new(file) })
    }

    /// When they end, in seconds since 1970.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        *self.file.current()
    }

    /// Checks the file every `pause`, for ever. Dropping the future ends it.
    pub async fn watch(self, pause: Duration) {
        self.file.watch(pause).await;
    }
}

/// When the first of a chain expires, in seconds since 1970: from then on the chain is of no use. None if that cannot be
/// determined.
#[must_use]
pub fn first_end(chain: &[CertificateDer<'_>]) -> Option<u64> {
    chain.iter().filter_map(end).min()
}

/// When the last of several authorities expires: while one is replaced, the file holds both.
#[must_use]
pub fn last_end(authorities: &[CertificateDer<'_>]) -> Option<u64> {
    authorities.iter().filter_map(end).max()
}

/// The library reports the expiry only of a certificate that has expired; it checks that before anything else, so this
/// needs neither a chain nor a purpose.
fn end(certificate: &CertificateDer<'_>) -> Option<u64> {
    let after_all = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    match parsed.verify_for_usage(&[], &[], &[], after_all, KeyUsage::server_auth(), None, None) {
        Err(Error::CertExpired { not_after, .. }) => Some(not_after.as_secs()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};

    use super::*;

    fn certificate(is_ca: bool, year: i32) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        if is_ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().into()
    }

    #[test]
    fn the_end_of_a_certificate_is_told_whether_or_not_it_is_over() {
        let at = |year: i32| u64::try_from(date_time_ymd(year, 1, 1).unix_timestamp()).unwrap();
        for is_ca in [false, true] {
            for year in [2021, 2045, 2060] {
                assert_eq!(end(&certificate(is_ca, year)), Some(at(year)), "{is_ca} {year}");
            }
        }
        let several =
            [certificate(false, 2045), certificate(true, 2060), CertificateDer::from(b"no certificate".as_slice())];
        assert_eq!((first_end(&several), last_end(&several)), (Some(at(2045)), Some(at(2060))));
        assert_eq!((first_end(&[]), last_end(&several[2..])), (None, None));
    }

    #[test]
    fn certificates_that_a_library_reads_are_looked_at_again() {
        let pem = |year: i32| {
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            params.not_after = date_time_ymd(year, 1, 1);
            params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
        };
        let at = |year: i32| u64::try_from(date_time_ymd(year, 1, 1).unix_timestamp()).ok();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("both");
        std::fs::write(&path, pem(2045) + &pem(2060)).unwrap();
        let (authorities, chain) = (Lent::authorities(path.clone()).unwrap(), Lent::chain(path.clone()).unwrap());
        assert_eq!((authorities.end(), chain.end()), (at(2060), at(2045)));
        std::fs::write(&path, pem(2050)).unwrap();
        chain.file.refresh();
        assert_eq!(chain.end(), at(2050));
        std::fs::write(&path, "no certificate").unwrap();
        chain.file.refresh();
        assert_eq!(chain.end(), at(2050));
        assert!(Lent::chain(path).is_err());
    }
}
