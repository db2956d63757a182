//! What a ledger counts: shared by its writer and its queue.

use std::{fmt, sync::OnceLock, time::Instant};

use oncegate_runtime::{
    labels,
    metrics::{Counter, Counters, Family, Histogram, Page},
};

const ITEMS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
const SECONDS: &[f64] = &[0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

const QUEUE: Family = Family::gauge("oncegate_ledger_queue_calls", &[], "Calls that wait for the ledger's next batch.");
const BATCH_ITEMS: Family =
    Family::histogram("oncegate_ledger_batch_calls", &[], ITEMS, "Calls that went into one batch of the ledger.");
const BATCH_SECONDS: Family = Family::histogram(
    "oncegate_ledger_batch_duration_seconds",
    &[],
    SECONDS,
    "How long a batch took, its commit included.",
);
const FAILURES: Family = Family::counter(
    "oncegate_ledger_failures_total",
    &["kind"],
    "Statements of the ledger that failed, by what it means.",
);
const CONNECTS: Family = Family::counter(
    "oncegate_ledger_connects_total",
    &["result"],
    "Attempts to connect the ledger's writer, the first one at the start included.",
);
const UP: Family = Family::gauge("oncegate_ledger_up", &[], "1 while the ledger's writer is connected and may decide.");
const WEAK: Family = Family::gauge(
    "oncegate_ledger_durability_warnings",
    &[],
    "How many settings of the store make an acknowledged completion survive less than it could; /readyz says which.",
);

pub(crate) const FAMILIES: &[&Family] = &[&QUEUE, &BATCH_ITEMS, &BATCH_SECONDS, &FAILURES, &CONNECTS, &UP, &WEAK];

labels! {
    /// What the failure of a statement means.
    pub(crate) enum LedgerFailure {
        /// The connection died: it may have taken effect.
        Broken => "broken",
        /// The database does not write, or not serve.
        Refusing => "refusing",
        /// It took too long and was cancelled.
        TooSlow => "too_slow",
        /// Another session holds a row.
        Contended => "contended",
        /// One of the items is bad.
        BadItem => "bad_item",
        /// A row has a value that this version does not know.
        Unreadable => "unreadable",
        /// The database cannot read what it keeps.
        Damaged => "damaged",
        /// A defect of ours.
        Defect => "defect",
    }
}

labels! {
    enum Connected {
        Yes => "connected",
        No => "failed",
    }
}

/// Tells a number when asked.
type Ask = Box<dyn Fn() -> usize + Send + Sync>;

/// See the module.
pub struct LedgerMetrics {
    /// Calls refused because the queue was full.
    pub(crate) refused: Counter,
    batch_items: Histogram,
    batch_seconds: Histogram,
    failures: Counters<LedgerFailure>,
    connects: Counters<Connected>,
    queued: OnceLock<Ask>,
}

impl Default for LedgerMetrics {
    fn default() -> Self {
        Self {
            refused: Counter::new(),
            batch_items: Histogram::new(&BATCH_ITEMS),
            batch_seconds: Histogram::new(&BATCH_SECONDS),
            failures: Counters::default(),
            connects: Counters::default(),
            queued: OnceLock::new(),
        }
    }
}

impl fmt::Debug for LedgerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LedgerMetrics").finish_non_exhaustive()
    }
}

/// A batch that is under way; counted when dropped.
pub(crate) struct Batch<'m> {
    metrics: &'m LedgerMetrics,
    started: Instant,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.metrics.batch_seconds.observe(self.started.elapsed());
    }
}

impl LedgerMetrics {
    /// How many calls wait is told by `ask`.
    pub(crate) fn queued_by(&self, ask: impl Fn() -> usize + Send + Sync + 'static) {
        // A ledger has one queue.
        drop(self.queued.set(Box::new(ask)));
    }

    /// A batch of so many calls begins.
    pub(crate) fn batch(&self, calls: usize) -> Batch<'_> {
        self.batch_items.observe_count(calls);
        Batch { metrics: self, started: Instant::now() }
    }

    /// A statement failed.
    pub(crate) fn failed(&self, failure: LedgerFailure) {
        self.failures.add(failure);
    }

    /// The writer connected.
    pub(crate) fn connected(&self) {
        self.connects.add(Connected::Yes);
    }

    /// The writer could not connect.
    pub(crate) fn not_connected(&self) {
        self.connects.add(Connected::No);
    }

    /// Whether the writer is connected, and how many settings of the store weaken what it acknowledges, is known elsewhere.
    pub(crate) fn render(&self, page: &mut Page, is_up: bool, durability_warnings: usize) {
        page.single(&QUEUE, self.queued.get().map_or(0, |ask| ask()));
        page.family(&BATCH_ITEMS).histogram(&[], &self.batch_items);
        page.family(&BATCH_SECONDS).histogram(&[], &self.batch_seconds);
        page.counters(&FAILURES, &self.failures);
        page.counters(&CONNECTS, &self.connects);
        page.single(&UP, is_up);
        page.single(&WEAK, durability_warnings);
    }
}
