//! `oncegate history`.

use clap::builder::NonEmptyStringValueParser;
use std::fmt::Write as _;

use jiff::Timestamp;
use oncegate_api::v1::{
    Event, EventHistory, EventKey, HistoryRequest, Result as StoredResult, State,
    idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_gateway::sidecar::Pool;
use oncegate_runtime::config::Problem;

use crate::{
    bounds::{OPTIONS, StateName, bound, in_order, timestamp},
    failure::Failure,
    message,
    output::{self, Column},
    sidecar_client::Sidecar,
};

/// How many events are asked for at once. The sidecar returns no more than this.
const PAGE_SIZE: usize = 500;

/// How many digits of a digest are shown to people: enough to tell two apart.
const DIGEST_DIGITS: usize = 12;

/// How many characters of an error or a body are shown in a table.
const EXCERPT_CHARS: usize = 80;

/// Show what happened to an event, or list events
///
/// With a provider and an event id: the event, the attempts that were made on it (the latest 500), what operators decided,
/// and how often it came with another fingerprint or body. Without: the events that fit, newest first. Exits with 1 if
/// there is no such event; a listing without any is no failure.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate history stripe evt_1MqqbKLt4dXK03v5qaIbiNCC
  oncegate history --provider stripe --state dead --state unknown --since 7d
  oncegate history --limit 100000 --json | jq -r 'select(.event.attempt_count > 1).event.key.event_id'

With --json there is one document a line, an event each; the names are those of the API, payload_digest is in
hexadecimal digits, and the body of a result in base64.")]
pub(crate) struct History {
    /// Who sent the event
    #[arg(value_name = "PROVIDER", requires = "id", conflicts_with_all = FILTERS)]
    of: Option<String>,

    /// The provider's identifier of the event
    #[arg(value_name = "EVENT_ID")]
    id: Option<String>,

    /// The tenant of the event, or only this tenant's events
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    tenant: Option<String>,

    /// Only this provider's events
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    provider: Option<String>,

    /// Only events of this type
    #[arg(long, value_name = "TYPE")]
    event_type: Option<String>,

    /// Only events in this state; may be given several times
    #[arg(long = "state", value_enum, value_delimiter = ',', value_name = "STATE")]
    states: Vec<StateName>,

    /// Only events created from this time on: RFC 3339, or an age like 24h
    #[arg(long, value_name = "TIME", value_parser = bound)]
    since: Option<Timestamp>,

    /// Only events created before this time: RFC 3339, or an age like 1h
    #[arg(long, value_name = "TIME", value_parser = bound)]
    until: Option<Timestamp>,

    /// How many events to list at most [default: 50]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,

    #[command(flatten)]
    sidecar: Sidecar,

    /// Show the events as JSON, one a line
    #[arg(long)]
    json: bool,
}

/// The filters that do not apply to a single event.
const FILTERS: [&str; 6] = ["provider", "event_type", "states", "since", "until", "limit"];

/// A client that accepts the largest pages: five hundred events with results of 64 KiB each.
pub(crate) fn client(channel: Pool) -> IdempotencyServiceClient<Pool> {
    IdempotencyServiceClient::new(channel).max_decoding_message_size(usize::MAX)
}

/// One event with all that happened to it.
pub(crate) async fn find(
    client: &mut IdempotencyServiceClient<Pool>,
    sidecar: &Sidecar,
    key: EventKey,
) -> Result<EventHistory, Failure> {
    let request = HistoryRequest { key: Some(key), ..Default::default() };
    let response = client.history(request).await.map_err(|status| sidecar.failure(&status))?.into_inner();
    let history = response.events.into_iter().next().filter(|history| history.event.is_some());
    history.ok_or_else(|| anyhow::anyhow!("the sidecar answered without the event").into())
}

impl History {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        in_order(self.since, self.until)?;
        let mut client = client(self.sidecar.connect().await?);
        let (Some(provider), Some(event_id)) = (&self.of, &self.id) else {
            return self.list(&mut client).await;
        };
        let tenant = self.tenant.clone().unwrap_or_default();
        let key = EventKey { tenant, provider: provider.clone(), event_id: event_id.clone() };
        let history = find(&mut client, &self.sidecar, key).await?;
        if self.json {
            // If nobody reads any more, there is nobody to tell.
            let _ = output::json_line(&message::EventHistory::whole(&history));
        } else {
            output::line(whole(&history));
        }
        Ok(())
    }

    async fn list(&self, client: &mut IdempotencyServiceClient<Pool>) -> Result<(), Failure> {
        let limit = usize::try_from(self.limit.unwrap_or(50)).unwrap_or(usize::MAX);
        let mut left = limit;
        let mut page_token = String::new();
        let mut listed = Vec::new();
        loop {
            let request = self.page(left.min(PAGE_SIZE), page_token)?;
            let page = client.history(request).await;
            let page = page.map_err(|status| self.sidecar.failure_of(&status, &OPTIONS))?.into_inner();
            for history in page.events.iter().take(left) {
                if !self.json {
                    listed.extend(history.event.as_ref().map(row));
                } else if output::json_line(&message::EventHistory::listed(history)).is_err() {
                    // Nobody reads any more: no need to ask for the rest.
                    return Ok(());
                }
            }
            left = left.saturating_sub(page.events.len());
            page_token = page.next_page_token;
            if left == 0 || page_token.is_empty() {
                break;
            }
        }
        if self.json {
            return Ok(());
        }
        if listed.is_empty() {
            output::line("no such events");
            return Ok(());
        }
        output::table(&COLUMNS, listed);
        if !page_token.is_empty() {
            output::line(format_args!("\nThere are more than these {limit}: see --limit."));
        }
        Ok(())
    }

    fn page(&self, size: usize, page_token: String) -> Result<HistoryRequest, Failure> {
        Ok(HistoryRequest {
            key: None,
            tenant: self.tenant.clone().unwrap_or_default(),
            provider: self.provider.clone().unwrap_or_default(),
            event_type: self.event_type.clone().unwrap_or_default(),
            states: self.states.iter().map(|name| State::from(*name).into()).collect(),
            start_time: self.since.map(timestamp),
            end_time: self.until.map(timestamp),
            page_size: i32::try_from(size).map_err(|_| Problem::new("--limit", "too large"))?,
            page_token,
        })
    }
}

const COLUMNS: [Column; 9] = [
    Column::Text("created"),
    Column::Text("tenant"),
    Column::Text("provider"),
    Column::Text("event"),
    Column::Text("type"),
    Column::Text("state"),
    Column::Number("attempts"),
    Column::Number("duplicates"),
    Column::Text("why"),
];

/// What an unfinished event waits for: the end of a lock or of a pause, or somebody to read its last error.
fn why(event: &Event) -> String {
    match event.state() {
        State::Completed => String::new(),
        State::Processing => {
            format!(
                "held by {} until {}",
                message::or_dash(&event.holder),
                message::second(event.lock_expire_time.as_ref())
            )
        }
        State::Unspecified | State::Pending | State::Failed | State::Unknown | State::Dead => {
            excerpt(&event.last_error)
        }
    }
}

fn row(event: &Event) -> Vec<String> {
    let key = event.key.clone().unwrap_or_default();
    vec![
        message::second(event.create_time.as_ref()),
        key.tenant,
        key.provider,
        key.event_id,
        event.event_type.clone(),
        message::state(event.state()),
        event.attempt_count.to_string(),
        event.duplicate_count.to_string(),
        why(event),
    ]
}

/// An event and all that happened to it, for people.
pub(crate) fn whole(history: &EventHistory) -> String {
    let mut text = String::new();
    if let Some(event) = &history.event {
        text = about(event, history);
    }
    // Writing to a String cannot fail.
    if !history.attempts.is_empty() {
        let earlier = match history.attempts_omitted {
            0 => String::new(),
            omitted => format!(" ({omitted} earlier ones are not listed)"),
        };
        let _ = write!(text, "\n\nAttempts{earlier}:\n{}", attempts(history));
    }
    if !history.resolutions.is_empty() {
        let columns = [
            Column::Text("decided"),
            Column::Text("by"),
            Column::Text("from"),
            Column::Text("to"),
            Column::Text("reason"),
        ];
        let rows = history.resolutions.iter().map(|resolution| {
            vec![
                message::time(resolution.time.as_ref()),
                resolution.actor.clone(),
                message::state(resolution.from_state()),
                message::state(resolution.to_state()),
                resolution.reason.clone(),
            ]
        });
        let _ = write!(text, "\n\nDecisions:\n{}", output::render(&columns, rows));
    }
    text
}

fn about(event: &Event, history: &EventHistory) -> String {
    let key = event.key.clone().unwrap_or_default();
    let mut rows = vec![
        ("event", key.event_id),
        ("provider", key.provider),
        ("tenant", key.tenant),
        ("type", event.event_type.clone()),
        ("state", message::state(event.state())),
        ("attempts", event.attempt_count.to_string()),
        ("duplicates", event.duplicate_count.to_string()),
        ("fencing token", event.fencing_token.to_string()),
        ("created", message::time(event.create_time.as_ref())),
        ("changed", message::time(event.update_time.as_ref())),
    ];
    if event.end_time.is_some() {
        rows.push(("ended", message::time(event.end_time.as_ref())));
    }
    if event.state() == State::Processing {
        rows.push(("holder", message::or_dash(&event.holder).to_owned()));
        rows.push(("lock until", message::time(event.lock_expire_time.as_ref())));
    }
    if event.retry_time.is_some() {
        rows.push(("not again until", message::time(event.retry_time.as_ref())));
    }
    if !event.last_error.is_empty() {
        rows.push(("last error", event.last_error.clone()));
    }
    if let Some(stored) = &event.result {
        rows.push(("result", result(stored)));
    }
    if let Some(metadata) = &event.metadata {
        rows.push(("metadata", message::object(metadata).to_string()));
    }
    if history.mismatch_count > 0 {
        let last = message::time(history.last_mismatch_time.as_ref());
        rows.push(("mismatches", format!("{}, last {last}", history.mismatch_count)));
    }
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let lines: Vec<String> =
        // A value containing a line break would pass for another field.
        rows.iter().map(|(name, value)| format!("{name:width$}  {}", output::one_line(value))).collect();
    lines.join("\n")
}

fn attempts(history: &EventHistory) -> String {
    let columns = [
        Column::Number("#"),
        Column::Number("fencing token"),
        Column::Text("started"),
        Column::Number("took"),
        Column::Text("outcome"),
        Column::Text("holder"),
        Column::Text("claim"),
        Column::Text("body"),
        Column::Text("result"),
        Column::Text("error"),
    ];
    let rows = history.attempts.iter().map(|attempt| {
        let moment = |time: &Option<prost_types::Timestamp>| time.as_ref().and_then(message::moment);
        let took = match (moment(&attempt.start_time), moment(&attempt.end_time)) {
            (Some(start), Some(end)) => message::length_in_words(end.duration_since(start)),
            _ => "-".into(),
        };
        let mut digest = hex::encode(&attempt.payload_digest);
        digest.truncate(DIGEST_DIGITS);
        vec![
            attempt.attempt.to_string(),
            attempt.fencing_token.to_string(),
            message::time(attempt.start_time.as_ref()),
            took,
            message::outcome(attempt.outcome()),
            message::or_dash(&attempt.holder).to_owned(),
            attempt.claim_id.clone(),
            digest,
            match &attempt.result {
                Some(of) if attempt.body_omitted => format!("{} (body left out)", of.code),
                of => of.as_ref().map(result).unwrap_or_default(),
            },
            excerpt(&attempt.error),
        ]
    });
    output::render(&columns, rows)
}

/// A result in few words: the code, and the beginning of a body that is text.
fn result(result: &StoredResult) -> String {
    match str::from_utf8(&result.body) {
        Ok("") => result.code.to_string(),
        Ok(text) => format!("{} {}", result.code, excerpt(text)),
        Err(_) => format!("{} ({} bytes)", result.code, result.body.len()),
    }
}

fn excerpt(text: &str) -> String {
    match text.char_indices().nth(EXCERPT_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use oncegate_api::v1::{Attempt, Outcome, Resolution};

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        history: History,
    }

    #[test]
    fn it_is_one_event_or_a_listing() {
        let parse = |arguments: &[&str]| Command::try_parse_from([&["history"], arguments].concat());
        assert!(parse(&["stripe", "evt_1", "--tenant", "live"]).is_ok());
        let listing =
            parse(&["--state", "dead", "--state", "unknown", "--since", "7d", "--limit", "3"]).unwrap().history;
        let request = listing.page(3, String::new()).unwrap();
        assert_eq!(request.states, [i32::from(State::Dead), i32::from(State::Unknown)]);
        assert!(request.start_time.is_some() && request.end_time.is_none());
        for wrong in [
            &["stripe"][..],
            &["stripe", "evt_1", "--state", "dead"],
            &["stripe", "evt_1", "--limit", "3"],
            &["--state", "gone"],
            &["--limit", "0"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn nothing_from_outside_makes_a_line_of_its_own() {
        let hostile = "evil\n\x1b[2Jstate  completed";
        let event = Event {
            key: Some(EventKey { provider: "stripe".into(), event_id: "evt_1".into(), ..Default::default() }),
            last_error: hostile.into(),
            state: State::Failed.into(),
            ..Default::default()
        };
        let attempt = Attempt {
            attempt: 1,
            outcome: Outcome::FailedRetryable.into(),
            error: hostile.into(),
            payload_digest: vec![0xab; 32].into(),
            result: Some(StoredResult { code: 500, body: b"a\nb".as_slice().into(), ..Default::default() }),
            ..Default::default()
        };
        let resolution = Resolution { reason: hostile.into(), ..Default::default() };
        let history = EventHistory {
            event: Some(event),
            attempts: vec![attempt],
            mismatch_count: 2,
            resolutions: vec![resolution],
            ..Default::default()
        };
        let text = whole(&history);
        assert!(!text.contains('\x1b'), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("state  completed")), "{text}");
        for expected in ["evt_1", "failed_retryable", "abababababab", "mismatches", "500 a\\nb", "Decisions"] {
            assert!(text.contains(expected), "{expected}:\n{text}");
        }
    }

    #[test]
    fn a_holder_without_a_name_is_a_dash() {
        let event = Event { state: State::Processing.into(), ..Default::default() };
        assert!(why(&event).starts_with("held by - until"), "{}", why(&event));
        let attempt = Attempt { claim_id: "claim".into(), ..Default::default() };
        let history = EventHistory { event: Some(event), attempts: vec![attempt], ..Default::default() };
        let text = whole(&history);
        let fields: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(fields.contains(&vec!["holder", "-"]), "{text}");
        assert!(fields.iter().any(|line| line.windows(2).any(|pair| pair == ["-", "claim"])), "{text}");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(excerpt(&"ü".repeat(100)).chars().count(), EXCERPT_CHARS + 1);
        assert_eq!(excerpt("short"), "short");
    }
}
