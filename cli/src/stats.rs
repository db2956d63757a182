//! `oncegate stats`.

use clap::builder::NonEmptyStringValueParser;
use std::{fmt::Write as _, io, time::Duration};

use anyhow::Context as _;
use jiff::Timestamp;
use oncegate_api::v1::{
    self, Counts, State, StatsRequest, StatsResponse, idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_gateway::sidecar::Pool;
use oncegate_runtime::shutdown;

use crate::{
    bounds::{OPTIONS, bound, in_order, timestamp},
    failure::Failure,
    message,
    output::{self, Column},
    sidecar_client::Sidecar,
};

/// The shortest interval between two requests: Stats is meant for people, not for load.
const INTERVAL_MIN: Duration = Duration::from_millis(500);

/// Count events, by provider and by state
///
/// Shows how many events there are in each state, how many calls were duplicates, how many attempts were made beyond the
/// first, how many events are stuck (their lock has expired and nobody has taken them over), and which part of those that
/// came to something has completed. Bounds are on the time of an event's creation and are lowered to the full hour.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate stats
  oncegate stats --provider stripe --since 24h --bucket 1h
  oncegate stats --watch 5s
  oncegate stats --json | jq '.total.stuck'

With --json the names are those of the API; processing times are in seconds, and success_rate is between 0 and 1.
With --watch as well, there is one document a line.")]
pub(crate) struct Stats {
    /// Only this tenant's events
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    tenant: Option<String>,

    /// Only this provider's events
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    provider: Option<String>,

    /// Only events created from this time on: RFC 3339, or an age like 24h
    #[arg(long, value_name = "TIME", value_parser = bound)]
    since: Option<Timestamp>,

    /// Only events created before this time: RFC 3339, or an age like 1h
    #[arg(long, value_name = "TIME", value_parser = bound)]
    until: Option<Timestamp>,

    /// Count for each stretch of time as well: a multiple of 1h
    #[arg(long, value_name = "DURATION", value_parser = oncegate_runtime::config::duration)]
    bucket: Option<Duration>,

    /// Go on until Ctrl-C, and look again each time this has passed
    #[arg(
        long,
        value_name = "INTERVAL",
        num_args = 0..=1,
        default_missing_value = "2s",
        value_parser = interval
    )]
    watch: Option<Duration>,

    #[command(flatten)]
    sidecar: Sidecar,

    /// Show the counts as JSON
    #[arg(long)]
    json: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = oncegate_runtime::config::duration(text).map_err(|error| error.to_string())?;
    if interval < INTERVAL_MIN { Err(format!("at least {INTERVAL_MIN:?}")) } else { Ok(interval) }
}

impl Stats {
    /// Whether it keeps refreshing until told to stop.
    pub(crate) fn goes_on(&self) -> bool {
        self.watch.is_some()
    }

    pub(crate) async fn run(self) -> Result<(), Failure> {
        in_order(self.since, self.until)?;
        let mut client = IdempotencyServiceClient::new(self.sidecar.connect().await?)
            // A thousand buckets of many providers are more than a client takes by default; sidecars of before told them.
            .max_decoding_message_size(usize::MAX);
        let Some(interval) = self.watch else {
            let counted = self.ask(&mut client).await?;
            if self.json {
                output::json(&message::Stats::from(&counted));
            } else {
                output::line(text(&counted));
            }
            return Ok(());
        };
        let signal = shutdown::on_signals().context("cannot listen for signals")?;
        tokio::select! {
            () = signal.cancelled() => Ok(()),
            ended = self.watch(&mut client, interval) => ended,
        }
    }

    /// Asks repeatedly. A failure of the first request is reported as usual; after later ones it keeps trying, since
    /// somebody watching a sidecar wants to see it come back.
    async fn watch(&self, client: &mut IdempotencyServiceClient<Pool>, interval: Duration) -> Result<(), Failure> {
        let mut counted = self.ask(client).await?;
        let mut trouble = None;
        loop {
            if self.show_again(&counted, interval, trouble.as_deref()).is_err() {
                // Nobody reads any more.
                return Ok(());
            }
            tokio::time::sleep(interval).await;
            match self.ask(client).await {
                Ok(answer) => (counted, trouble) = (answer, None),
                Err(Failure::Unreachable(error) | Failure::Failed(error)) => trouble = Some(format!("{error:#}")),
                Err(failure) => return Err(failure),
            }
        }
    }

    fn show_again(&self, counted: &StatsResponse, interval: Duration, trouble: Option<&str>) -> io::Result<()> {
        if self.json {
            return match trouble {
                // Showing the old counts again would make them pass for new ones.
                Some(trouble) => {
                    output::complain(trouble);
                    Ok(())
                }
                None => output::json_line(&message::Stats::from(counted)),
            };
        }
        let mut text = text(counted);
        // Writing to a String cannot fail.
        let _ = write!(text, "\nEvery {interval:?}, until Ctrl-C.");
        if let Some(trouble) = trouble {
            let _ = write!(text, "\nNot up to date: {trouble}");
        }
        output::redraw(&text)
    }

    async fn ask(&self, client: &mut IdempotencyServiceClient<Pool>) -> Result<StatsResponse, Failure> {
        let request = StatsRequest {
            tenant: self.tenant.clone().unwrap_or_default(),
            provider: self.provider.clone().unwrap_or_default(),
            start_time: self.since.map(timestamp),
            end_time: self.until.map(timestamp),
            bucket_duration: self.bucket.map(|bucket| prost_types::Duration {
                // Impossibly long: the sidecar refuses it and states its limit.
                seconds: bucket.as_secs().try_into().unwrap_or(i64::MAX),
                nanos: bucket.subsec_nanos().try_into().unwrap_or_default(),
            }),
            without_percentiles: false,
        };
        let [since, until] = OPTIONS;
        let options = [since, until, ("bucket_duration", "--bucket")];
        Ok(client.stats(request).await.map_err(|status| self.sidecar.failure_of(&status, &options))?.into_inner())
    }
}

/// The states, in the order of an event's life.
const STATES: [State; 6] =
    [State::Pending, State::Processing, State::Completed, State::Failed, State::Unknown, State::Dead];

const COLUMNS: [Column; 11] = [
    Column::Number("events"),
    Column::Number("pending"),
    Column::Number("processing"),
    Column::Number("completed"),
    Column::Number("failed"),
    Column::Number("unknown"),
    Column::Number("dead"),
    Column::Number("stuck"),
    Column::Number("duplicates"),
    Column::Number("retries"),
    Column::Number("success"),
];

/// The counts for people.
fn text(counted: &StatsResponse) -> String {
    let total = counted.total.clone().unwrap_or_default();
    let timed = [&total].into_iter().chain(counted.providers.iter().filter_map(|of| of.counts.as_ref()));
    // Whether the sidecar provides them at all: three empty columns help nobody.
    let timed = timed.into_iter().any(|counts| counts.processing_p50.is_some());
    let mut columns = vec![Column::Text("provider")];
    columns.extend(COLUMNS);
    if timed {
        columns.extend([Column::Number("p50"), Column::Number("p95"), Column::Number("p99")]);
    }
    let row = |name: &str, counts: &Counts| {
        let mut row = vec![name.to_owned()];
        row.extend(cells(counts));
        if timed {
            let lengths = [&counts.processing_p50, &counts.processing_p95, &counts.processing_p99];
            row.extend(lengths.map(|length| {
                length.as_ref().and_then(message::length).map_or_else(|| "-".into(), message::length_in_words)
            }));
        }
        row
    };
    let mut rows: Vec<_> = counted.providers.iter().map(|of| row(&of.provider, &counts(of))).collect();
    rows.push(row("all", &total));
    let mut text = output::render(&columns, rows);
    if !counted.buckets.is_empty() {
        let mut columns = vec![Column::Text("from"), Column::Text("provider")];
        columns.extend(COLUMNS);
        let rows = counted.buckets.iter().flat_map(|bucket| {
            bucket.providers.iter().enumerate().map(|(place, of)| {
                let from = if place == 0 { message::second(bucket.start_time.as_ref()) } else { String::new() };
                let mut row = vec![from, of.provider.clone()];
                row.extend(cells(&counts(of)));
                row
            })
        });
        // Writing to a String cannot fail.
        let _ = write!(text, "\n\n{}", output::render(&columns, rows));
    }
    let _ = write!(text, "\n\nAs of {}.", message::second(counted.as_of_time.as_ref()));
    if total.stuck > 0 {
        let _ = write!(text, " Stuck events are taken over when their webhook comes back.");
    }
    text
}

fn counts(of: &v1::ProviderCounts) -> Counts {
    of.counts.clone().unwrap_or_default()
}

fn cells(counts: &Counts) -> impl Iterator<Item = String> {
    let states = STATES.map(|state| message::count(counts, state));
    let numbers = [counts.stuck, counts.duplicates, counts.retries];
    let success = message::succeeded(counts).map_or_else(|| "-".into(), |(completed, all)| percent(completed, all));
    [counts.total].into_iter().chain(states).chain(numbers).map(|count| count.to_string()).chain([success])
}

/// Rounded down: 100 % means that nothing has failed. In integers, because 57 of 100 is a little less in binary
/// fractions.
fn percent(completed: i64, all: i64) -> String {
    let hundredths = i128::from(completed) * 10_000 / i128::from(all);
    format!("{}.{:02} %", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        stats: Stats,
    }

    #[test]
    fn watching_has_an_interval_of_its_own() {
        let watch = |arguments: &[&str]| Command::try_parse_from(arguments).map(|command| command.stats.watch);
        assert_eq!(watch(&["stats"]).unwrap(), None);
        assert_eq!(watch(&["stats", "--watch"]).unwrap(), Some(Duration::from_secs(2)));
        assert_eq!(watch(&["stats", "--watch", "--json"]).unwrap(), Some(Duration::from_secs(2)));
        assert_eq!(watch(&["stats", "--watch", "1m"]).unwrap(), Some(Duration::from_secs(60)));
        assert!(watch(&["stats", "--watch", "0s"]).is_err());
        assert!(watch(&["stats", "--watch", "5"]).is_err());
    }

    fn example() -> StatsResponse {
        let counts = Counts {
            total: 3,
            states: vec![
                v1::StateCount { state: State::Completed.into(), count: 2 },
                v1::StateCount { state: State::Dead.into(), count: 1 },
            ],
            duplicates: 7,
            ..Default::default()
        };
        let providers = vec![v1::ProviderCounts { provider: "stripe".into(), counts: Some(counts.clone()) }];
        StatsResponse {
            total: Some(counts),
            buckets: vec![v1::Bucket {
                start_time: Some(prost_types::Timestamp::default()),
                providers: providers.clone(),
            }],
            providers,
            as_of_time: Some(prost_types::Timestamp { seconds: 3_600, nanos: 5 }),
        }
    }

    #[test]
    fn people_see_each_provider_and_all() {
        let text = text(&example());
        for expected in ["stripe", "66.66 %", "1970-01-01T00:00:00Z", "As of 1970-01-01T01:00:00Z."] {
            assert!(text.contains(expected), "{expected}:\n{text}");
        }
        assert!(!text.contains("p99") && !text.contains("Stuck"), "{text}");
    }

    #[test]
    fn nothing_is_rounded_up_to_success() {
        for (completed, all, shown) in [
            (7, 7, "100.00 %"),
            (999_999, 1_000_000, "99.99 %"),
            (57, 100, "57.00 %"),
            (43, 125, "34.40 %"),
            (0, 9, "0.00 %"),
            (1, 10_000, "0.01 %"),
        ] {
            assert_eq!(percent(completed, all), shown);
        }
    }
}
