//! When the certificates that a process has read from files expire, by the settings that name the
//! files.

use std::sync::Arc;

use super::{Family, Page};

const EXPIRY: Family = Family::gauge(
    "oncegate_certificate_expiry_timestamp_seconds",
    &["setting"],
    "When the certificates in use from a file end, in seconds since 1970: of a chain the first, of authorities the last, and \
     of the files in PAYPAL_CERT_DIR the last.",
);

/// All of them.
pub const FAMILIES: &[&Family] = &[&EXPIRY];

/// A file with certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CertificateFile {
    /// The setting that names it.
    pub setting: &'static str,
    /// When the certificates in use from it expire, in seconds since 1970; None if that cannot be
    /// determined.
    pub end: Option<u64>,
}

/// The files that a part of the process has read, as currently in use.
pub type Certificates = Arc<dyn Fn() -> Vec<CertificateFile> + Send + Sync>;

/// Writes when they expire. No two parts may name the same setting.
pub fn render(page: &mut Page, parts: &[Certificates]) {
    let mut rows = page.family(&EXPIRY);
    for file in parts.iter().flat_map(|part| part()) {
        if let Some(end) = file.end {
            rows.row(&[file.setting], end);
        }
    }
}
