//! What is counted. One file with every name, so that the exporter can change without a search.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::providers::Refusal;

/// Outcomes of deliveries, as labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivered {
    Completed,
    Retryable,
    Terminal,
    Unknown,
}

impl Delivered {
    const ALL: [Self; 4] = [Self::Completed, Self::Retryable, Self::Terminal, Self::Unknown];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Retryable => "retryable",
            Self::Terminal => "terminal",
            Self::Unknown => "unknown",
        }
    }
}

/// The words of the answers, as labels: a closed list, so that no request can make a series (pitfalls 3.5.4).
pub(crate) const WORDS: [&str; 18] = [
    "processed",
    "already_processed",
    "failed",
    "in_progress",
    "paused",
    "held",
    "conflict",
    "unauthorized",
    "too_many_failures",
    "malformed_body",
    "malformed_request",
    "too_slow",
    "too_large",
    "encoded",
    "not_found",
    "method_not_allowed",
    "overloaded",
    "unavailable",
];

/// The counters of one gateway.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    answers: [AtomicU64; WORDS.len()],
    refusals: [AtomicU64; Refusal::ALL.len()],
    /// By the answer that enforcing would have given.
    observed: [AtomicU64; WORDS.len()],
    deliveries: [AtomicU64; Delivered::ALL.len()],
    /// Calls to the sidecar that were sent again because nobody knew how the first ended (G9).
    pub(crate) claims_repeated: AtomicU64,
    pub(crate) marks_repeated: AtomicU64,
    /// Locks that were lost before their attempt was marked.
    pub(crate) locks_lost: AtomicU64,
    /// Files with secrets that were taken over, and those that could not be.
    reloads: [AtomicU64; RELOADS.len()],
    /// Events accepted that prove nothing about their body (G11).
    pub(crate) weak: AtomicU64,
}

const RELOADS: [&str; 2] = ["replaced", "failed"];

impl Metrics {
    pub(crate) fn answered(&self, word: &str) {
        if let Some(index) = WORDS.iter().position(|known| *known == word) {
            self.answers[index].fetch_add(1, Relaxed);
        }
    }

    /// Delivered while its route only observes, where enforcing would have answered `word`.
    pub(crate) fn observed(&self, word: &str) {
        if let Some(index) = WORDS.iter().position(|known| *known == word) {
            self.observed[index].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn refused(&self, refusal: Refusal) {
        if let Some(index) = Refusal::ALL.iter().position(|known| *known == refusal) {
            self.refusals[index].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn delivered(&self, outcome: Delivered) {
        if let Some(index) = Delivered::ALL.iter().position(|known| *known == outcome) {
            self.deliveries[index].fetch_add(1, Relaxed);
        }
    }

    /// A file with secrets changed.
    pub(crate) fn reloaded(&self, usable: bool) {
        self.reloads[usize::from(!usable)].fetch_add(1, Relaxed);
    }

    /// The Prometheus text format.
    pub(crate) fn render(&self, deliveries_under_way: usize, body_budget_left_kib: usize) -> String {
        let mut text = String::with_capacity(4_096);
        let mut family = |name: &str, kind: &str, help: &str, rows: &mut dyn Iterator<Item = (String, u64)>| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in rows {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let label = |key: &str, value: &str| format!("{{{key}=\"{value}\"}}");
        family(
            "oncegate_gateway_answers_total",
            "counter",
            "Webhooks answered, by the word of the answer.",
            &mut WORDS.iter().zip(&self.answers).map(|(word, count)| (label("answer", word), count.load(Relaxed))),
        );
        family(
            "oncegate_gateway_observed_total",
            "counter",
            "Webhooks delivered without a lock because their route only observes, by the answer that they would have got.",
            &mut WORDS.iter().zip(&self.observed).map(|(word, count)| (label("answer", word), count.load(Relaxed))),
        );
        family(
            "oncegate_gateway_refusals_total",
            "counter",
            "Webhooks whose signature was refused, by verdict.",
            &mut Refusal::ALL
                .iter()
                .zip(&self.refusals)
                .map(|(refusal, count)| (label("verdict", refusal.name()), count.load(Relaxed))),
        );
        family(
            "oncegate_gateway_deliveries_total",
            "counter",
            "Deliveries to the application, by outcome.",
            &mut Delivered::ALL
                .iter()
                .zip(&self.deliveries)
                .map(|(outcome, count)| (label("outcome", outcome.name()), count.load(Relaxed))),
        );
        family(
            "oncegate_gateway_secret_reloads_total",
            "counter",
            "Files with secrets that changed: replaced, or failed and the old secrets kept.",
            &mut RELOADS
                .iter()
                .zip(&self.reloads)
                .map(|(result, count)| (label("result", result), count.load(Relaxed))),
        );
        let mut single = |name: &str, kind: &str, help: &str, value: u64| {
            family(name, kind, help, &mut std::iter::once((String::new(), value)));
        };
        single(
            "oncegate_gateway_claims_repeated_total",
            "counter",
            "CheckAndLock calls sent again because the outcome was unknown.",
            self.claims_repeated.load(Relaxed),
        );
        single(
            "oncegate_gateway_marks_repeated_total",
            "counter",
            "Mark calls sent again because they were not answered.",
            self.marks_repeated.load(Relaxed),
        );
        single(
            "oncegate_gateway_locks_lost_total",
            "counter",
            "Locks that were lost before their attempt was marked.",
            self.locks_lost.load(Relaxed),
        );
        single(
            "oncegate_gateway_weak_events_total",
            "counter",
            "Events accepted on a header that repeats the secret and proves nothing about the body (Flutterwave v3).",
            self.weak.load(Relaxed),
        );
        let gauge = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        single(
            "oncegate_gateway_deliveries_under_way",
            "gauge",
            "Events between verification and answer or mark.",
            gauge(deliveries_under_way),
        );
        single(
            "oncegate_gateway_body_budget_left_kibibytes",
            "gauge",
            "What is left of the budget for bodies.",
            gauge(body_budget_left_kib),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_appear_under_their_labels() {
        let metrics = Metrics::default();
        metrics.answered("held");
        metrics.answered("not a word");
        metrics.refused(Refusal::BadSignature);
        metrics.delivered(Delivered::Unknown);
        let text = metrics.render(3, 64);
        for line in [
            "oncegate_gateway_answers_total{answer=\"held\"} 1",
            "oncegate_gateway_answers_total{answer=\"processed\"} 0",
            "oncegate_gateway_refusals_total{verdict=\"bad_signature\"} 1",
            "oncegate_gateway_deliveries_total{outcome=\"unknown\"} 1",
            "oncegate_gateway_deliveries_under_way 3",
            "oncegate_gateway_body_budget_left_kibibytes 64",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
