//! `oncegate check`.

use jiff::Timestamp;
use oncegate_sidecar::{
    config::Store,
    ledger::check::{Difference, Report},
};
use serde::Serialize;

use crate::{
    failure::Failure,
    message,
    output::{self, Column},
};

/// Compare the counts that Stats answers from with the events
///
/// Reads every event of the database that DATABASE_URL names, or of ./oncegate.db where none is named, and compares counts
/// and percentiles with those that the service keeps. Counts have to be equal; percentiles may differ by the histograms'
/// error of 1.6 %, and there has to be a time for each completion. Not so in hours that a Cleanup has passed, where times
/// outlive their events, and whose percentiles are not compared. In Postgres so many may be missing as completions ended in the
/// last ten seconds and in the busiest two, or one in twenty: a process that is killed loses those of a second. Works on one
/// snapshot, beside a running service, which it does not go through: a large table takes
/// a while, and needs a database that is written to: its list of events is a temporary table. Exits with 1 when something
/// differs. Changes nothing.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  DATABASE_URL=postgres://oncegate@db.example.com/payments oncegate check
  oncegate check --store ./oncegate.db --json")]
pub(crate) struct Check {
    #[command(flatten)]
    store: oncegate_sidecar::config::StoreOptions,

    /// Show what was found as JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let store = self.store.validate()?;
        let report = oncegate_sidecar::check(&store).await?;
        if self.json {
            output::json(&Document::from(&report));
        } else {
            show(&store, &report);
        }
        if report.differences.is_empty() { Ok(()) } else { Err(Failure::NotAsItShouldBe) }
    }
}

fn show(store: &Store, report: &Report) {
    if !report.differences.is_empty() {
        let columns = [
            Column::Text("tenant"),
            Column::Text("provider"),
            Column::Text("hour"),
            Column::Text("what"),
            Column::Number("kept"),
            Column::Number("recounted"),
        ];
        let rows = report.differences.iter().map(|difference| {
            let (kept, recounted) = shown(difference);
            vec![
                difference.tenant.clone(),
                difference.provider.clone(),
                hour(difference).unwrap_or_else(|| "all".into()),
                difference.what.clone(),
                kept,
                recounted,
            ]
        });
        output::table(&columns, rows);
    }
    output::line(format_args!(
        "{store}: {} events in {} tenants, providers and hours: {}",
        report.events,
        report.places,
        match report.differences.len() {
            0 => "all counts and percentiles agree".to_owned(),
            1 => "1 difference".to_owned(),
            count => format!("{count} differences"),
        }
    ));
    if report.completions != report.times {
        output::line(format_args!(
            "{} completions in the events, {} times in the histograms; without a difference that is because a cleanup takes \
             events before their times, and a process that is killed loses the times of a second",
            report.completions, report.times
        ));
    }
}

/// Counts as numbers, times in words.
fn shown(difference: &Difference) -> (String, String) {
    let show = |value: i64| match difference.hour {
        Some(_) => value.to_string(),
        None => message::length_in_words(jiff::SignedDuration::from_micros(value)),
    };
    (show(difference.kept), show(difference.recounted))
}

fn hour(difference: &Difference) -> Option<String> {
    let time = Timestamp::from_microsecond(difference.hour?.0).ok()?;
    Some(time.to_string())
}

/// What was found, for programs. Percentiles in microseconds.
#[derive(Debug, Serialize)]
struct Document<'r> {
    events: i64,
    places: usize,
    completions: i64,
    times: i64,
    differences: Vec<Entry<'r>>,
}

#[derive(Debug, Serialize)]
struct Entry<'r> {
    tenant: &'r str,
    provider: &'r str,
    hour: Option<String>,
    what: &'r str,
    kept: i64,
    recounted: i64,
}

impl<'r> From<&'r Report> for Document<'r> {
    fn from(report: &'r Report) -> Self {
        let differences = report.differences.iter().map(|difference| Entry {
            tenant: &difference.tenant,
            provider: &difference.provider,
            hour: hour(difference),
            what: &difference.what,
            kept: difference.kept,
            recounted: difference.recounted,
        });
        Self {
            events: report.events,
            places: report.places,
            completions: report.completions,
            times: report.times,
            differences: differences.collect(),
        }
    }
}
