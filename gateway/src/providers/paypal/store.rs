//! Fetched certificates: only a few, each fetched by one task at a time, and failures remembered for seconds only (W9).
//!
//! A stranger chooses the last part of the address and can thereby make the gateway ask PayPal for it. So only what is
//! trusted is kept, which a stranger cannot make; what is being fetched, how often, and what failed are all bounded. Beyond
//! the bounds the certificate counts as unavailable, and PayPal tries again. A sender that asks for names that do not exist
//! has that counted against it (W14), and half of the fetches are kept for others, or it alone could use up all of them.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use super::{
    CertUrl, Fetcher,
    fetch::{BYTES_MAX, TIMEOUT},
    trust::{Chain, Trust},
};
use crate::{
    failures::Source as Sender,
    providers::{Lack, Refusal},
};
use oncegate_runtime::throttle::Throttle;

/// Trusted certificates kept. PayPal uses one or two at a time.
const KEPT_MAX: usize = 8;

/// How long a failure is remembered.
pub(crate) const FAILURE_KEPT: Duration = Duration::from_secs(5);

/// Failures remembered, and fetches under way.
const FAILURES_MAX: usize = 64;
const FLIGHTS_MAX: usize = 4;

/// How many files are read at once, including reads that hang.
const READS_MAX: usize = 8;

/// How many fetches may begin at once, and how long until another one may.
const FETCHES_BURST: u32 = 10;
const FETCH_PAUSE: Duration = Duration::from_secs(1);

/// How many senders that asked for a certificate that does not exist are remembered, and for how long. They may still cause
/// fetches, because PayPal may share their address, but not those that are kept for others.
const SUSPECTS_MAX: usize = 64;
const SUSPECT_KEPT: Duration = Duration::from_secs(600);
const LEFT_FOR_OTHERS: u32 = FETCHES_BURST / 2;

/// How many files of a directory are checked for their expiry. Nobody needs more than a few.
const FILES_MAX: usize = 64;

/// Where certificates come from.
pub(crate) enum Source {
    /// PayPal.
    Network(Box<Fetcher>),
    /// Files named like the last part of the address, with or without `.pem`. For clusters without egress.
    Directory(PathBuf),
    /// A function of a test.
    #[cfg(test)]
    Test(TestSource),
}

#[cfg(test)]
pub(crate) type TestSource =
    Box<dyn Fn(&CertUrl) -> std::pin::Pin<Box<dyn Future<Output = Result<Bytes, Lack>> + Send>> + Send + Sync>;

/// The certificates.
pub(crate) struct Store {
    source: Source,
    trust: Arc<Trust>,
    state: Mutex<State>,
    /// A read keeps its place until it has ended, even if nobody waits for it any more: on a file system that hangs,
    /// made-up names would otherwise take every thread that files are read on.
    reads: Arc<Semaphore>,
    reports: Throttle,
    /// When the directory's certificates expire; 0: there are none.
    directory_end: AtomicU64,
}

struct State {
    /// Trusted when they were added; the most recently used one is at the end.
    kept: Vec<(CertUrl, Arc<Chain>)>,
    failures: Vec<Failure>,
    flights: HashMap<CertUrl, watch::Receiver<Option<Outcome>>>,
    fetches_left: u32,
    refilled: Instant,
    suspects: Vec<(Option<Sender>, Instant)>,
}

type Outcome = Result<Arc<Chain>, Refusal>;

struct Failure {
    url: CertUrl,
    refusal: Refusal,
    until: Instant,
}

impl Store {
    pub(super) fn new(source: Source, trust: Arc<Trust>) -> Arc<Self> {
        let state = State {
            kept: Vec::new(),
            failures: Vec::new(),
            flights: HashMap::new(),
            fetches_left: FETCHES_BURST,
            refilled: Instant::now(),
            suspects: Vec::new(),
        };
        let (state, reports) = (Mutex::new(state), Throttle::default());
        let reads = Arc::new(Semaphore::new(READS_MAX));
        let store = Self { source, trust, state, reads, reports, directory_end: AtomicU64::new(0) };
        store.look();
        Arc::new(store)
    }

    /// When PayPal's certificates in the directory expire, in seconds since 1970, as of the last look: the latest of them
    /// counts, because a replaced one stays beside its successor. None without such a directory, or without such a file in
    /// it.
    pub(crate) fn directory_end(&self) -> Option<u64> {
        Some(self.directory_end.load(Relaxed)).filter(|end| *end > 0)
    }

    /// Whether the certificates are in a directory.
    pub(crate) fn has_directory(&self) -> bool {
        matches!(self.source, Source::Directory(_))
    }

    /// Looks at the directory now; blocks on the file system.
    pub(crate) fn look(&self) {
        let Source::Directory(directory) = &self.source else { return };
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten().take(FILES_MAX);
        let files = entries.map(|entry| entry.path()).filter(|path| path.is_file());
        let ends = files.filter_map(|path| self.trust.end(&Chain::parse(&read_file(&path).ok()?)?));
        self.directory_end.store(ends.max().unwrap_or(0), Relaxed);
    }

    /// The certificate at `url`, which `sender` named, trusted at `now`. Has to be called inside a tokio runtime.
    pub(super) async fn get(self: &Arc<Self>, url: &CertUrl, now: SystemTime, sender: Option<Sender>) -> Outcome {
        if let Some(chain) = self.kept(url) {
            // Verified anew each time: trust ends with the certificate's validity.
            if self.trust.verify(&chain, now).is_ok() {
                return Ok(chain);
            }
            self.lock().kept.retain(|(kept, _)| kept != url);
        }
        let mut flight = self.flight(url, now, sender)?;
        match flight.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(outcome)) => outcome.clone(),
            _ => Err(Refusal::CertUnavailable(Lack::Source)),
        }
    }

    fn kept(&self, url: &CertUrl) -> Option<Arc<Chain>> {
        let mut state = self.lock();
        let index = state.kept.iter().position(|(kept, _)| kept == url)?;
        state.kept[index..].rotate_left(1);
        state.kept.last().map(|(_, chain)| chain.clone())
    }

    /// The fetch that is under way for `url`, or has just ended, or a new one. It runs in a task of its own: whoever asked first
    /// may hang up.
    fn flight(
        self: &Arc<Self>,
        url: &CertUrl,
        now: SystemTime,
        sender: Option<Sender>,
    ) -> Result<watch::Receiver<Option<Outcome>>, Refusal> {
        let mut state = self.lock();
        // Closed without a value: the fetch panicked.
        state.flights.retain(|_, flight| flight.has_changed().is_ok());
        if let Some(flight) = state.flights.get(url) {
            return Ok(flight.clone());
        }
        // On another thread it may have landed since the caller looked.
        if let Some((_, chain)) = state.kept.iter().find(|(kept, _)| kept == url) {
            return Ok(watch::channel(Some(Ok(chain.clone()))).1);
        }
        let clock = Instant::now();
        state.failures.retain(|failure| failure.until > clock);
        if let Some(failure) = state.failures.iter().find(|failure| failure.url == *url) {
            return Err(failure.refusal);
        }
        let may = match self.source {
            // A file takes no token: PayPal is not asked, and a name that does not exist costs next to nothing.
            Source::Directory(_) => state.flights.len() < READS_MAX,
            _ => state.flights.len() < FLIGHTS_MAX && state.may_fetch(sender, clock),
        };
        if !may {
            drop(state);
            self.report(url, "too many certificates were asked for");
            return Err(Refusal::CertUnavailable(Lack::Name));
        }
        let (done, flight) = watch::channel(None);
        state.flights.insert(url.clone(), flight.clone());
        drop(state);
        let (store, url) = (self.clone(), url.clone());
        tokio::spawn(async move {
            let outcome = store.load(&url, now).await;
            store.landed(url, &outcome, sender);
            done.send_replace(Some(outcome));
        });
        Ok(flight)
    }

    fn landed(&self, url: CertUrl, outcome: &Outcome, sender: Option<Sender>) {
        let mut state = self.lock();
        state.flights.remove(&url);
        match outcome {
            Ok(chain) => {
                if state.kept.len() >= KEPT_MAX {
                    state.kept.remove(0);
                }
                state.kept.push((url, chain.clone()));
            }
            Err(refusal) => {
                if state.failures.len() >= FAILURES_MAX {
                    state.failures.remove(0);
                }
                state.failures.push(Failure { url, refusal: *refusal, until: Instant::now() + FAILURE_KEPT });
                if *refusal == Refusal::CertUnavailable(Lack::Name) {
                    state.suspect(sender, Instant::now() + SUSPECT_KEPT);
                }
            }
        }
    }

    async fn load(&self, url: &CertUrl, now: SystemTime) -> Outcome {
        let answer = self.read(url).await.map_err(Refusal::CertUnavailable)?;
        let Some(chain) = Chain::parse(&answer) else {
            self.report(url, "the answer is no certificate");
            return Err(Refusal::CertUnavailable(Lack::Source));
        };
        self.trust.verify(&chain, now)?;
        tracing::info!(host = url.host(), "PayPal's certificate was taken");
        Ok(Arc::new(chain))
    }

    async fn read(&self, url: &CertUrl) -> Result<Bytes, Lack> {
        match &self.source {
            Source::Network(fetcher) => fetcher.fetch(url).await.map_err(|error| {
                if let Some(unreported) = self.reports.pass() {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(host = url.host(), error, unreported, "PayPal's certificate cannot be fetched");
                }
                error.lack()
            }),
            Source::Directory(directory) => {
                let paths = [directory.join(url.name()), directory.join(format!("{}.pem", url.name()))];
                let Ok(place) = self.reads.clone().try_acquire_owned() else {
                    self.report(url, "the directory with certificates does not answer");
                    return Err(Lack::Source);
                };
                let first = move || {
                    let _until_it_has_ended = place;
                    paths.iter().map(|path| read_file(path)).find(|read| !is_missing(read))
                };
                match tokio::time::timeout(TIMEOUT, tokio::task::spawn_blocking(first)).await {
                    Ok(Ok(Some(Ok(bytes)))) => Ok(bytes),
                    Ok(Ok(None)) => {
                        self.report(url, "no such file in the directory with certificates");
                        Err(Lack::Name)
                    }
                    Ok(Ok(Some(Err(_))) | Err(_)) | Err(_) => {
                        self.report(url, "a file in the directory with certificates cannot be read");
                        Err(Lack::Source)
                    }
                }
            }
            #[cfg(test)]
            Source::Test(answer) => answer(url).await,
        }
    }

    fn report(&self, url: &CertUrl, problem: &'static str) {
        if let Some(unreported) = self.reports.pass() {
            tracing::warn!(host = url.host(), problem, unreported, "PayPal's certificate is unavailable");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Remembers who asked for a certificate that does not exist.
    fn suspect(&mut self, sender: Option<Sender>, until: Instant) {
        self.suspects.retain(|(known, _)| *known != sender);
        if self.suspects.len() >= SUSPECTS_MAX {
            self.suspects.remove(0);
        }
        self.suspects.push((sender, until));
    }

    /// Counts a fetch, unless there were too many lately.
    fn may_fetch(&mut self, sender: Option<Sender>, now: Instant) -> bool {
        let pauses = now.duration_since(self.refilled).as_millis() / FETCH_PAUSE.as_millis();
        if let Some(more) = u32::try_from(pauses).ok().filter(|more| *more > 0) {
            self.fetches_left = self.fetches_left.saturating_add(more).min(FETCHES_BURST);
            self.refilled = now;
        }
        let suspected = self.suspects.iter().any(|(known, until)| *known == sender && *until > now);
        let may = self.fetches_left > if suspected { LEFT_FOR_OTHERS } else { 0 };
        self.fetches_left -= u32::from(may);
        may
    }
}

fn read_file(path: &Path) -> io::Result<Bytes> {
    use std::io::Read as _;

    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    let limit = u64::try_from(BYTES_MAX).unwrap_or(u64::MAX);
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() > BYTES_MAX { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes.into()) }
}

/// Whether there is no such file. A name that is too long for the file system means the same.
fn is_missing(read: &io::Result<Bytes>) -> bool {
    let missing = [io::ErrorKind::NotFound, io::ErrorKind::InvalidFilename, io::ErrorKind::IsADirectory];
    read.as_ref().is_err_and(|error| missing.contains(&error.kind()))
}

#[cfg(test)]
mod tests;
