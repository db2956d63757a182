//! `.oncegate-dev.json`: the secrets that `oncegate dev` made up, so that `simulate` in another terminal can
//! sign with them.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use super::certificate::Certificate;

/// Its name, in the directory that `dev` runs in.
pub(crate) const NAME: &str = ".oncegate-dev.json";

/// The content.
#[derive(Clone, Default, Deserialize, Serialize)]
pub(crate) struct DevFile {
    /// Where the gateway listens.
    pub(crate) gateway: Option<String>,
    /// Where the sidecar listens.
    pub(crate) sidecar: Option<String>,
    /// The secrets that were made up, by provider.
    #[serde(default)]
    secrets: BTreeMap<String, String>,
    /// What PayPal's webhooks are signed with.
    pub(crate) paypal: Option<Certificate>,
}

// Not derived: it holds secrets.
impl std::fmt::Debug for DevFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DevFile")
            .field("gateway", &self.gateway)
            .field("sidecar", &self.sidecar)
            .field("secrets", &self.secrets.keys())
            .finish()
    }
}

impl DevFile {
    /// Reads the file of a directory; `None` if there is none.
    pub(crate) fn read(directory: &Path) -> Result<Option<Self>> {
        let path = path(directory);
        match fs::read(&path) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text).with_context(|| {
                format!("{} is not what `oncegate dev` writes: delete it, and dev makes a new one", path.display())
            })?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes the file, readable only by its owner. A reader sees the old one or the new one, never half of
    /// it.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let path = path(directory);
        let write = || -> io::Result<()> {
            // Created with mode 0600, before anything is in it.
            let mut file = tempfile::NamedTempFile::new_in(directory)?;
            serde_json::to_writer_pretty(&mut file, self)?;
            file.write_all(b"\n")?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// What PayPal's webhooks are signed with, made now if there is none yet.
    pub(crate) fn paypal_or_new(&mut self) -> Result<&Certificate> {
        match &mut self.paypal {
            Some(made) => Ok(made),
            none => Ok(none.insert(Certificate::make()?)),
        }
    }

    /// The secret of a provider, if one was made up.
    pub(crate) fn secret(&self, provider: &str) -> Option<&str> {
        self.secrets.get(provider).map(String::as_str)
    }

    /// The secret of a provider, made up now if there is none yet.
    pub(crate) fn secret_or_new(&mut self, provider: &str, prefix: &str) -> &str {
        self.secrets.entry(provider.to_owned()).or_insert_with(|| {
            let random: [u8; 24] = rand::rng().random();
            format!("{prefix}{}", hex::encode(random))
        })
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join(NAME)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn secrets_are_made_once_and_kept_from_others() {
        let directory = tempfile::tempdir().unwrap();
        assert!(DevFile::read(directory.path()).unwrap().is_none());
        let mut file = DevFile::default();
        let secret = file.secret_or_new("stripe", "whsec_").to_owned();
        let key = serde_json::to_value(file.paypal_or_new().unwrap()).unwrap();
        assert!(secret.starts_with("whsec_") && secret.len() > 40);
        file.write(directory.path()).unwrap();
        let mut again = DevFile::read(directory.path()).unwrap().unwrap();
        assert_eq!(again.secret_or_new("stripe", "whsec_"), secret);
        assert_eq!(serde_json::to_value(again.paypal_or_new().unwrap()).unwrap(), key);
        again.write(directory.path()).unwrap();
        assert!(!format!("{again:?}").contains(&secret));
        let mode = fs::metadata(path(directory.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn rubbish_is_refused_with_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(path(directory.path()), "{").unwrap();
        let error = format!("{:#}", DevFile::read(directory.path()).unwrap_err());
        assert!(error.contains("delete it"), "{error}");
    }
}
