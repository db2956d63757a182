//! The sidecar's metrics. Every name, label, unit and bucket is defined here, except the methods of the API (`method`);
//! `docs/metrics.md` says what they mean, and a test compares the two. No label comes from a request: neither tenant nor
//! provider, which callers choose.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use oncegate_runtime::{
    labels,
    metrics::{Counter, Counters, Family, Gauge, Histogram, Page},
    reload::Counts,
};
use tonic::Code;

use crate::{
    cache::stats::CacheStats,
    coordinator::Occupancy,
    event::{Event, Outcome, Resolved, State, Time},
    ledger::{
        filter::StatsReport,
        metrics::{self as of_ledger, LedgerMetrics},
    },
    method::{Called, Method},
};

/// Calls: a duplicate from the cache takes tens of microseconds, a grant takes a commit.
const CALL_SECONDS: &[f64] = &[0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0];
/// Processing: up to the lock of five minutes. 5 s is the bound of an alert.
const PROCESSING_SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

const RPCS: Family = Family::counter(
    "oncegate_rpc_requests_total",
    &["method", "code"],
    "Calls answered, by method and gRPC code; CANCELLED, when the caller went away first.",
);
const RPC_SECONDS: Family = Family::histogram(
    "oncegate_rpc_duration_seconds",
    &["method"],
    CALL_SECONDS,
    "How long calls took until their answer began, waiting for an outcome included.",
);
const CLAIMS: Family = Family::counter(
    "oncegate_claims_total",
    &["decision"],
    "CheckAndLock calls by decision. Their sum is that of the calls in oncegate_rpc_requests_total.",
);
const ATTEMPTS: Family = Family::counter(
    "oncegate_attempts_total",
    &["attempt"],
    "Locks granted: for the first attempt at an event, or a retry.",
);
const MARKS: Family =
    Family::counter("oncegate_marks_total", &["outcome"], "MarkCompleted and MarkFailed calls by what became of them.");
const PROCESSING: Family = Family::histogram(
    "oncegate_processing_duration_seconds",
    &["outcome"],
    PROCESSING_SECONDS,
    "From the grant of a lock to the mark of its attempt, by the database's clock.",
);
const RESOLUTIONS: Family = Family::counter(
    "oncegate_resolutions_total",
    &["to"],
    "Events decided on by hand, by the state they were put into.",
);
const OVERLOADED: Family = Family::counter(
    "oncegate_overloaded_total",
    &["bound"],
    "Calls refused as OVERLOADED: too many at once, or the ledger's queue full.",
);
const CALLS: Family = Family::gauge(
    "oncegate_calls_under_way",
    &[],
    "Calls on the ledger at this moment: claims, or the others, whichever are more.",
);
const CALLS_MAX: Family = Family::gauge(
    "oncegate_calls_max",
    &[],
    "Claims on the ledger beyond which they are refused, and other calls beyond which these are.",
);
const WAITING: Family =
    Family::gauge("oncegate_calls_waiting", &[], "Calls that wait for the outcome of another's attempt.");
const WAITING_MAX: Family = Family::gauge("oncegate_calls_waiting_max", &[], "How many may.");
const METADATA_LEFT_OUT: Family = Family::counter(
    "oncegate_metadata_keys_left_out_total",
    &[],
    "Keys of completions' metadata that were not kept: too large, or no JSON.",
);
const PAYLOAD_CHANGES: Family = Family::counter(
    "oncegate_payload_changes_total",
    &[],
    "Calls on a known event with another payload than its latest attempt's.",
);
const UNAUTHENTICATED: Family = Family::counter(
    "oncegate_calls_unauthenticated_total",
    &[],
    "Calls that were denied for want of credentials that are known.",
);
const DENIED: Family = Family::counter(
    "oncegate_calls_permission_denied_total",
    &[],
    "Calls that were denied because the caller's role or tenants do not permit them.",
);
const OVER_QUOTA: Family =
    Family::counter("oncegate_calls_over_quota_total", &[], "Calls beyond their tenant's quota.");
const RELOADS: Family = Family::counter(
    "oncegate_sidecar_reloads_total",
    &["files", "result"],
    "Files (certificates, identities, the database's URL) that changed: replaced, or failed and the old content kept.",
);
const RELOAD_FAILING: Family = Family::gauge(
    "oncegate_sidecar_reload_failing",
    &["files"],
    "1 while files (certificates, identities, the database's URL) cannot be read again, and the old content is kept.",
);
const CACHE: Family =
    Family::counter("oncegate_cache_lookups_total", &["layer", "result"], "Look-ups of completed events.");
const CACHE_REFUSED: Family = Family::counter(
    "oncegate_cache_refused_total",
    &["reason"],
    "Cached values that were not believed: unverified (forged, or another database's), malformed, of another version, or \
     void (the event was decided on by hand since, or the value is older than any may be).",
);
const CACHE_LOST: Family =
    Family::counter("oncegate_cache_writes_lost_total", &[], "Entries that did not get into Redis.");
const BREAKER: Family = Family::gauge(
    "oncegate_cache_breaker_open",
    &[],
    "1 while Redis does not answer and is left alone; 0 without Redis.",
);
const EVENTS: Family = Family::gauge(
    "oncegate_events",
    &["state"],
    "Events in the ledger by state, as last counted; no row before that. The same in every sidecar.",
);
const STUCK: Family = Family::gauge(
    "oncegate_events_stuck",
    &[],
    "Events in processing whose lock has expired, as last counted; no row before that. The same in every sidecar.",
);
const ABANDONED: Family = Family::gauge(
    "oncegate_events_abandoned",
    &[],
    "Failed and pending events created more than four days ago, as last counted; no row before that. No provider delivers them \
     again by itself. The same in every sidecar.",
);
const COUNTED: Family = Family::gauge(
    "oncegate_events_counted_timestamp_seconds",
    &[],
    "When the events were last counted, in seconds since 1970; 0: not yet.",
);
const CLEANUPS: Family =
    Family::counter("oncegate_cleanup_runs_total", &["result"], "Cleanups that ended, dry runs aside.");
const CLEANED: Family = Family::counter("oncegate_cleanup_events_deleted_total", &[], "Events that Cleanup deleted.");
const CLEANUP_TIME: Family = Family::gauge(
    "oncegate_cleanup_last_success_timestamp_seconds",
    &[],
    "When a Cleanup through this process last ended well, in seconds since 1970; 0: none since it started.",
);

/// All of them.
pub const FAMILIES: &[&[&Family]] = &[
    &[
        &RPCS,
        &RPC_SECONDS,
        &CLAIMS,
        &ATTEMPTS,
        &MARKS,
        &PROCESSING,
        &RESOLUTIONS,
        &OVERLOADED,
        &CALLS,
        &CALLS_MAX,
        &WAITING,
        &WAITING_MAX,
        &METADATA_LEFT_OUT,
        &PAYLOAD_CHANGES,
        &UNAUTHENTICATED,
        &DENIED,
        &OVER_QUOTA,
        &RELOADS,
        &RELOAD_FAILING,
        &CACHE,
        &CACHE_REFUSED,
        &CACHE_LOST,
        &BREAKER,
        &EVENTS,
        &STUCK,
        &ABANDONED,
        &COUNTED,
        &CLEANUPS,
        &CLEANED,
        &CLEANUP_TIME,
    ],
    of_ledger::FAMILIES,
];

labels! {
    /// gRPC's codes, in their order.
    pub(crate) enum CodeLabel {
        Ok => "OK",
        Cancelled => "CANCELLED",
        Unknown => "UNKNOWN",
        InvalidArgument => "INVALID_ARGUMENT",
        DeadlineExceeded => "DEADLINE_EXCEEDED",
        NotFound => "NOT_FOUND",
        AlreadyExists => "ALREADY_EXISTS",
        PermissionDenied => "PERMISSION_DENIED",
        ResourceExhausted => "RESOURCE_EXHAUSTED",
        FailedPrecondition => "FAILED_PRECONDITION",
        Aborted => "ABORTED",
        OutOfRange => "OUT_OF_RANGE",
        Unimplemented => "UNIMPLEMENTED",
        Internal => "INTERNAL",
        Unavailable => "UNAVAILABLE",
        DataLoss => "DATA_LOSS",
        Unauthenticated => "UNAUTHENTICATED",
    }
}

impl From<Code> for CodeLabel {
    fn from(code: Code) -> Self {
        usize::try_from(i32::from(code)).ok().and_then(|code| Self::ALL.get(code)).copied().unwrap_or(Self::Unknown)
    }
}

labels! {
    /// The outcome of a CheckAndLock (I11).
    pub(crate) enum ClaimLabel {
        /// The caller holds the lock.
        Acquired => "acquired",
        /// The event is done.
        Duplicate => "duplicate",
        /// Somebody else holds the lock, or a pause has not passed.
        InProgress => "in_progress",
        /// Held for an operator, a mismatch, a call that is wrong or not permitted, or one beyond its tenant's quota.
        Rejected => "rejected",
        /// No decision was possible. Alerts look at this one.
        Failed => "failed",
    }
}

labels! {
    /// The outcome of a mark.
    pub(crate) enum MarkLabel {
        Completed => "completed",
        Retryable => "retryable",
        Terminal => "terminal",
        Unknown => "unknown",
        /// This very outcome was recorded before.
        Repeated => "repeated",
        /// The lock is somebody else's.
        LockLost => "lock_lost",
        /// Another outcome was recorded before, there is no such event, or the call is wrong.
        Rejected => "rejected",
        /// It could not be recorded.
        Failed => "failed",
    }
}

labels! {
    pub(crate) enum AttemptLabel {
        First => "first",
        Retry => "retry",
    }
}

labels! {
    pub(crate) enum EndLabel {
        Completed => "completed",
        Failed => "failed",
    }
}

labels! {
    pub(crate) enum ResolvedTo {
        Pending => "pending",
        Completed => "completed",
        Dead => "dead",
    }
}

labels! {
    pub(crate) enum CleanupEnd {
        Done => "done",
        Failed => "failed",
        /// Its caller went away, which ended it.
        CallerGone => "caller_gone",
        /// The service ended.
        Stopping => "stopping",
    }
}

/// What a handler tells the counting layer (`grpc::observe`) about its answer, in addition to the answer itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Claimed(ClaimLabel),
    Marked(MarkLabel),
}

impl Told {
    /// For logs and traces.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Claimed(claimed) => claimed.name(),
            Self::Marked(marked) => marked.name(),
        }
    }

    /// The outcome of a call whose handler told nothing, which means an error.
    pub(crate) fn of_error(called: Called, code: Code) -> Option<Self> {
        let rejected = matches!(
            code,
            Code::FailedPrecondition
                | Code::InvalidArgument
                | Code::NotFound
                | Code::PermissionDenied
                | Code::Unauthenticated
                // A quota. An overloaded sidecar answers UNAVAILABLE.
                | Code::ResourceExhausted
        );
        match called {
            Called::Api(Method::CheckAndLock) => {
                Some(Self::Claimed(if rejected { ClaimLabel::Rejected } else { ClaimLabel::Failed }))
            }
            Called::Api(Method::MarkCompleted | Method::MarkFailed) => Some(Self::Marked(match code {
                Code::Aborted => MarkLabel::LockLost,
                _ if rejected => MarkLabel::Rejected,
                _ => MarkLabel::Failed,
            })),
            _ => None,
        }
    }
}

/// What the sidecar counts.
#[derive(Debug)]
pub(crate) struct Metrics {
    rpcs: Counters<(Called, CodeLabel)>,
    rpc_seconds: Box<[Histogram]>,
    claims: Counters<ClaimLabel>,
    attempts: Counters<AttemptLabel>,
    marks: Counters<MarkLabel>,
    processing: [Histogram; EndLabel::ALL.len()],
    resolutions: Counters<ResolvedTo>,
    /// Keys of completions' metadata that were left out: too large, or no JSON.
    pub(crate) metadata_left_out: Counter,
    /// Calls whose payload digest differs from that of the event's latest attempt.
    pub(crate) payload_changes: Counter,
    /// Calls without known credentials.
    pub(crate) unauthenticated: Counter,
    /// Calls by a known caller that its role or tenants do not permit.
    pub(crate) permission_denied: Counter,
    /// Calls beyond a tenant's quota.
    pub(crate) quota_exceeded: Counter,
    events: [Gauge; State::ALL.len()],
    stuck: Gauge,
    abandoned: Gauge,
    counted: Gauge,
    cleanups: Counters<CleanupEnd>,
    cleaned: Counter,
    cleanup_time: Gauge,
    /// What the ledger counts.
    pub(crate) ledger: Arc<LedgerMetrics>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            rpcs: Counters::default(),
            rpc_seconds: Method::ALL.iter().map(|_| Histogram::new(&RPC_SECONDS)).collect(),
            claims: Counters::default(),
            attempts: Counters::default(),
            marks: Counters::default(),
            processing: [Histogram::new(&PROCESSING), Histogram::new(&PROCESSING)],
            resolutions: Counters::default(),
            metadata_left_out: Counter::new(),
            payload_changes: Counter::new(),
            unauthenticated: Counter::new(),
            permission_denied: Counter::new(),
            quota_exceeded: Counter::new(),
            events: Default::default(),
            stuck: Gauge::default(),
            abandoned: Gauge::default(),
            counted: Gauge::default(),
            cleanups: Counters::default(),
            cleaned: Counter::new(),
            cleanup_time: Gauge::default(),
            ledger: Arc::default(),
        }
    }
}

/// Values kept elsewhere and read when the page is rendered.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gauges {
    pub(crate) occupancy: Occupancy,
    pub(crate) is_breaker_open: bool,
    pub(crate) is_ledger_up: bool,
    pub(crate) durability_warnings: usize,
    /// None: there are no such files.
    pub(crate) certificates: Option<Counts>,
    pub(crate) identities: Option<Counts>,
    pub(crate) database: Option<Counts>,
}

impl Metrics {
    /// A call was answered, or given up by its caller.
    pub(crate) fn answered(&self, called: Called, code: Code, told: Option<Told>, took: Duration) {
        self.rpcs.add((called, code.into()));
        if let Called::Api(method) = called {
            self.rpc_seconds[method as usize].observe(took);
        }
        match told {
            Some(Told::Claimed(claimed)) => self.claims.add(claimed),
            Some(Told::Marked(marked)) => self.marks.add(marked),
            None => {}
        }
    }

    /// A lock was granted.
    pub(crate) fn granted(&self, attempt_count: i32) {
        self.attempts.add(if attempt_count > 1 { AttemptLabel::Retry } else { AttemptLabel::First });
    }

    /// A mark was recorded, not for the first time if `repeated`.
    pub(crate) fn marked(&self, event: &Event, repeated: bool) -> Told {
        let Some(latest) = event.latest.as_ref().filter(|_| !repeated) else {
            return Told::Marked(MarkLabel::Repeated);
        };
        let (marked, end) = match latest.outcome {
            Outcome::Completed => (MarkLabel::Completed, EndLabel::Completed),
            Outcome::FailedTerminal => (MarkLabel::Terminal, EndLabel::Failed),
            Outcome::FailedUnknown => (MarkLabel::Unknown, EndLabel::Failed),
            Outcome::FailedRetryable => (MarkLabel::Retryable, EndLabel::Failed),
            // No mark results in these.
            Outcome::Running | Outcome::LockExpired => return Told::Marked(MarkLabel::Failed),
        };
        self.processing[end as usize].observe(event.update_time.since(latest.start_time).to_std());
        Told::Marked(marked)
    }

    /// An event was resolved manually.
    pub(crate) fn resolved(&self, to: Resolved) {
        self.resolutions.add(match to {
            Resolved::Pending => ResolvedTo::Pending,
            Resolved::Completed => ResolvedTo::Completed,
            Resolved::Dead => ResolvedTo::Dead,
        });
    }

    /// The events were counted, in buckets. What is in one before `young` comes no more by itself.
    pub(crate) fn counted(&self, report: &StatsReport, young: Time) {
        for (gauge, state) in self.events.iter().zip(State::ALL) {
            gauge.set(report.counts.values().map(|counts| counts[state]).sum());
        }
        self.stuck.set(report.counts.values().map(|counts| counts.stuck).sum());
        let old = report.counts.iter().filter(|((bucket, _), _)| *bucket < young);
        self.abandoned.set(old.map(|(_, counts)| counts[State::Failed] + counts[State::Pending]).sum());
        self.counted.set(now());
    }

    /// A Cleanup has deleted this many more events.
    pub(crate) fn cleaned(&self, deleted: i64) {
        self.cleaned.add_many(u64::try_from(deleted).unwrap_or(0));
    }

    /// A Cleanup has ended.
    pub(crate) fn cleanup_ended(&self, end: CleanupEnd) {
        self.cleanups.add(end);
        if end == CleanupEnd::Done {
            self.cleanup_time.set(now());
        }
    }

    /// Everything that is counted.
    pub(crate) fn render(&self, cache: &CacheStats, gauges: &Gauges) -> String {
        let mut page = Page::new();
        page.counters(&RPCS, &self.rpcs);
        let mut seconds = page.family(&RPC_SECONDS);
        for method in Method::ALL {
            seconds.histogram(&[method.name()], &self.rpc_seconds[*method as usize]);
        }
        page.counters(&CLAIMS, &self.claims);
        page.counters(&ATTEMPTS, &self.attempts);
        page.counters(&MARKS, &self.marks);
        let mut processing = page.family(&PROCESSING);
        for end in EndLabel::ALL {
            processing.histogram(&[end.name()], &self.processing[*end as usize]);
        }
        page.counters(&RESOLUTIONS, &self.resolutions);
        let Occupancy { calls, calls_max, waiting, waiting_max, refused } = gauges.occupancy;
        let mut overloaded = page.family(&OVERLOADED);
        overloaded.row(&["calls"], refused);
        overloaded.row(&["queue"], &self.ledger.refused);
        page.single(&CALLS, calls);
        page.single(&CALLS_MAX, calls_max);
        page.single(&WAITING, waiting);
        page.single(&WAITING_MAX, waiting_max);
        page.single(&METADATA_LEFT_OUT, &self.metadata_left_out);
        page.single(&PAYLOAD_CHANGES, &self.payload_changes);
        page.single(&UNAUTHENTICATED, &self.unauthenticated);
        page.single(&DENIED, &self.permission_denied);
        page.single(&OVER_QUOTA, &self.quota_exceeded);
        let files =
            [("certificates", gauges.certificates), ("identities", gauges.identities), ("database", gauges.database)];
        let files = files.into_iter().filter_map(|(files, counts)| Some((files, counts?)));
        let mut reloads = page.family(&RELOADS);
        for (files, counts) in files.clone() {
            reloads.row(&[files, "replaced"], counts.replaced);
            reloads.row(&[files, "failed"], counts.failed);
        }
        let mut failing = page.family(&RELOAD_FAILING);
        for (files, counts) in files {
            failing.row(&[files], counts.failing);
        }
        let mut lookups = page.family(&CACHE);
        for (layer, result, count) in cache.lookups() {
            lookups.row(&[layer, result], count);
        }
        let mut refused = page.family(&CACHE_REFUSED);
        for (reason, count) in cache.refused() {
            refused.row(&[reason], count);
        }
        page.single(&CACHE_LOST, &cache.redis_writes_lost);
        page.single(&BREAKER, gauges.is_breaker_open);
        // Before the first count, a zero would look as if the events were gone and then came back.
        let counted = self.counted.get() != 0;
        let mut events = page.family(&EVENTS);
        for (state, count) in State::ALL.iter().zip(&self.events).filter(|_| counted) {
            events.row(&[state.as_str()], count);
        }
        let mut stuck = page.family(&STUCK);
        if counted {
            stuck.row(&[], &self.stuck);
        }
        let mut abandoned = page.family(&ABANDONED);
        if counted {
            abandoned.row(&[], &self.abandoned);
        }
        page.single(&COUNTED, &self.counted);
        page.counters(&CLEANUPS, &self.cleanups);
        page.single(&CLEANED, &self.cleaned);
        page.single(&CLEANUP_TIME, &self.cleanup_time);
        self.ledger.render(&mut page, gauges.is_ledger_up, gauges.durability_warnings);
        page.finish()
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ledger::filter::Counts as CountsOfEvents;

    #[test]
    fn codes_have_the_names_of_their_numbers() {
        for (code, name) in [
            (Code::Ok, "OK"),
            (Code::Aborted, "ABORTED"),
            (Code::Unavailable, "UNAVAILABLE"),
            (Code::Unauthenticated, "UNAUTHENTICATED"),
        ] {
            assert_eq!(CodeLabel::from(code).name(), name);
        }
    }

    fn report(counts: BTreeMap<(Time, String), CountsOfEvents>) -> StatsReport {
        StatsReport { counts, percentiles: BTreeMap::new(), timings: BTreeMap::new(), as_of: Time(0) }
    }

    #[test]
    fn old_events_that_failed_or_wait_are_abandoned() {
        let metrics = Metrics::default();
        let counts = CountsOfEvents { states: [1, 2, 4, 8, 16, 32], ..CountsOfEvents::default() };
        let counts = [Time(0), Time(7)].map(|bucket| ((bucket, String::new()), counts));
        metrics.counted(&report(counts.into_iter().collect()), Time(7));
        let page = metrics.render(&CacheStats::default(), &Gauges::default());
        let row = |name: &str| page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        assert_eq!(row("oncegate_events_abandoned"), Some(1 + 8));
        assert_eq!(row("oncegate_events{state=\"failed\"}"), Some(16));
    }

    #[test]
    fn nothing_is_told_of_events_before_they_were_counted() {
        let metrics = Metrics::default();
        let rows = || {
            let page = metrics.render(&CacheStats::default(), &Gauges::default());
            page.lines()
                .filter(|line| {
                    ["oncegate_events{", "oncegate_events_stuck ", "oncegate_events_abandoned "]
                        .iter()
                        .any(|row| line.starts_with(row))
                })
                .count()
        };
        assert_eq!(rows(), 0);
        metrics.counted(&report(BTreeMap::new()), Time(0));
        assert_eq!(rows(), State::ALL.len() + 2);
    }

    #[test]
    fn a_claim_beyond_its_quota_is_refused_by_a_rule_and_no_failure() {
        let told = |code| Told::of_error(Called::Api(Method::CheckAndLock), code);
        assert_eq!(told(Code::ResourceExhausted), Some(Told::Claimed(ClaimLabel::Rejected)));
        for code in [Code::Unavailable, Code::DeadlineExceeded, Code::Cancelled, Code::Internal] {
            assert_eq!(told(code), Some(Told::Claimed(ClaimLabel::Failed)), "{code:?}");
        }
    }

    #[test]
    fn i11_every_claim_has_one_decision() {
        let (metrics, called) = (Metrics::default(), Called::Api(Method::CheckAndLock));
        for code in 0..17 {
            let code = Code::from(code);
            metrics.answered(called, code, Told::of_error(called, code), Duration::ZERO);
        }
        let decided: u64 = ClaimLabel::ALL.iter().map(|claimed| metrics.claims.get(*claimed)).sum();
        assert_eq!(decided, 17);
    }
}
