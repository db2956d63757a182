//! The Postgres ledger: one connection that writes, in batches, and a small pool that reads.
//!
//! Safe under concurrency because every transition is one conditional statement (S1), whatever the batches around it:
//! a batch is a way to share round trips and commits, never a transaction that others have to reckon with.

mod bind;
mod check;
mod cleanup;
mod cold;
mod connect;
mod count_rows;
mod counts;
mod failure;
mod grants;
mod history;
mod hot;
pub mod migrate;
mod notify;
mod read;
mod replays;
mod row;
mod statement;
mod stats;
mod target;
mod url;
mod writer;

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

pub use check::check;
pub use connect::{ConnectError, Node};
pub use target::Target;
pub use url::UrlError;
pub(crate) use url::{CertificateFile, certificate_files, is_scheme, options};

use self::{
    connect::Slots,
    count_rows::CountRows,
    counts::{Flusher, PendingCounts},
    notify::Notifier,
    read::Reader,
    statement::Session,
    url::is_verified,
    writer::Writer,
};
use super::{
    Announcement, Error, EventHistory, Heard, Ledger, Replayed, Standing, Trouble,
    durability::Durability,
    filter::{CleanupProgress, CleanupScope, HistoryFilter, Page, StatsFilter, StatsReport},
    load::Load,
    queue::{Op, Queue},
};
use crate::{
    event::{Claim, Claimed, Event, Extend, FencingToken, Key, Lock, Mark, Marked, Resolve, RowId, State, Time},
    ledger::metrics::LedgerMetrics,
};

/// How long closing waits for the last counts: part of the time that a pod has to shut down.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(5);

/// Connections for lists and counts. Few, because only people and cron jobs ask for them, and each may take seconds.
const LISTS_CONNECTIONS_MAX: u32 = 4;
/// Connections for signals, each needed for a moment. The one that listens is kept, and is not among them.
const SIGNALS_CONNECTIONS_MAX: u32 = 2;

/// How the ledger works.
#[derive(Clone, Debug)]
pub struct PostgresSettings {
    /// Calls that may wait for the writer; beyond it they are refused as overloaded.
    pub queue_max: usize,
    /// New operations in one batch; of those put off before, as many again.
    pub batch_max: usize,
    /// Where to count.
    pub metrics: Arc<LedgerMetrics>,
}

impl Default for PostgresSettings {
    fn default() -> Self {
        PostgresSettings { queue_max: 4_096, batch_max: 512, metrics: Arc::default() }
    }
}

/// Why the ledger cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL is not valid. The message leaves it out, because it may hold a password.
    #[error("DATABASE_URL is not a Postgres URL")]
    Url(#[from] UrlError),
    /// The database cannot be reached or may not be used.
    #[error("the database cannot be used")]
    Connect(#[from] ConnectError),
    /// Its schema does not fit.
    #[error(transparent)]
    Schema(#[from] migrate::SchemaError),
}

/// The Postgres ledger.
pub struct PostgresLedger {
    queue: Queue,
    /// For what people and cron jobs ask: History, Stats, Cleanup.
    lists: Reader,
    /// For what the service itself has to know meanwhile: whether the server answers, what waiters wait for, who else is there.
    signals: Reader,
    /// For what caches cannot answer without (C7).
    replays: Reader,
    notifier: Notifier,
    counts: PendingCounts,
    closes: mpsc::Sender<counts::Close>,
    load: Arc<Load>,
    standing: watch::Receiver<Option<Standing>>,
    node: watch::Receiver<Option<Node>>,
    /// How far the entries of open events were looked at again.
    forgotten: AtomicI64,
    /// Where the writer counts events.
    count_rows: CountRows,
    /// The server can be read, and commits wait for a standby that is not there.
    misses_standby: AtomicBool,
}

impl PostgresLedger {
    /// Connects, checks the schema, and starts the writer.
    ///
    /// # Errors
    /// When the URL is not valid, the database cannot be reached, is read-only, or its schema does not fit.
    pub async fn connect(url: &str, settings: &PostgresSettings) -> Result<PostgresLedger, OpenError> {
        PostgresLedger::open(&Target::given(url)?, settings).await
    }

    /// The same, with a target that may tell other credentials later.
    ///
    /// # Errors
    /// When the database cannot be reached, is read-only, or its schema does not fit.
    pub async fn open(target: &Target, settings: &PostgresSettings) -> Result<PostgresLedger, OpenError> {
        let options = target.options();
        warn_if_unverified(&options);
        // Before anything of the schema is used.
        migrate::check(&options).await?;
        let (connection, node, slot) = connect::writing(&options, Session::WRITER, Slots::WRITERS).await?;
        tracing::info!(
            identity = node.identity,
            survives = %node.durability.survives(),
            slot,
            "the ledger is connected"
        );
        let (queue, ops) = Queue::bounded(settings.queue_max, settings.metrics.clone());
        let (counts, load) = (PendingCounts::default(), Arc::<Load>::default());
        let (opened, count_rows) = ((connection, node, slot), CountRows::default());
        let (session, node, standing) =
            Session::new(target.clone(), opened, count_rows.clone(), settings.metrics.clone());
        tokio::spawn(Writer::new(session, ops, settings.batch_max.max(1), counts.clone(), Arc::clone(&load)).run());
        let session = Session::counts(target.clone(), settings.metrics.clone());
        let (closes, closing) = mpsc::channel(1);
        tokio::spawn(Flusher::new(session, counts.clone(), closing).run());
        let reader = |connections_max| Reader::new(target, connections_max, settings.metrics.clone());
        let replays = reader(1);
        let signals = reader(SIGNALS_CONNECTIONS_MAX);
        let lists = reader(LISTS_CONNECTIONS_MAX);
        let notifier = Notifier::start(signals.clone(), Arc::clone(&load));
        let forgotten = AtomicI64::new(i64::MIN);
        let misses_standby = AtomicBool::new(false);
        Ok(PostgresLedger {
            queue,
            lists,
            signals,
            replays,
            notifier,
            counts,
            closes,
            load,
            standing,
            node,
            forgotten,
            count_rows,
            misses_standby,
        })
    }

    /// What the writer's connection stands on; None while it is down.
    pub fn node(&self) -> Option<Node> {
        self.node.borrow().clone()
    }
}

/// Warns where anybody could pose as the database: sqlx takes any certificate, or none, unless told to verify it.
fn warn_if_unverified(options: &PgConnectOptions) {
    let host = options.get_host();
    let is_local = options.get_socket().is_some()
        || host == "localhost"
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if !is_local && !is_verified(options) {
        tracing::warn!(host, "the database is not verified: add sslmode=verify-full, and sslrootcert, to its URL");
    }
}

#[async_trait]
impl Ledger for PostgresLedger {
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
        self.signals.peek(keys).await
    }

    async fn history_of(&self, key: Key) -> Result<Option<EventHistory>, Error> {
        self.lists.history_of(key).await
    }

    async fn history(&self, filter: HistoryFilter) -> Result<Page, Error> {
        self.lists.history(filter).await
    }

    async fn stats(&self, filter: StatsFilter) -> Result<StatsReport, Error> {
        self.lists.stats(filter).await
    }

    async fn now(&self) -> Result<Time, Error> {
        self.signals.now().await
    }

    async fn cleanup_step(&self, scope: &CleanupScope, progress: &mut CleanupProgress) -> Result<(), Error> {
        self.lists.cleanup_step(scope, progress).await
    }

    fn count_duplicate(&self, key: &Key) {
        self.counts.tally.duplicate(key, None);
    }

    fn durability(&self) -> Option<Durability> {
        self.node.borrow().as_ref().map(|node| node.durability.clone())
    }

    fn trouble(&self) -> Option<Trouble> {
        self.misses_standby.load(Ordering::Relaxed).then_some(Trouble::NoStandby)
    }

    fn standing(&self) -> watch::Receiver<Option<Standing>> {
        self.standing.clone()
    }

    fn announce(&self, announcement: Announcement) {
        self.notifier.announce(announcement);
    }

    fn announcements(&self) -> broadcast::Receiver<Heard> {
        self.notifier.subscribe()
    }

    async fn replays(&self, standing: &Standing, after: Option<Arc<str>>) -> Result<Replayed, Error> {
        self.replays.replays(Arc::clone(&standing.identity), after).await
    }

    fn load(&self) -> Option<Arc<Load>> {
        Some(Arc::clone(&self.load))
    }

    async fn maintain(&self) -> Result<(), Error> {
        // What it writes would wait as every other commit does, on one more session each second.
        if self.node.borrow().is_none() {
            return Ok(());
        }
        let after = RowId(self.forgotten.load(Ordering::Relaxed));
        self.forgotten.store(self.lists.sweep(after).await?.0, Ordering::Relaxed);
        self.lists.turn(&self.count_rows).await
    }

    async fn check(&self) -> Result<(), Error> {
        let checked = self.signals.check().await;
        // A standby can be read; only the writer's connection tells whether the node may decide.
        let is_down = self.node.borrow().is_none();
        let misses_standby = is_down && checked.is_ok() && self.signals.misses_standby().await.unwrap_or_default();
        self.misses_standby.store(misses_standby, Ordering::Relaxed);
        checked?;
        if is_down {
            return Err(Error::unavailable());
        }
        Ok(())
    }

    async fn close(&self) {
        self.queue.close().await;
        // After the writer, which counts too.
        let (done, closed) = oneshot::channel();
        if self.closes.send(done).await.is_ok() {
            // It may not end in time, because somebody holds what it would write.
            if tokio::time::timeout(FLUSH_TIME_MAX, closed).await.is_err() {
                tracing::warn!("counts and processing times of the last second could not be written in time");
            }
        }
        self.notifier.close().await;
        self.lists.close().await;
        self.signals.close().await;
        self.replays.close().await;
    }

    async fn ended(&self) {
        tokio::select! {
            () = self.queue.ended() => {}
            () = self.closes.closed() => {}
        }
    }
}
