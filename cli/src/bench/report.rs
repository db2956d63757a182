//! The results, for programs and for people.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::tally::{Correctness, Tally};
use crate::output::{self, Column};

/// The result of a run. Programs read it: fields are added, and never change their meaning.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) target: &'static str,
    pub(super) url: String,
    pub(super) workload: &'static str,
    pub(super) concurrency: u32,
    pub(super) connections: u32,
    pub(super) threads: u32,
    /// The measured time.
    seconds: f64,
    /// Whether a signal ended the measurement before its time.
    interrupted: bool,
    operations: Vec<Line>,
    /// Failed calls by code, the warm-up included.
    errors: BTreeMap<String, u64>,
    correctness: Findings,
    #[serde(skip)]
    is_wrong: bool,
    /// The same in words, for people.
    #[serde(skip)]
    judgement: &'static str,
}

/// The description of a run, for its report.
pub(super) struct About {
    pub(super) target: &'static str,
    pub(super) url: String,
    pub(super) workload: &'static str,
    pub(super) concurrency: u32,
    pub(super) connections: u32,
    pub(super) threads: u32,
}

#[derive(Debug, Serialize)]
struct Line {
    operation: &'static str,
    count: u64,
    per_second: f64,
    mean_ms: f64,
    p50_ms: f64,
    p90_ms: f64,
    p99_ms: f64,
    p99_9_ms: f64,
    max_ms: f64,
}

#[derive(Debug, Serialize)]
struct Findings {
    ok: bool,
    completions_acknowledged: u64,
    completions_checked: u64,
    completions_not_checked: u64,
    /// By --check-max: what was asked for again is a random sample of each caller's.
    completions_left_out: u64,
    lost: u64,
    double_grants: u64,
    not_prepared: u64,
    unexpected_answers: u64,
    storms: u64,
    storms_without_winner: u64,
}

impl Report {
    pub(super) fn new(about: About, tally: Tally, measured: Duration, interrupted: bool) -> Self {
        let seconds = measured.as_secs_f64();
        let operations = tally
            .latencies
            .iter()
            .map(|(operation, latencies)| Line::new(operation.name(), latencies, seconds))
            .collect();
        let About { target, url, workload, concurrency, connections, threads } = about;
        Self {
            target,
            url,
            workload,
            concurrency,
            connections,
            threads,
            seconds,
            interrupted,
            operations,
            errors: tally.errors,
            is_wrong: tally.correctness.is_wrong(),
            judgement: judgement(&tally.correctness),
            correctness: Findings::new(&tally.correctness),
        }
    }

    /// Whether something was answered wrongly.
    pub(super) fn is_wrong(&self) -> bool {
        self.is_wrong
    }

    /// Whether the run counts: something was answered, and nothing was answered wrongly.
    pub(super) fn is_good(&self) -> bool {
        self.correctness.ok && !self.operations.is_empty()
    }

    pub(super) fn show(&self) {
        let Self { url, workload, concurrency, connections, threads, seconds, .. } = self;
        output::line(format_args!(
            "{workload} at {url}: {concurrency} callers on {connections} connections, {threads} threads, {seconds:.1} s"
        ));
        let ms = |value: f64| format!("{value:.3}");
        let rows = self.operations.iter().map(|line| {
            vec![
                line.operation.to_owned(),
                line.count.to_string(),
                format!("{:.0}", line.per_second),
                ms(line.p50_ms),
                ms(line.p90_ms),
                ms(line.p99_ms),
                ms(line.p99_9_ms),
                ms(line.max_ms),
            ]
        });
        output::table(
            &[
                Column::Text("operation"),
                Column::Number("count"),
                Column::Number("per second"),
                Column::Number("p50 ms"),
                Column::Number("p90 ms"),
                Column::Number("p99 ms"),
                Column::Number("p99.9 ms"),
                Column::Number("max ms"),
            ],
            rows,
        );
        for (code, count) in &self.errors {
            output::line(format_args!("error: {count} × {code}"));
        }
        let Findings {
            ok: _,
            completions_acknowledged,
            completions_checked,
            completions_not_checked,
            completions_left_out,
            lost,
            double_grants,
            not_prepared: _,
            unexpected_answers,
            storms,
            storms_without_winner,
        } = &self.correctness;
        output::line(format_args!(
            "{}: {completions_acknowledged} completions acknowledged, {completions_checked} asked for again, \
             {completions_not_checked} not to be asked for, {lost} lost, {double_grants} granted twice, {unexpected_answers} answered wrongly",
            self.judgement
        ));
        if *completions_left_out > 0 {
            output::line(format_args!(
                "--check-max left out {completions_left_out} completions: what was asked for again is a random sample of each \
                 caller's"
            ));
        }
        if *storms > 0 {
            output::line(format_args!("{storms} storms, {storms_without_winner} without a winner"));
        }
        self.complain();
    }

    /// What keeps the result from being one.
    pub(super) fn complain(&self) {
        let not_prepared = self.correctness.not_prepared;
        if not_prepared > 0 {
            output::complain(format_args!(
                "these events were not prepared: {not_prepared} of those that duplicates were to be sent of had not been \
                 completed. --run has to name an earlier run with at least as many --keys, and without --prepared"
            ));
        }
        if self.interrupted {
            output::complain("a signal cut the measurement short: the result is of what there was until then");
        }
        if self.operations.is_empty() {
            output::complain("nothing was answered within the measured time");
        }
    }
}

impl Line {
    fn new(operation: &'static str, latencies: &Histogram<u64>, seconds: f64) -> Self {
        let ms = |nanos: u64| round(nanos as f64 / 1e6, 4);
        let quantile = |quantile: f64| ms(latencies.value_at_quantile(quantile));
        Self {
            operation,
            count: latencies.len(),
            per_second: if seconds > 0.0 { round(latencies.len() as f64 / seconds, 1) } else { 0.0 },
            mean_ms: round(latencies.mean() / 1e6, 4),
            p50_ms: quantile(0.5),
            p90_ms: quantile(0.9),
            p99_ms: quantile(0.99),
            p99_9_ms: quantile(0.999),
            max_ms: ms(latencies.max()),
        }
    }
}

impl Findings {
    fn new(correctness: &Correctness) -> Self {
        Self {
            ok: correctness.holds(),
            completions_acknowledged: correctness.acknowledged,
            completions_checked: correctness.checked,
            completions_not_checked: correctness.unchecked,
            completions_left_out: correctness.left_out,
            lost: correctness.lost,
            double_grants: correctness.double_grants,
            not_prepared: correctness.unprepared,
            unexpected_answers: correctness.unexpected,
            storms: correctness.storms,
            storms_without_winner: correctness.storms_without_winner,
        }
    }
}

fn judgement(correctness: &Correctness) -> &'static str {
    match correctness {
        correctness if correctness.is_wrong() => "NOT CORRECT",
        Correctness { unprepared: 1.., .. } => "not what was to be measured",
        Correctness { unchecked: 1.., .. } => "could not be checked",
        Correctness { left_out: 1.., checked: 0, .. } => "not checked",
        _ => "correct",
    }
}

fn round(value: f64, digits: i32) -> f64 {
    let factor = 10_f64.powi(digits);
    (value * factor).round() / factor
}
