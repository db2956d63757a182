//! Where the database is, and as whom to connect to it: what every new connection asks for, because a password may change while
//! others are in use.

use std::{
    error::Error as StdError,
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use oncegate_runtime::{
    reload::{Counts, Files, FilesError},
    secret::SecretSource,
};
use sqlx::postgres::PgConnectOptions;

use super::{OpenError, options};

/// Where the database is. Clones share what was read last.
#[derive(Clone)]
pub struct Target(Source);

#[derive(Clone)]
enum Source {
    Given(Arc<PgConnectOptions>),
    File(Arc<Files<PgConnectOptions>>),
}

/// A file that leads elsewhere than it did: what was learned from the first database must not be used with another one, whose
/// schema nobody has looked at.
#[derive(Debug, thiserror::Error)]
#[error("it names another host, port or database than at the start, which takes a restart")]
struct AnotherDatabase;

impl Target {
    /// A database that is given by its URL, for good.
    ///
    /// # Errors
    /// When the URL is not valid.
    pub fn given(url: &str) -> Result<Target, OpenError> {
        Ok(Target(Source::Given(Arc::new(options(url)?))))
    }

    /// A database whose URL is in a file. [`Target::watch`] reads it again.
    ///
    /// # Errors
    /// When the file cannot be read, or holds no valid URL.
    pub fn in_file(path: &Path) -> Result<Target, FilesError> {
        let source = SecretSource::File(path.to_owned());
        let first = OnceLock::new();
        let read = move |_: &[Vec<u8>]| -> Result<PgConnectOptions, Box<dyn StdError + Send + Sync>> {
            let read = options(source.read_one()?.expose())?;
            if is_same_database(first.get_or_init(|| read.clone()), &read) {
                Ok(read)
            } else {
                Err(AnotherDatabase.into())
            }
        };
        Ok(Target(Source::File(Arc::new(Files::read("the database's URL", vec![path.to_owned()], read)?))))
    }

    /// How to connect now.
    pub(super) fn options(&self) -> Arc<PgConnectOptions> {
        match &self.0 {
            Source::Given(options) => options.clone(),
            Source::File(files) => files.current(),
        }
    }

    /// How often the file has changed; None where there is none.
    pub(crate) fn counts(&self) -> Option<Counts> {
        match &self.0 {
            Source::Given(_) => None,
            Source::File(files) => Some(files.counts()),
        }
    }

    /// Looks every `pause` whether the file has changed, for ever. Returns at once where there is none.
    pub(crate) async fn watch(self, pause: Duration) {
        if let Source::File(files) = self.0 {
            files.watch(pause).await;
        }
    }
}

impl fmt::Debug for Target {
    /// Without what may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Source::Given(_) => "Target::Given",
            Source::File(_) => "Target::File",
        })
    }
}

fn is_same_database(one: &PgConnectOptions, other: &PgConnectOptions) -> bool {
    let place = |options: &PgConnectOptions| {
        let database = options.get_database().unwrap_or(options.get_username()).to_owned();
        (options.get_host().to_owned(), options.get_port(), options.get_socket().cloned(), database)
    };
    place(one) == place(other)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{Source, Target};

    #[test]
    fn a_file_may_change_who_connects_and_how_but_not_to_what() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |url: &str| fs::write(file.path(), url).unwrap();
        write("postgres://first:pa@db.example.com/payments");
        let target = Target::in_file(file.path()).unwrap();
        let refresh = || match &target.0 {
            Source::File(files) => {
                files.refresh();
                files.counts().failing
            }
            Source::Given(_) => panic!("it is in a file"),
        };
        assert!(!refresh());
        for (url, user, is_refused) in [
            ("postgres://first:pb@db.example.com/payments\n", "first", false),
            ("postgres://second:pb@db.example.com:5432/payments?sslmode=require", "second", false),
            ("postgres://third:pb@db.example.com/other", "second", true),
            ("postgres://third:pb@db2.example.com/payments", "second", true),
            ("postgres://third:pb@db.example.com:6432/payments", "second", true),
            ("postgres://third:pb@%2Frun%2Fpostgresql/payments", "second", true),
            ("mysql://third:pb@db.example.com/payments", "second", true),
            ("", "second", true),
            ("postgres://third:pb@db.example.com/payments", "third", false),
        ] {
            write(url);
            assert_eq!((refresh(), target.options().get_username()), (is_refused, user), "{url}");
        }
        assert!(!format!("{target:?}").contains("pb"));
    }
}
