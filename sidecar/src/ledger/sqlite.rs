//! The SQLite ledger: one file, one process, no server (L7).
//!
//! A thread of its own holds the one connection that writes ([`writer`]); queries have connections beside it ([`read`]).
//! Write-ahead logging with `synchronous = full`: what was answered is on the disk. The pure rules of
//! [`transition`](crate::event::transition) decide within the transaction that applies them, and since nobody else
//! writes, what they were told is true until its commit.

mod check;
mod clock;
mod counts;
mod error;
mod migrate;
mod read;
mod rows;
mod transaction;
mod writer;

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use async_trait::async_trait;
use oncegate_runtime::throttle::Throttle;
use rusqlite::{Connection, OpenFlags};
use tokio::{
    sync::{broadcast, mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

pub use self::{check::check, migrate::Migrated};
use self::{
    clock::Clock,
    read::Readers,
    writer::{CleanupStep, Writer},
};
use super::{
    Announcement, Error, EventHistory, Heard, Ledger, Replayed, Standing,
    damage::Damage,
    durability::Durability,
    filter::{CleanupProgress, CleanupScope, HistoryFilter, Page, StatsFilter, StatsReport},
    load::Load,
    queue::{Op, Queue},
    tally::Tally,
    walk::PAGE_TIME_MAX,
};
use crate::{
    event::{Claim, Claimed, Event, Extend, FencingToken, Key, Lock, Mark, Marked, Resolve, State, Time},
    ledger::metrics::LedgerMetrics,
};

/// The first release of the library without the write-ahead log's race between a writer and a checkpoint, which loses
/// committed transactions.
const LIBRARY_VERSION_MIN: i32 = 3_051_003;

/// The longest that a check waits for an answer.
const CHECK_TIME_MAX: Duration = Duration::from_secs(1);

/// How often counts that are kept in memory are written (L2).
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// How many pages of the log (16 MiB) are gathered before they are copied into the database: at the default of 4 MiB a busy
/// writer does that several times a second, and waits for the disk twice each time.
const CHECKPOINT_PAGES: i32 = 4_096;

/// The most that a connection keeps of the database in memory. The index of keys is read at random places.
const CACHE_KIB: i32 = 32 * 1_024;

/// Connections for signals. Each is needed for a moment, and they take turns.
const SIGNALS_CONNECTIONS: usize = 1;

/// Room for some thirty statements, so that none is prepared twice.
const STATEMENTS_MAX: usize = 64;

/// How the ledger works.
#[derive(Clone, Debug)]
pub struct SqliteSettings {
    /// Creates the file, and brings an older schema up to date; otherwise what does not fit is refused (L8).
    pub migrate: bool,
    /// Calls that may wait for the writer; beyond it they are refused as overloaded.
    pub queue_max: usize,
    /// Calls in one transaction.
    pub batch_max: usize,
    /// Listings and counts at once.
    pub readers_max: usize,
    /// How long to wait for another program that has locked the file: a backup, somebody's shell.
    pub busy_timeout: Duration,
    /// Where to count.
    pub metrics: Arc<LedgerMetrics>,
}

impl Default for SqliteSettings {
    fn default() -> Self {
        Self {
            migrate: false,
            queue_max: 4_096,
            batch_max: 512,
            readers_max: 2,
            busy_timeout: Duration::from_secs(1),
            metrics: Arc::default(),
        }
    }
}

/// Why the ledger cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The library that was linked can lose committed transactions.
    #[error("SQLite {found} is linked, and releases before 3.51.3 can lose committed transactions")]
    Library {
        /// Its version.
        found: &'static str,
    },
    /// Another process works on the file.
    #[error("{} is in use by another process, which holds {}: only one process can work on it", path.display(), lock.display())]
    InUse {
        /// The database.
        path: PathBuf,
        /// The file that is locked.
        lock: PathBuf,
    },
    /// The file cannot be written to.
    #[error("{} cannot be written to", path.display())]
    ReadOnly {
        /// The database.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file that keeps other processes out cannot be made or locked.
    #[error("cannot lock {}", lock.display())]
    Lock {
        /// That file.
        lock: PathBuf,
        /// What was met.
        source: io::Error,
    },
    /// The database cannot be opened or read.
    #[error("cannot open {} as a SQLite database", path.display())]
    Open {
        /// The database.
        path: PathBuf,
        /// What was met.
        source: rusqlite::Error,
    },
    /// The file belongs to something else.
    #[error("{} is a SQLite database, but not one of oncegate", path.display())]
    Foreign {
        /// The database.
        path: PathBuf,
    },
    /// The schema is older than this version needs.
    #[error(
        "the schema of {} is at version {found} and this version of oncegate needs {needed}: run `oncegate migrate`",
        path.display()
    )]
    Behind {
        /// The database.
        path: PathBuf,
        /// The newest migration that was applied; 0: none.
        found: i64,
        /// The newest migration of this version.
        needed: i64,
    },
    /// The schema is newer than this version can work on.
    #[error(
        "the schema of {} is at version {found}, which programs that know version {compatible_from} can work on; this \
         version of oncegate knows {known}: run a newer one",
        path.display()
    )]
    Ahead {
        /// The database.
        path: PathBuf,
        /// The newest migration that was applied.
        found: i64,
        /// The newest migration of this version.
        known: i64,
        /// The oldest migration that a program has to know.
        compatible_from: i64,
    },
    /// A migration failed; nothing of it stays.
    #[error("migration {number} of {} failed", path.display())]
    Migrate {
        /// The database.
        path: PathBuf,
        /// Which one.
        number: i64,
        /// What was met.
        source: rusqlite::Error,
    },
    /// The thread that writes cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// The SQLite ledger. Dropped without [`Ledger::close`], it still writes what was queued, a moment later.
pub struct SqliteLedger {
    queue: Queue,
    cleanups: mpsc::Sender<CleanupStep>,
    /// For what people and cron jobs ask: History, Stats.
    lists: Arc<Readers>,
    /// For what the service itself has to know meanwhile, which no listing may hold up: whether the file can be read, what
    /// waiters wait for, what was replayed.
    signals: Arc<Readers>,
    clock: Arc<Clock>,
    /// The last token that was given out when the file was opened.
    token_at_opening: FencingToken,
    writer: JoinHandle<()>,
    tally: Tally,
    load: Arc<Load>,
    standing: watch::Sender<Option<Standing>>,
    durability: Durability,
    announcements: broadcast::Sender<Heard>,
    // It holds the queue open until it is dropped.
    _ticker: AbortOnDropHandle<()>,
}

impl SqliteLedger {
    /// Opens the database, checks that nobody else works on it and that its schema fits, and starts the writer. Blocks for
    /// as long as that takes, milliseconds as a rule. The directory must exist.
    ///
    /// # Errors
    /// When the library is too old, another process works on the file, it cannot be read or is another application's, or
    /// its schema does not fit.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn open(path: &Path, settings: &SqliteSettings) -> Result<SqliteLedger, OpenError> {
        let database = Database::open(path, settings.migrate, settings.busy_timeout)?;
        let durability =
            durability(&database.conn).map_err(|source| OpenError::Open { path: database.path.clone(), source })?;
        durability.warn();
        let clock = Arc::new(Clock::from(database.clock_time));
        let readers = |connections| Readers::new(database.path.clone(), settings.busy_timeout, connections);
        let (lists, signals) = (Arc::new(readers(settings.readers_max)), Arc::new(readers(SIGNALS_CONNECTIONS)));
        let (queue, ops) = Queue::bounded(settings.queue_max.max(1), settings.metrics.clone());
        let (tally, load) = (Tally::default(), Arc::new(Load::taking_turns()));
        // Steps of one Cleanup follow one another; few run at once.
        let (cleanups, cleanup_steps) = mpsc::channel(16);
        // S2: the counter of a file that was brought back from a backup is behind what was issued since, and nothing shows it.
        // No ledger issues a million tokens a second for long, so that now is ahead of all that it ever issued.
        let token_at_opening = database.fencing_token.max(FencingToken(clock.now().0));
        let writer = Writer {
            clock: Arc::clone(&clock),
            token: token_at_opening,
            conn: database.conn,
            tally: tally.clone(),
            metrics: settings.metrics.clone(),
            load: Arc::clone(&load),
            faults: Throttle::default(),
            damage: Damage::default(),
            is_ahead: false,
            batch_max: settings.batch_max.max(1),
            ops,
            cleanups: cleanup_steps,
            _lock: database.lock,
        };
        let writer = thread::Builder::new()
            .name("oncegate-sqlite".into())
            .spawn(move || writer.run())
            .map_err(OpenError::Thread)?;
        let ticker = AbortOnDropHandle::new(tokio::spawn(tick(queue.clone())));
        tracing::info!(path = %database.path.display(), survives = %durability.survives(), "the embedded ledger is open");
        // Nobody else works on the file, so whatever is cached belongs to this opening, and dies with it.
        let standing = Standing {
            identity: format!("sqlite:{}", Uuid::new_v4().simple()).into(),
            generation: 1,
            cache_key: Uuid::new_v4().as_bytes().as_slice().into(),
        };
        Ok(SqliteLedger {
            queue,
            cleanups,
            lists,
            signals,
            clock,
            token_at_opening,
            writer,
            tally,
            load,
            standing: watch::Sender::new(Some(standing)),
            durability,
            announcements: broadcast::Sender::new(1),
            _ticker: ticker,
        })
    }

    /// Creates the file if there is none, and brings its schema up to date.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn migrate(path: &Path) -> Result<Migrated, OpenError> {
        Ok(Database::open(path, true, SqliteSettings::default().busy_timeout)?.migrated)
    }
}

/// Asks for a flush each second. One that comes late is not made up for.
async fn tick(queue: Queue) {
    let mut ticks = interval(FLUSH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        queue.flush();
    }
}

#[async_trait]
impl Ledger for SqliteLedger {
    async fn claim(&self, claim: Claim) -> Result<Claimed, Error> {
        self.queue.ask(|reply| Op::Claim(claim, reply)).await
    }

    async fn mark(&self, mark: Mark) -> Result<Marked, Error> {
        self.queue.ask(|reply| Op::Mark(mark, reply)).await
    }

    async fn extend(&self, extend: Extend) -> Result<Lock, Error> {
        self.queue.ask(|reply| Op::Extend(extend, reply)).await
    }

    async fn resolve(&self, resolve: Resolve) -> Result<Event, Error> {
        self.queue.ask(|reply| Op::Resolve(resolve, reply)).await
    }

    async fn peek(&self, keys: Vec<Key>) -> Result<Vec<(Key, State, FencingToken)>, Error> {
        self.signals.read(|conn| read::peek(conn, keys)).await
    }

    async fn history_of(&self, key: Key) -> Result<Option<EventHistory>, Error> {
        self.lists.read(move |conn| read::history_of(conn, &key)).await
    }

    async fn history(&self, filter: HistoryFilter) -> Result<Page, Error> {
        self.lists.read(move |conn| read::history(conn, &filter, PAGE_TIME_MAX)).await
    }

    async fn stats(&self, filter: StatsFilter) -> Result<StatsReport, Error> {
        let clock = Arc::clone(&self.clock);
        self.lists.read(move |conn| read::stats(conn, &filter, &clock)).await
    }

    async fn now(&self) -> Result<Time, Error> {
        if self.lists.is_closed() { Err(Error::unavailable()) } else { Ok(self.clock.now()) }
    }

    async fn cleanup_now(&self) -> Result<Time, Error> {
        self.now().await.map(|now| now.minus(self.clock.ahead()))
    }

    async fn cleanup_step(&self, scope: &CleanupScope, progress: &mut CleanupProgress) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let step = CleanupStep { scope: scope.clone(), progress: progress.clone(), reply };
        self.cleanups.send(step).await.map_err(|_ended| Error::unavailable())?;
        // The writer looks for steps between two batches. Where no batch is due, this makes one; where the queue is full, one
        // is.
        self.queue.flush();
        *progress = answer.await.map_err(|_ended| Error::OutcomeUnknown)??;
        Ok(())
    }

    fn count_duplicate(&self, key: &Key) {
        self.tally.duplicate(key, None);
    }

    fn durability(&self) -> Option<Durability> {
        Some(self.durability.clone())
    }

    fn standing(&self) -> watch::Receiver<Option<Standing>> {
        self.standing.subscribe()
    }

    fn announce(&self, _: Announcement) {
        // There are no other processes.
    }

    fn announcements(&self) -> broadcast::Receiver<Heard> {
        self.announcements.subscribe()
    }

    async fn replays(&self, _: &Standing, after: Option<Arc<str>>) -> Result<Replayed, Error> {
        // Whatever is cached belongs to this opening, so that older replays void nothing.
        let after = after.and_then(|after| after.parse().ok()).map_or(self.token_at_opening, FencingToken);
        let clock = Arc::clone(&self.clock);
        self.signals.read(move |conn| read::replays(conn, after, &clock)).await
    }

    fn load(&self) -> Option<Arc<Load>> {
        Some(Arc::clone(&self.load))
    }

    async fn check(&self) -> Result<(), Error> {
        if self.writer.is_finished() {
            return Err(Error::unavailable());
        }
        timeout(CHECK_TIME_MAX, self.signals.read(read::check)).await.unwrap_or_else(|_late| Err(Error::unavailable()))
    }

    async fn close(&self) {
        self.queue.close().await;
        self.standing.send_replace(None);
        self.lists.close();
        self.signals.close();
    }

    async fn ended(&self) {
        self.queue.ended().await;
    }
}

/// An open database that nobody else works on.
struct Database {
    conn: Connection,
    lock: FileLock,
    path: PathBuf,
    migrated: Migrated,
    fencing_token: FencingToken,
    clock_time: Time,
}

impl Database {
    fn open(path: &Path, migrate: bool, busy_timeout: Duration) -> Result<Self, OpenError> {
        if rusqlite::version_number() < LIBRARY_VERSION_MIN {
            return Err(OpenError::Library { found: rusqlite::version() });
        }
        let path = canonical(path);
        if !migrate && !path.exists() {
            return Err(OpenError::Behind { path, found: 0, needed: migrate::needed() });
        }
        let lock = FileLock::take(&path, migrate)?;
        let (conn, migrated, fencing_token, clock_time) = connect(&path, migrate, busy_timeout)?;
        Ok(Self { conn, lock, path, migrated, fencing_token, clock_time })
    }
}

/// One name for one file: two ways to it must not lead to two locks.
fn canonical(path: &Path) -> PathBuf {
    if let Ok(path) = path.canonicalize() {
        return path;
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (parent.canonicalize(), path.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        // Opening it will say what is wrong.
        (Err(_), _) | (_, None) => path.to_owned(),
    }
}

/// Keeps other processes out. The operating system releases it when the process ends, however it ends; the files stay, because
/// removing one would let in both a process that has it open and one that makes it anew.
struct FileLock {
    _name: File,
    /// The database itself: under a second name (a hard link, or a mount of the file alone) the file beside it is another one.
    /// Of another kind than the locks that SQLite takes in it, and held as long as there are connections: closing a file ends
    /// the locks that its process has in it.
    _database: Option<File>,
}

impl FileLock {
    fn take(path: &Path, create: bool) -> Result<FileLock, OpenError> {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let lock = PathBuf::from(name);
        let in_use = || OpenError::InUse { path: path.to_owned(), lock: lock.clone() };
        let cannot = |source| OpenError::Lock { lock: lock.clone(), source };
        let file = options(true).open(&lock).map_err(cannot)?;
        take(&file, in_use, cannot)?;
        let database = match options(create).open(path) {
            Ok(database) => {
                take(&database, in_use, |source| OpenError::Lock { lock: path.to_owned(), source })?;
                Some(database)
            }
            // SQLite would open it for reading alone, and refuse every call.
            Err(source) if matches!(source.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                return Err(OpenError::ReadOnly { path: path.to_owned(), source });
            }
            // It will say better what is wrong.
            Err(_) => None,
        };
        Ok(FileLock { _name: file, _database: database })
    }
}

/// How the files are opened. One that is made is its owner's alone: what applications answered is in it, and SQLite gives its log
/// and the log's index the mode of the database. One that is there keeps the mode that somebody gave it.
fn options(create: bool) -> OpenOptions {
    let mut options = File::options();
    options.create(create).truncate(false).write(true).mode(0o600);
    options
}

fn take(
    file: &File,
    in_use: impl FnOnce() -> OpenError,
    cannot: impl FnOnce(io::Error) -> OpenError,
) -> Result<(), OpenError> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => in_use(),
        TryLockError::Error(source) => cannot(source),
    })
}

fn connect(
    path: &Path,
    migrate: bool,
    busy_timeout: Duration,
) -> Result<(Connection, Migrated, FencingToken, Time), OpenError> {
    let open = |source| OpenError::Open { path: path.to_owned(), source };
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    flags.set(OpenFlags::SQLITE_OPEN_CREATE, migrate);
    let mut conn = Connection::open_with_flags(path, flags).map_err(open)?;
    conn.busy_timeout(busy_timeout).map_err(open)?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    // Only after this is it ours to change.
    let migrated = migrate::ensure(&mut conn, path, migrate)?;
    conn.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get::<_, String>(0)).map_err(open)?;
    conn.pragma_update(None, "synchronous", "full").map_err(open)?;
    conn.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES).map_err(open)?;
    conn.pragma_update(None, "cache_size", -CACHE_KIB).map_err(open)?;
    conn.pragma_update(None, "temp_store", "memory").map_err(open)?;
    let (fencing_token, clock_time) = conn
        .query_row("select fencing_token, clock_time from oncegate_counter where id = 1", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .map_err(open)?;
    Ok((conn, migrated, fencing_token, clock_time))
}

/// How the connection is really set, asked rather than assumed.
fn durability(conn: &Connection) -> rusqlite::Result<Durability> {
    let journal_mode: String = conn.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    Ok(Durability::of_embedded(&journal_mode, conn.pragma_query_value(None, "synchronous", |row| row.get(0))?))
}

#[cfg(test)]
mod tests;
