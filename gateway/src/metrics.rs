//! The gateway's metrics. Every name, label, unit and bucket stands here; `docs/metrics.md` says what they mean, and a test
//! compares the two. Routes and providers are named by the configuration; nothing from a request becomes a label.

use std::{sync::Arc, time::Duration};

use oncegate_runtime::{
    labels,
    metrics::{Counter, Counters, Family, Gauge, Histogram, Label, Page},
    reload::Counts,
};

use crate::{
    answer::{Answer, Word},
    enforcement::Enforcement,
    providers::{Provider, ProviderKind, Refusal, Verdict},
    route::Route,
};

/// Up to the deadline of an answer, 20 s. 5 s is the bound of an alert.
const REQUEST_SECONDS: &[f64] =
    &[0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0];
/// Up to the upstream's time-out, 240 s.
const UPSTREAM_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0];

const ANSWERS: Family = Family::counter(
    "oncegate_gateway_answers_total",
    &["route", "answer"],
    "Requests answered, by route (none: no such route) and the word of the answer.",
);
const REQUEST: Family = Family::histogram(
    "oncegate_gateway_request_duration_seconds",
    &["route"],
    REQUEST_SECONDS,
    "How long requests on a route took until their answer.",
);
const OBSERVED: Family = Family::counter(
    "oncegate_gateway_observed_total",
    &["answer"],
    "Webhooks delivered without a lock because their route only observes, by the answer that they would have got.",
);
const OBSERVING: Family = Family::gauge(
    "oncegate_gateway_observing",
    &["route"],
    "1 while a route only observes, and delivers what it would refuse; 0 while it enforces.",
);
const REFUSALS: Family = Family::counter(
    "oncegate_gateway_refusals_total",
    &["provider", "verdict"],
    "Webhooks whose signature was refused, by verdict.",
);
const SECRETS: Family = Family::counter(
    "oncegate_gateway_secrets_matched_total",
    &["provider", "secret"],
    "Webhooks accepted, by the place of the secret that matched in its list: when an old one matches no more, it can go.",
);
const WEBHOOKS: Family = Family::counter(
    "oncegate_gateway_webhooks_total",
    &["provider"],
    "Verified webhooks. Those whose claim is decided are in oncegate_gateway_claims_total, exactly once each.",
);
const CLAIMS: Family = Family::counter(
    "oncegate_gateway_claims_total",
    &["provider", "decision"],
    "Verified webhooks by what was decided: acquired, duplicate, in_progress, rejected or failed.",
);
const DELIVERIES: Family = Family::counter(
    "oncegate_gateway_deliveries_total",
    &["provider", "outcome"],
    "Attempts at the application, by outcome.",
);
const UPSTREAM: Family = Family::histogram(
    "oncegate_gateway_upstream_duration_seconds",
    &["provider"],
    UPSTREAM_SECONDS,
    "How long the application took to answer, or not to.",
);
const RELOADS: Family = Family::counter(
    "oncegate_gateway_secret_reloads_total",
    &["result"],
    "Files with secrets, with the listener's certificate, and of ONCEGATE_CONFIG, that changed: replaced (of the last, \
     once for each route that it switches), or failed and what was in force kept.",
);
const RELOAD_FAILING: Family = Family::gauge(
    "oncegate_gateway_secret_reload_failing",
    &[],
    "Files with secrets, with the listener's certificate, and of ONCEGATE_CONFIG, that cannot be read again now; what was in \
     force is kept.",
);
const CLAIMS_UNKNOWN: Family = Family::counter(
    "oncegate_gateway_claims_unknown_total",
    &[],
    "CheckAndLock calls that ended without anybody knowing whether the lock was granted.",
);
const CLAIMS_REPEATED: Family = Family::counter(
    "oncegate_gateway_claims_repeated_total",
    &[],
    "CheckAndLock calls sent again because the outcome was unknown.",
);
const MARKS_REPEATED: Family = Family::counter(
    "oncegate_gateway_marks_repeated_total",
    &[],
    "Mark calls sent again because they were not answered.",
);
const LOCKS_LOST: Family =
    Family::counter("oncegate_gateway_locks_lost_total", &[], "Locks that were lost before their attempt was marked.");
const WEAK: Family = Family::counter(
    "oncegate_gateway_weak_events_total",
    &[],
    "Events accepted on a header that repeats the secret and proves nothing about the body (Flutterwave v3).",
);
const UNDER_WAY: Family =
    Family::gauge("oncegate_gateway_deliveries_under_way", &[], "Events between verification and answer or mark.");
const UNDER_WAY_MAX: Family =
    Family::gauge("oncegate_gateway_deliveries_max", &[], "Events under way beyond which webhooks are refused.");
const CONNECTIONS_REFUSED: Family = Family::counter(
    "oncegate_gateway_connections_refused_total",
    &[],
    "Connections closed at once because their address had as many as it may (GATEWAY_CONNECTIONS_PER_ADDRESS).",
);
const BUDGET: Family =
    Family::gauge("oncegate_gateway_body_budget_left_bytes", &[], "What is left of the budget for bodies.");
const BUDGET_MAX: Family =
    Family::gauge("oncegate_gateway_body_budget_bytes", &[], "The budget for bodies under way together.");

const ADDRESSES: Family =
    Family::gauge("oncegate_gateway_sidecar_addresses", &[], "Addresses of sidecars that are known.");
const RETRIES: Family = Family::counter(
    "oncegate_gateway_sidecar_retries_total",
    &[],
    "Calls sent again, to another sidecar where there is one.",
);
const RETRIES_REFUSED: Family = Family::counter(
    "oncegate_gateway_sidecar_retries_refused_total",
    &[],
    "Calls not sent again because the budget for retries was used up.",
);
const RESOLUTIONS_FAILED: Family = Family::counter(
    "oncegate_gateway_sidecar_resolutions_failed_total",
    &[],
    "Resolutions of the sidecar's name that failed; the addresses known were kept.",
);

const SIDECAR_RELOADS: Family = Family::counter(
    "oncegate_gateway_sidecar_reloads_total",
    &["files", "result"],
    "Files (certificates, token) for calls to the sidecar that changed: replaced, or failed and the old content kept.",
);

const SIDECAR_RELOAD_FAILING: Family = Family::gauge(
    "oncegate_gateway_sidecar_reload_failing",
    &["files"],
    "1 while files (certificates, token) for calls to the sidecar cannot be read again, and the old content is kept.",
);

/// The metrics of the connections to sidecars. Absent when gateway and sidecar share a process.
pub const POOL_FAMILIES: &[&Family] =
    &[&ADDRESSES, &RETRIES, &RETRIES_REFUSED, &RESOLUTIONS_FAILED, &SIDECAR_RELOADS, &SIDECAR_RELOAD_FAILING];

/// What the connections to sidecars count.
pub(crate) struct PoolCounts<'a> {
    pub(crate) addresses: usize,
    pub(crate) retries: &'a Counter,
    pub(crate) retries_refused: &'a Counter,
    pub(crate) resolutions_failed: &'a Counter,
    /// None: no such files are configured.
    pub(crate) certificates: Option<Counts>,
    pub(crate) token: Option<Counts>,
}

impl PoolCounts<'_> {
    pub(crate) fn render(&self) -> String {
        let mut page = Page::new();
        page.single(&ADDRESSES, self.addresses);
        page.single(&RETRIES, self.retries);
        page.single(&RETRIES_REFUSED, self.retries_refused);
        page.single(&RESOLUTIONS_FAILED, self.resolutions_failed);
        let files = [("certificates", self.certificates), ("token", self.token)];
        let files = files.into_iter().filter_map(|(files, counts)| Some((files, counts?)));
        let mut reloads = page.family(&SIDECAR_RELOADS);
        for (files, counts) in files.clone() {
            reloads.row(&[files, "replaced"], counts.replaced);
            reloads.row(&[files, "failed"], counts.failed);
        }
        let mut failing = page.family(&SIDECAR_RELOAD_FAILING);
        for (files, counts) in files {
            failing.row(&[files], counts.failing);
        }
        page.finish()
    }
}

/// All of the gateway's own.
pub const FAMILIES: &[&Family] = &[
    &ANSWERS,
    &REQUEST,
    &OBSERVED,
    &OBSERVING,
    &REFUSALS,
    &SECRETS,
    &WEBHOOKS,
    &CLAIMS,
    &DELIVERIES,
    &UPSTREAM,
    &RELOADS,
    &RELOAD_FAILING,
    &CLAIMS_UNKNOWN,
    &CLAIMS_REPEATED,
    &MARKS_REPEATED,
    &LOCKS_LOST,
    &WEAK,
    &UNDER_WAY,
    &UNDER_WAY_MAX,
    &CONNECTIONS_REFUSED,
    &BUDGET,
    &BUDGET_MAX,
];

labels! {
    /// Outcomes of deliveries.
    pub(crate) enum OutcomeLabel {
        Completed => "completed",
        Retryable => "retryable",
        Terminal => "terminal",
        Unknown => "unknown",
    }
}

labels! {
    /// What a verified webhook came to at the sidecar (I11).
    pub(crate) enum ClaimLabel {
        /// The lock was granted.
        Acquired => "acquired",
        /// The event is done.
        Duplicate => "duplicate",
        /// Somebody else holds the lock, or a pause has not passed.
        InProgress => "in_progress",
        /// Held for an operator, or first claimed with something else.
        Rejected => "rejected",
        /// Nobody could decide, or there was no room to ask.
        Failed => "failed",
    }
}

impl ClaimLabel {
    /// How a webhook that got no lock is counted, by its answer.
    pub(crate) fn of(answer: &Answer) -> Self {
        match answer {
            Answer::AlreadyProcessed | Answer::Processed => Self::Duplicate,
            Answer::InProgress(..) | Answer::Paused(_) | Answer::Unsettled(_) | Answer::Continues => Self::InProgress,
            Answer::Held(_) | Answer::Conflict => Self::Rejected,
            // Most of them are given before any claim. All are named, so that a new one has to be placed here on purpose.
            Answer::Failed(_)
            | Answer::Unauthorized
            | Answer::TooManyFailures(_)
            | Answer::MalformedBody
            | Answer::MalformedRequest
            | Answer::TooSlow
            | Answer::TooLarge
            | Answer::Encoded
            | Answer::NotFound
            | Answer::MethodNotAllowed(_)
            | Answer::Overloaded
            | Answer::Unavailable(_)
            | Answer::Defect => Self::Failed,
        }
    }
}

labels! {
    enum Reload {
        Replaced => "replaced",
        Failed => "failed",
    }
}

labels! {
    /// The place of a secret in its list.
    enum Place {
        First => "1",
        Second => "2",
        Third => "3",
        Fourth => "4",
        Later => "later",
    }
}

/// What is counted of one route.
#[derive(Debug)]
struct RouteMetrics {
    path: Box<str>,
    answers: Counters<Word>,
    seconds: Histogram,
}

impl RouteMetrics {
    fn new(path: &str) -> Self {
        Self { path: path.into(), answers: Counters::default(), seconds: Histogram::new(&REQUEST) }
    }
}

/// What one gateway counts.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// In the order of the routes.
    routes: Vec<RouteMetrics>,
    /// Requests on no route.
    unrouted: Counters<Word>,
    /// The providers that have a route.
    providers: Vec<ProviderKind>,
    /// By the answer that enforcing would have given.
    observed: Counters<Word>,
    refusals: Counters<(ProviderKind, Verdict)>,
    secrets: Counters<(ProviderKind, Place)>,
    webhooks: Counters<ProviderKind>,
    claims: Counters<(ProviderKind, ClaimLabel)>,
    deliveries: Counters<(ProviderKind, OutcomeLabel)>,
    upstream: Vec<Histogram>,
    reloads: Counters<Reload>,
    reload_failing: Gauge,
    /// Calls to claim that ended without a known outcome (G9).
    pub(crate) claims_unknown: Counter,
    /// Claims that were sent again because an earlier call's outcome is unknown (G9).
    pub(crate) claims_repeated: Counter,
    pub(crate) marks_repeated: Counter,
    /// Locks that were lost before their attempt was marked.
    pub(crate) locks_lost: Counter,
    /// Accepted events whose signature proves nothing about the body (G11).
    pub(crate) weak: Counter,
}

/// Numbers kept elsewhere and read when the page is rendered.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    pub(crate) deliveries: usize,
    pub(crate) deliveries_max: usize,
    pub(crate) connections_refused: u64,
    pub(crate) budget_left_kib: usize,
    pub(crate) budget_kib: usize,
    /// Of the listener's certificate.
    pub(crate) listener: Counts,
}

impl Metrics {
    pub(crate) fn new(routes: &[Route]) -> Self {
        let mut providers: Vec<ProviderKind> = routes.iter().map(|route| route.provider.kind()).collect();
        providers.sort_unstable_by_key(|provider| provider.index());
        providers.dedup_by_key(|provider| provider.index());
        Self {
            routes: routes.iter().map(|route| RouteMetrics::new(&route.path)).collect(),
            unrouted: Counters::default(),
            providers,
            observed: Counters::default(),
            refusals: Counters::default(),
            secrets: Counters::default(),
            webhooks: Counters::default(),
            claims: Counters::default(),
            deliveries: Counters::default(),
            upstream: ProviderKind::ALL.iter().map(|_| Histogram::new(&UPSTREAM)).collect(),
            reloads: Counters::default(),
            reload_failing: Gauge::default(),
            claims_unknown: Counter::new(),
            claims_repeated: Counter::new(),
            marks_repeated: Counter::new(),
            locks_lost: Counter::new(),
            weak: Counter::new(),
        }
    }

    /// A request was answered: on the route at this place, or on none.
    pub(crate) fn answered(&self, route: Option<usize>, word: Word, took: Duration) {
        match route.and_then(|route| self.routes.get(route)) {
            Some(route) => {
                route.answers.add(word);
                route.seconds.observe(took);
            }
            None => self.unrouted.add(word),
        }
    }

    /// Delivered while its route only observes, where enforcing would have answered `word`.
    pub(crate) fn observed(&self, word: Word) {
        self.observed.add(word);
    }

    pub(crate) fn refused(&self, provider: &Provider, refusal: Refusal) {
        self.refusals.add((provider.kind(), refusal.verdict()));
    }

    /// A webhook was verified, with the secret at this place of its list.
    pub(crate) fn verified(&self, provider: &Provider, secret: usize) {
        let place = Place::ALL.get(secret).copied().unwrap_or(Place::Later);
        self.secrets.add((provider.kind(), place));
    }

    /// A verified webhook names an event, and goes on to the sidecar.
    pub(crate) fn admitted(&self, provider: &Provider) {
        self.webhooks.add(provider.kind());
        if provider.is_weak() {
            self.weak.add();
        }
    }

    /// What an admitted webhook came to: exactly once for each.
    pub(crate) fn claimed(&self, provider: &Provider, claimed: ClaimLabel) {
        self.claims.add((provider.kind(), claimed));
    }

    pub(crate) fn delivered(&self, provider: &Provider, outcome: OutcomeLabel) {
        self.deliveries.add((provider.kind(), outcome));
    }

    /// A delivery has ended, whether with an answer or without one.
    pub(crate) fn upstream(&self, provider: &Provider, took: Duration) {
        self.upstream[provider.kind().index()].observe(took);
    }

    /// A file with secrets was read anew, or the file with routes switched a route: once for each such route.
    pub(crate) fn reloaded(&self) {
        self.reloads.add(Reload::Replaced);
    }

    /// Such a file has become unusable, until it is mended.
    pub(crate) fn reload_fails(&self) {
        self.reloads.add(Reload::Failed);
        self.reload_failing.add(1);
    }

    pub(crate) fn reload_mended(&self) {
        self.reload_failing.add(-1);
    }

    /// The Prometheus text format. `routes` are those that are counted here.
    pub(crate) fn render(&self, load: Load, routes: &[Arc<Route>]) -> String {
        let mut page = Page::new();
        let mut answers = page.family(&ANSWERS);
        for route in &self.routes {
            answers.counters(&[&route.path], &route.answers);
        }
        answers.counters(&["none"], &self.unrouted);
        let mut seconds = page.family(&REQUEST);
        for route in &self.routes {
            seconds.histogram(&[&route.path], &route.seconds);
        }
        page.counters(&OBSERVED, &self.observed);
        let mut observing = page.family(&OBSERVING);
        for route in routes {
            observing.row(&[&route.path], route.enforcement.get() == Enforcement::Observe);
        }
        self.by_provider(&mut page, &REFUSALS, &self.refusals);
        self.by_provider(&mut page, &SECRETS, &self.secrets);
        let mut webhooks = page.family(&WEBHOOKS);
        for provider in &self.providers {
            webhooks.row(&[provider.name()], self.webhooks.get(*provider));
        }
        self.by_provider(&mut page, &CLAIMS, &self.claims);
        self.by_provider(&mut page, &DELIVERIES, &self.deliveries);
        let mut upstream = page.family(&UPSTREAM);
        for provider in &self.providers {
            upstream.histogram(&[provider.name()], &self.upstream[provider.index()]);
        }
        let mut reloads = page.family(&RELOADS);
        for (result, of_listener) in
            [(Reload::Replaced, load.listener.replaced), (Reload::Failed, load.listener.failed)]
        {
            reloads.row(&[result.name()], self.reloads.get(result) + of_listener);
        }
        page.single(&RELOAD_FAILING, self.reload_failing.get() + i64::from(load.listener.failing));
        page.single(&CLAIMS_UNKNOWN, &self.claims_unknown);
        page.single(&CLAIMS_REPEATED, &self.claims_repeated);
        page.single(&MARKS_REPEATED, &self.marks_repeated);
        page.single(&LOCKS_LOST, &self.locks_lost);
        page.single(&WEAK, &self.weak);
        page.single(&UNDER_WAY, load.deliveries);
        page.single(&UNDER_WAY_MAX, load.deliveries_max);
        page.single(&CONNECTIONS_REFUSED, load.connections_refused);
        page.single(&BUDGET, load.budget_left_kib * 1_024);
        page.single(&BUDGET_MAX, load.budget_kib * 1_024);
        page.finish()
    }

    /// A row for each provider with a route and for each value, even if nothing has happened yet: the first event has to
    /// show up as a change.
    fn by_provider<L: Label>(&self, page: &mut Page, family: &Family, counters: &Counters<(ProviderKind, L)>) {
        let mut rows = page.family(family);
        for provider in &self.providers {
            for index in 0..L::COUNT {
                let count = counters.at(provider.index() * L::COUNT + index);
                L::values(index, &mut |value| rows.row(&[provider.name(), value], count));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::providers::stripe::{Stripe, TOLERANCE};

    #[test]
    fn counts_appear_under_their_labels() {
        let stripe = Provider::Stripe(Stripe::new(&[], TOLERANCE));
        let mut metrics = Metrics::new(&[]);
        metrics.providers.push(ProviderKind::Stripe);
        metrics.answered(None, Word::Held, Duration::ZERO);
        metrics.refused(&stripe, Refusal::BadSignature);
        metrics.delivered(&stripe, OutcomeLabel::Unknown);
        metrics.verified(&stripe, 1);
        metrics.verified(&stripe, 17);
        metrics.reloaded();
        metrics.reload_fails();
        let load = Load {
            deliveries: 3,
            deliveries_max: 9,
            connections_refused: 5,
            budget_left_kib: 64,
            budget_kib: 128,
            listener: Counts { replaced: 1, failed: 2, failing: true },
        };
        let text = metrics.render(load, &[]);
        for line in [
            "oncegate_gateway_answers_total{route=\"none\",answer=\"held\"} 1",
            "oncegate_gateway_answers_total{route=\"none\",answer=\"processed\"} 0",
            "oncegate_gateway_refusals_total{provider=\"stripe\",verdict=\"bad_signature\"} 1",
            "oncegate_gateway_refusals_total{provider=\"stripe\",verdict=\"missing_header\"} 0",
            "oncegate_gateway_deliveries_total{provider=\"stripe\",outcome=\"unknown\"} 1",
            "oncegate_gateway_secrets_matched_total{provider=\"stripe\",secret=\"2\"} 1",
            "oncegate_gateway_secrets_matched_total{provider=\"stripe\",secret=\"later\"} 1",
            "oncegate_gateway_secret_reloads_total{result=\"replaced\"} 2",
            "oncegate_gateway_secret_reloads_total{result=\"failed\"} 3",
            "oncegate_gateway_secret_reload_failing 2",
            "oncegate_gateway_deliveries_under_way 3",
            "oncegate_gateway_connections_refused_total 5",
            "oncegate_gateway_body_budget_left_bytes 65536",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
