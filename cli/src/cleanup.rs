//! `oncegate cleanup`.

use clap::builder::NonEmptyStringValueParser;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use oncegate_api::v1::{CleanupRequest, CleanupResponse, State, idempotency_service_client::IdempotencyServiceClient};
use oncegate_gateway::sidecar::Pool;
use serde::Serialize;

use crate::{
    failure::Failure,
    output::{self, Column},
    sidecar_client::Sidecar,
};

/// The template of the bar once its end is known.
const BAR: &str = "{msg} {wide_bar} {human_pos}/{human_len} {eta}";

const DAY: i64 = 24 * 60 * 60;

/// Delete old events
///
/// Deletes events that ended longer ago than --days, in small transactions, without holding up the service. Completed
/// ones only, unless --states says otherwise; never any that are pending or being processed. A deleted event is new
/// again when its webhook comes back: keep events for longer than the provider repeats them. The sidecar refuses less
/// than its minimum retention (RETENTION_MIN, 6 days by default). While there are calls, or other sidecars on the database
/// that may have some, it goes at a twentieth of its speed or less; a --dry-run only beside calls of the sidecar that it asks.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate cleanup --days 30 --dry-run
  oncegate cleanup --days 30 --provider stripe
  oncegate cleanup --days 365 --states completed,dead --json")]
pub(crate) struct Cleanup {
    /// How many days ago an event must have ended
    #[arg(long, default_value_t = 30, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(..=36_500))]
    days: u32,

    /// Only this provider's events
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    provider: Option<String>,

    /// Only this tenant's events
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    tenant: Option<String>,

    /// Which events, by their state. Deleting unknown or dead ones permits a second effect
    #[arg(long, value_enum, value_delimiter = ',', default_value = "completed", value_name = "STATE,...")]
    states: Vec<Ended>,

    /// Count, and delete nothing
    #[arg(long)]
    dry_run: bool,

    /// How many events to delete in one transaction
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=10_000))]
    batch_size: i32,

    #[command(flatten)]
    sidecar: Sidecar,

    /// Show the totals as JSON
    #[arg(long)]
    json: bool,
}

/// The states that Cleanup deletes from.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Ended {
    Completed,
    Failed,
    Unknown,
    Dead,
}

impl From<Ended> for State {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Completed => Self::Completed,
            Ended::Failed => Self::Failed,
            Ended::Unknown => Self::Unknown,
            Ended::Dead => Self::Dead,
        }
    }
}

impl Cleanup {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let mut client = IdempotencyServiceClient::new(self.sidecar.connect().await?);
        let bar = Self::progress_bar();
        if !self.dry_run && !bar.is_hidden() {
            // If somebody is watching, events are counted first: a bar without an end tells them nothing.
            let count =
                self.follow(&mut client, true, |totals| bar.set_position(count_of(totals.matched_count))).await?;
            bar.set_position(0);
            bar.set_length(count_of(count.matched_count));
            bar.set_style(style(BAR));
            bar.set_message("deleting");
        }
        let dry_run = self.dry_run;
        let mut so_far = None;
        let totals = self
            .follow(&mut client, dry_run, |totals| {
                bar.set_position(count_of(if dry_run { totals.matched_count } else { totals.deleted_count }));
                so_far = Some(totals.clone());
            })
            .await;
        bar.finish_and_clear();
        match totals {
            Ok(totals) => {
                self.show(&totals);
                Ok(())
            }
            Err(failure) => {
                // What it deleted stays deleted, whatever ended it.
                if let Some(totals) = so_far {
                    self.show(&totals);
                    output::notice("the totals so far: the cleanup has not come to its end, run it again");
                }
                Err(failure)
            }
        }
    }

    /// Asks for a cleanup and returns the last of its messages.
    async fn follow(
        &self,
        client: &mut IdempotencyServiceClient<Pool>,
        dry_run: bool,
        mut progress: impl FnMut(&CleanupResponse),
    ) -> Result<CleanupResponse, Failure> {
        let request = CleanupRequest {
            tenant: self.tenant.clone().unwrap_or_default(),
            provider: self.provider.clone().unwrap_or_default(),
            older_than: Some(prost_types::Duration { seconds: i64::from(self.days) * DAY, nanos: 0 }),
            states: self.states.iter().map(|state| State::from(*state).into()).collect(),
            dry_run,
            batch_size: self.batch_size,
        };
        let failure = |status: tonic::Status| self.sidecar.failure_of(&status, &[("older_than", "--days")]);
        let mut stream = client.cleanup(request).await.map_err(failure)?.into_inner();
        let mut last = None;
        while let Some(totals) = stream.message().await.map_err(failure)? {
            progress(&totals);
            last = Some(totals);
        }
        match last {
            Some(totals) if totals.done => Ok(totals),
            _ => Err(anyhow::anyhow!(
                "the sidecar ended before it was done; what it deleted stays deleted: run it again"
            )
            .into()),
        }
    }

    /// On standard error if that is a terminal, otherwise hidden. With --json too: the totals go to standard output.
    fn progress_bar() -> ProgressBar {
        let bar = ProgressBar::no_length().with_style(style("{spinner} {msg} {human_pos}")).with_message("counting");
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }

    fn show(&self, totals: &CleanupResponse) {
        let report = Report::new(totals, self.dry_run);
        if self.json {
            output::json(&report);
            return;
        }
        let columns = [
            Column::Text("provider"),
            Column::Number("matched"),
            Column::Number("deleted"),
            Column::Text("oldest ended"),
        ];
        let mut rows: Vec<Vec<String>> = report
            .providers
            .iter()
            .map(|provider| {
                vec![
                    provider.provider.clone(),
                    provider.matched.to_string(),
                    provider.deleted.to_string(),
                    provider.oldest_end_time.clone().unwrap_or_else(|| "-".into()),
                ]
            })
            .collect();
        rows.push(vec!["all".into(), report.matched.to_string(), report.deleted.to_string(), String::new()]);
        output::table(&columns, rows);
        if self.dry_run {
            output::line("nothing was deleted: this was a dry run");
        }
    }
}

/// The totals, for programs.
#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    /// Whether these are all: false if the cleanup was cut short.
    done: bool,
    matched: i64,
    deleted: i64,
    providers: Vec<Provider>,
}

#[derive(Debug, Serialize)]
struct Provider {
    provider: String,
    matched: i64,
    deleted: i64,
    oldest_end_time: Option<String>,
}

impl Report {
    fn new(totals: &CleanupResponse, dry_run: bool) -> Self {
        let providers = totals
            .providers
            .iter()
            .map(|provider| Provider {
                provider: provider.provider.clone(),
                matched: provider.matched_count,
                deleted: provider.deleted_count,
                oldest_end_time: provider.oldest_end_time.as_ref().and_then(|time| {
                    let time = jiff::Timestamp::new(time.seconds, time.nanos).ok()?;
                    Some(time.round(jiff::Unit::Second).unwrap_or(time).to_string())
                }),
            })
            .collect();
        Self { dry_run, done: totals.done, matched: totals.matched_count, deleted: totals.deleted_count, providers }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates are constants that a test has parsed")
}

/// Counts are never negative; if one were, the bar should be empty rather than the command fail.
fn count_of(count: i64) -> u64 {
    count.try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        cleanup: Cleanup,
    }

    #[test]
    fn the_progress_bar_can_be_made() {
        let cleanup = Command::parse_from(["cleanup"]).cleanup;
        let bar = Cleanup::progress_bar();
        bar.set_style(style(BAR));
        bar.finish_and_clear();
        let states: Vec<State> = cleanup.states.iter().copied().map(State::from).collect();
        assert_eq!(states, [State::Completed]);
    }
}
