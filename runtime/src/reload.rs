//! Values made from files, and made again when these change: certificates, tokens.

use std::{
    error::Error as StdError,
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval, timeout};

/// How long checking files may take. A check that takes longer, as on a network mount that is gone, has failed: users who rely
/// on the files have to know that they cannot be read.
pub const READ_TIME_MAX: Duration = Duration::from_secs(5);

type BoxError = Box<dyn StdError + Send + Sync>;
type Build<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, BoxError> + Send + Sync>;

/// Why files could not be used. Names them, never their content.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file as configured.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Their content cannot be used.
    #[error("{files} cannot be used")]
    Content {
        /// The files as configured.
        files: String,
        /// Why.
        #[source]
        source: BoxError,
    },
}

impl FilesError {
    /// The setting that names the file concerned, out of `settings` and their files; all of them if their contents do not fit
    /// together.
    #[must_use]
    pub fn setting(&self, settings: &[(&'static str, &Path)]) -> String {
        let is_meant = |file: &Path| match self {
            Self::Read { path, .. } => path == file,
            Self::Content { .. } => true,
        };
        let meant: Vec<&str> = settings.iter().filter(|(_, file)| is_meant(file)).map(|(name, _)| *name).collect();
        meant.join(", ")
    }
}

/// A value made from the content of some files. A path is opened anew each time, because a projected Kubernetes secret is
/// updated by swapping a symbolic link (W5); content is compared rather than modification times, which such a swap does not
/// change reliably.
pub struct Files<T> {
    what: &'static str,
    paths: Vec<PathBuf>,
    build: Build<T>,
    current: RwLock<Arc<T>>,
    content: Mutex<Vec<Vec<u8>>>,
    replaced: AtomicU64,
    failed: AtomicU64,
    /// A failure is reported once until it is fixed.
    failing: AtomicBool,
}

/// How often files changed, and their current state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// The value was replaced.
    pub replaced: u64,
    /// They had become unusable, and the old value was kept.
    pub failed: u64,
    /// They still are. For alerts.
    pub failing: bool,
}

impl<T> Files<T> {
    /// Reads the files and makes the value. `what` names it in the log when it changes. `build` gets the content of the files
    /// in the order of `paths`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or content that `build` rejects.
    pub fn read(
        what: &'static str,
        paths: Vec<PathBuf>,
        build: impl Fn(&[Vec<u8>]) -> Result<T, BoxError> + Send + Sync + 'static,
    ) -> Result<Self, FilesError> {
        let content = contents(&paths)?;
        let first = build(&content).map_err(|source| unusable(&paths, source))?;
        Ok(Self {
            what,
            paths,
            build: Box::new(build),
            current: RwLock::new(Arc::new(first)),
            content: Mutex::new(content),
            replaced: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            failing: AtomicBool::new(false),
        })
    }

    /// The value made from the latest usable content.
    pub fn current(&self) -> Arc<T> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What happened since the start.
    pub fn counts(&self) -> Counts {
        Counts {
            replaced: self.replaced.load(Relaxed),
            failed: self.failed.load(Relaxed),
            failing: self.failing.load(Relaxed),
        }
    }

    /// Checks the files now; blocks on the file system. Unusable content leaves the old value in place.
    pub fn refresh(&self) {
        let mut known = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        let built = match contents(&self.paths) {
            Ok(content) if content == *known => {
                self.failing.store(false, Relaxed);
                return;
            }
            Ok(content) => {
                (self.build)(&content).map(|value| (content, value)).map_err(|source| unusable(&self.paths, source))
            }
            Err(error) => Err(error),
        };
        match built {
            Ok((content, value)) => {
                *known = content;
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                self.failing.store(false, Relaxed);
                self.replaced.fetch_add(1, Relaxed);
                tracing::info!(files = names(&self.paths), "{} were read again", self.what);
            }
            Err(error) => self.fails(&error),
        }
    }

    fn fails(&self, error: &(dyn StdError + 'static)) {
        if !self.failing.swap(true, Relaxed) {
            self.failed.fetch_add(1, Relaxed);
            tracing::error!(
                files = names(&self.paths),
                error,
                "{} cannot be read again, keeping the old ones",
                self.what
            );
        }
    }
}

impl<T: Send + Sync + 'static> Files<T> {
    /// Checks the files every `pause`, for ever. Dropping the future ends it.
    pub async fn watch(self: Arc<Self>, pause: Duration) {
        let mut ticks = interval(pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let files = self.clone();
            // A hanging network file system must not hold up calls. An error would be a panic that has been reported.
            let mut look = tokio::task::spawn_blocking(move || files.refresh());
            if timeout(READ_TIME_MAX, &mut look).await.is_err() {
                self.fails(&io::Error::from(io::ErrorKind::TimedOut));
                // Do not start a second one beside it: each would hold a thread.
                let _ = look.await;
            }
        }
    }
}

impl<T> fmt::Debug for Files<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Files").field("what", &self.what).field("paths", &self.paths).finish_non_exhaustive()
    }
}

/// More than any certificate chain, list of tokens or configuration needs; a wrong path must not fill the memory.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// The content of a configured file.
///
/// # Errors
///
/// It cannot be read, or is larger than 4 MiB.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(std::fs::File::open(path)?, FILE_BYTES_MAX + 1), &mut content)?;
    if content.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 4 MiB"));
    }
    Ok(content)
}

/// The same, for a text file.
///
/// # Errors
///
/// Also if it is not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    // The text that the error quotes may be a secret; the position says enough.
    let text = String::from_utf8(read_file(path)?).map_err(|error| error.utf8_error());
    text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn contents(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, FilesError> {
    let read = |path: &PathBuf| read_file(path).map_err(|source| FilesError::Read { path: path.clone(), source });
    paths.iter().map(read).collect()
}

fn unusable(paths: &[PathBuf], source: BoxError) -> FilesError {
    FilesError::Content { files: names(paths), source }
}

fn names(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_the_setting_of_the_file_that_is_meant() {
        let settings = [("CERT_FILE", Path::new("/a/tls.crt")), ("KEY_FILE", Path::new("/a/tls.key"))];
        let unread = FilesError::Read { path: "/a/tls.key".into(), source: io::Error::other("no") };
        assert_eq!(unread.setting(&settings), "KEY_FILE");
        let unfit = FilesError::Content { files: "both".into(), source: "no pair".into() };
        assert_eq!(unfit.setting(&settings), "CERT_FILE, KEY_FILE");
    }

    #[test]
    fn a_file_larger_than_any_of_its_kind_is_refused() {
        let largest = usize::try_from(FILE_BYTES_MAX).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, &vec![b'x'; largest]).unwrap();
        assert_eq!(read_text(file.path()).unwrap().len(), largest);
        io::Write::write_all(&mut file, b"x").unwrap();
        assert!(read_file(file.path()).unwrap_err().to_string().contains("larger than 4 MiB"));
    }

    #[test]
    fn w5_a_change_is_taken_over_and_a_bad_one_keeps_the_old() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        let number = |content: &[Vec<u8>]| Ok(std::str::from_utf8(&content[0])?.trim().parse::<u32>()?);
        assert!(matches!(Files::read("numbers", vec![path.clone()], number), Err(FilesError::Read { .. })));
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(Files::read("numbers", vec![path.clone()], number), Err(FilesError::Content { .. })));
        std::fs::write(&path, "1").unwrap();
        let files = Files::read("numbers", vec![path.clone()], number).unwrap();
        for (content, wanted, counted) in [
            ("1", 1, (0, 0, false)),
            ("2", 2, (1, 0, false)),
            ("x", 2, (1, 1, true)),
            ("y", 2, (1, 1, true)),
            ("2", 2, (1, 1, false)),
            ("z", 2, (1, 2, true)),
            ("3", 3, (2, 2, false)),
        ] {
            std::fs::write(&path, content).unwrap();
            files.refresh();
            let Counts { replaced, failed, failing } = files.counts();
            assert_eq!((*files.current(), (replaced, failed, failing)), (wanted, counted), "{content}");
        }
        std::fs::remove_file(&path).unwrap();
        files.refresh();
        assert_eq!((*files.current(), files.counts().failing), (3, true));
    }

    #[cfg(unix)]
    #[tokio::test(start_paused = true)]
    async fn w5_files_that_hang_are_counted_once_and_read_when_they_answer() {
        // The clock stands still while a thread reads, unless it is advanced.
        async fn second() {
            std::thread::sleep(Duration::from_millis(1));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let directory = tempfile::tempdir().unwrap();
        let (path, pipe) = (directory.path().join("number"), directory.path().join("pipe"));
        std::fs::write(&path, "1").unwrap();
        let number = |content: &[Vec<u8>]| Ok(std::str::from_utf8(&content[0])?.trim().parse::<u32>()?);
        let files = Arc::new(Files::read("numbers", vec![path.clone()], number).unwrap());
        // Opening a pipe for reading blocks until somebody writes.
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        std::fs::remove_file(&path).unwrap();
        std::fs::hard_link(&pipe, &path).unwrap();
        let watching = tokio::spawn(files.clone().watch(Duration::from_secs(1)));
        while !files.counts().failing {
            second().await;
        }
        for _ in 0..60 {
            second().await;
        }
        assert_eq!(files.counts(), Counts { replaced: 0, failed: 1, failing: true });
        // The next look does not hang.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "2").unwrap();
        std::fs::write(&pipe, "2").unwrap();
        while files.counts().failing {
            second().await;
        }
        assert_eq!((*files.current(), files.counts()), (2, Counts { replaced: 1, failed: 1, failing: false }));
        watching.abort();
    }
}
