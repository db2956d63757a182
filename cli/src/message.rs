//! The API's messages: as JSON with the contract's names for programs, and parts of them in words for people.
//!
//! States and outcomes are the words of the contract without their prefix, in lower case; times are RFC 3339; lengths of
//! time are seconds; digests are hexadecimal and bodies base64. What is not set is null.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::{SignedDuration, Timestamp, Unit};
use oncegate_api::v1::{self, Outcome, State};
use prost_types::value::Kind;
use serde::Serialize;

/// An event.
#[derive(Debug, Serialize)]
pub(crate) struct Event<'m> {
    key: Option<Key<'m>>,
    event_type: &'m str,
    state: String,
    attempt_count: i32,
    duplicate_count: i64,
    holder: &'m str,
    lock_expire_time: Option<String>,
    create_time: Option<String>,
    update_time: Option<String>,
    end_time: Option<String>,
    last_error: &'m str,
    metadata: Option<serde_json::Value>,
    fencing_token: i64,
    retry_time: Option<String>,
    result: Option<Outcomes<'m>>,
}

#[derive(Debug, Serialize)]
struct Key<'m> {
    tenant: &'m str,
    provider: &'m str,
    event_id: &'m str,
}

/// How the processing ended.
#[derive(Debug, Serialize)]
struct Outcomes<'m> {
    code: i32,
    body: String,
    content_type: &'m str,
}

impl<'m> From<&'m v1::Event> for Event<'m> {
    fn from(event: &'m v1::Event) -> Self {
        Self {
            key: event.key.as_ref().map(|key| Key {
                tenant: &key.tenant,
                provider: &key.provider,
                event_id: &key.event_id,
            }),
            event_type: &event.event_type,
            state: state(event.state()),
            attempt_count: event.attempt_count,
            duplicate_count: event.duplicate_count,
            holder: &event.holder,
            lock_expire_time: event.lock_expire_time.as_ref().and_then(exact_time),
            create_time: event.create_time.as_ref().and_then(exact_time),
            update_time: event.update_time.as_ref().and_then(exact_time),
            end_time: event.end_time.as_ref().and_then(exact_time),
            last_error: &event.last_error,
            metadata: event.metadata.as_ref().map(object),
            fencing_token: event.fencing_token,
            retry_time: event.retry_time.as_ref().and_then(exact_time),
            result: event.result.as_ref().map(Outcomes::from),
        }
    }
}

impl<'m> From<&'m v1::Result> for Outcomes<'m> {
    fn from(result: &'m v1::Result) -> Self {
        Self { code: result.code, body: BASE64_STANDARD.encode(&result.body), content_type: &result.content_type }
    }
}

/// An event with what happened to it.
#[derive(Debug, Serialize)]
pub(crate) struct EventHistory<'m> {
    event: Option<Event<'m>>,
    // Absent in a listing: an empty list would say that there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts: Option<Vec<Attempt<'m>>>,
    // Absent if all are shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts_omitted: Option<i32>,
    mismatch_count: i64,
    last_mismatch_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resolutions: Option<Vec<Resolution<'m>>>,
}

#[derive(Debug, Serialize)]
struct Attempt<'m> {
    attempt: i32,
    fencing_token: i64,
    holder: &'m str,
    start_time: Option<String>,
    end_time: Option<String>,
    outcome: String,
    error: &'m str,
    claim_id: &'m str,
    payload_digest: Option<String>,
    result: Option<Outcomes<'m>>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    body_omitted: bool,
}

#[derive(Debug, Serialize)]
struct Resolution<'m> {
    from_state: String,
    to_state: String,
    reason: &'m str,
    actor: &'m str,
    time: Option<String>,
}

impl<'m> EventHistory<'m> {
    /// One event, with everything.
    pub(crate) fn whole(history: &'m v1::EventHistory) -> Self {
        let attempts = history
            .attempts
            .iter()
            .map(|attempt| Attempt {
                attempt: attempt.attempt,
                fencing_token: attempt.fencing_token,
                holder: &attempt.holder,
                start_time: attempt.start_time.as_ref().and_then(exact_time),
                end_time: attempt.end_time.as_ref().and_then(exact_time),
                outcome: outcome(attempt.outcome()),
                error: &attempt.error,
                claim_id: &attempt.claim_id,
                payload_digest: (!attempt.payload_digest.is_empty()).then(|| hex::encode(&attempt.payload_digest)),
                result: attempt.result.as_ref().map(Outcomes::from),
                body_omitted: attempt.body_omitted,
            })
            .collect();
        let attempts_omitted = Some(history.attempts_omitted).filter(|omitted| *omitted > 0);
        let resolutions = history
            .resolutions
            .iter()
            .map(|resolution| Resolution {
                from_state: state(resolution.from_state()),
                to_state: state(resolution.to_state()),
                reason: &resolution.reason,
                actor: &resolution.actor,
                time: resolution.time.as_ref().and_then(exact_time),
            })
            .collect();
        Self { attempts: Some(attempts), attempts_omitted, resolutions: Some(resolutions), ..Self::listed(history) }
    }

    /// One of many.
    pub(crate) fn listed(history: &'m v1::EventHistory) -> Self {
        Self {
            event: history.event.as_ref().map(Event::from),
            attempts: None,
            attempts_omitted: None,
            mismatch_count: history.mismatch_count,
            last_mismatch_time: history.last_mismatch_time.as_ref().and_then(exact_time),
            resolutions: None,
        }
    }
}

/// The answer to Stats.
#[derive(Debug, Serialize)]
pub(crate) struct Stats<'m> {
    total: Counts,
    providers: Vec<ProviderCounts<'m>>,
    buckets: Vec<Bucket<'m>>,
    as_of_time: Option<String>,
}

#[derive(Debug, Serialize)]
struct Bucket<'m> {
    start_time: Option<String>,
    providers: Vec<ProviderCounts<'m>>,
}

#[derive(Debug, Serialize)]
struct ProviderCounts<'m> {
    provider: &'m str,
    counts: Counts,
}

#[derive(Debug, Serialize)]
struct Counts {
    total: i64,
    states: Vec<StateCount>,
    duplicates: i64,
    retries: i64,
    stuck: i64,
    /// The only name that is not from the contract.
    success_rate: Option<f64>,
    processing_p50: Option<f64>,
    processing_p95: Option<f64>,
    processing_p99: Option<f64>,
}

#[derive(Debug, Serialize)]
struct StateCount {
    state: String,
    count: i64,
}

impl<'m> From<&'m v1::StatsResponse> for Stats<'m> {
    fn from(response: &'m v1::StatsResponse) -> Self {
        Self {
            total: Counts::from(&response.total.clone().unwrap_or_default()),
            providers: provider_counts(&response.providers),
            buckets: response
                .buckets
                .iter()
                .map(|bucket| Bucket {
                    start_time: bucket.start_time.as_ref().and_then(exact_time),
                    providers: provider_counts(&bucket.providers),
                })
                .collect(),
            as_of_time: response.as_of_time.as_ref().and_then(exact_time),
        }
    }
}

fn provider_counts(providers: &[v1::ProviderCounts]) -> Vec<ProviderCounts<'_>> {
    let counts = |counts: &v1::ProviderCounts| Counts::from(&counts.counts.clone().unwrap_or_default());
    providers.iter().map(|provider| ProviderCounts { provider: &provider.provider, counts: counts(provider) }).collect()
}

impl From<&v1::Counts> for Counts {
    fn from(counts: &v1::Counts) -> Self {
        let seconds = |duration: Option<&prost_types::Duration>| duration.and_then(length).map(|d| d.as_secs_f64());
        Self {
            total: counts.total,
            states: counts.states.iter().map(|of| StateCount { state: state(of.state()), count: of.count }).collect(),
            duplicates: counts.duplicates,
            retries: counts.retries,
            stuck: counts.stuck,
            success_rate: success_rate(counts),
            processing_p50: seconds(counts.processing_p50.as_ref()),
            processing_p95: seconds(counts.processing_p95.as_ref()),
            processing_p99: seconds(counts.processing_p99.as_ref()),
        }
    }
}

/// How many events are in a state.
pub(crate) fn count(counts: &v1::Counts, state: State) -> i64 {
    counts.states.iter().filter(|of| of.state() == state).map(|of| of.count).sum()
}

/// The share of completed ones among those that reached an outcome; `None` as long as none has.
pub(crate) fn success_rate(counts: &v1::Counts) -> Option<f64> {
    // Rounded only beyond 2^53 events.
    #[allow(clippy::cast_precision_loss)]
    succeeded(counts).map(|(completed, all)| completed as f64 / all as f64)
}

/// How many completed, and how many reached an outcome; `None` as long as none has.
pub(crate) fn succeeded(counts: &v1::Counts) -> Option<(i64, i64)> {
    let completed = count(counts, State::Completed);
    let others: i64 = [State::Failed, State::Unknown, State::Dead].map(|state| count(counts, state)).iter().sum();
    let all = completed + others;
    (all > 0).then_some((completed, all))
}

/// A state in a word.
pub(crate) fn state(state: State) -> String {
    word(state.as_str_name(), "STATE_")
}

/// An outcome in words.
pub(crate) fn outcome(outcome: Outcome) -> String {
    word(outcome.as_str_name(), "OUTCOME_")
}

fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

/// A time as it is, for programs.
fn exact_time(time: &prost_types::Timestamp) -> Option<String> {
    Some(moment(time)?.to_string())
}

/// A time to the millisecond, for people.
pub(crate) fn time(time: Option<&prost_types::Timestamp>) -> String {
    let Some(time) = time.and_then(moment) else { return "-".into() };
    format!("{:.3}", time.round(Unit::Millisecond).unwrap_or(time))
}

/// A time to the second, for people.
pub(crate) fn second(time: Option<&prost_types::Timestamp>) -> String {
    let Some(time) = time.and_then(moment) else { return "-".into() };
    // Truncated to the second: rounding up would show some times in the future.
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

pub(crate) fn moment(time: &prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(time.seconds, time.nanos).ok()
}

/// A length of time.
pub(crate) fn length(duration: &prost_types::Duration) -> Option<SignedDuration> {
    SignedDuration::from_secs(duration.seconds).checked_add(SignedDuration::from_nanos(duration.nanos.into()))
}

/// A length of time for people: three digits are enough.
pub(crate) fn length_in_words(length: SignedDuration) -> String {
    let seconds = length.as_secs_f64();
    match seconds {
        ..1.0 => format!("{:.1} ms", seconds * 1_000.0),
        ..60.0 => format!("{seconds:.2} s"),
        _ => format!("{:#}", length.round(Unit::Second).unwrap_or(length)),
    }
}

/// A protobuf structure as JSON.
pub(crate) fn object(structure: &prost_types::Struct) -> serde_json::Value {
    structure.fields.iter().map(|(name, value)| (name.clone(), json(value))).collect()
}

fn json(value: &prost_types::Value) -> serde_json::Value {
    use serde_json::Value;
    match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => (*value).into(),
        Some(Kind::NumberValue(value)) => number(*value),
        Some(Kind::StringValue(value)) => value.clone().into(),
        Some(Kind::ListValue(list)) => list.values.iter().map(json).collect(),
        Some(Kind::StructValue(structure)) => object(structure),
    }
}

/// Whole numbers without a fraction, as they were before protobuf turned them into doubles.
fn number(value: f64) -> serde_json::Value {
    /// From here on a double no longer holds every whole number.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() < EXACT {
        // Within the range of both types.
        #[allow(clippy::cast_possible_truncation)]
        let whole = value as i64;
        whole.into()
    } else {
        value.into()
    }
}

/// A text that may be missing, as people read it.
pub(crate) fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(of: &[(State, i64)]) -> v1::Counts {
        let states = of.iter().map(|(state, count)| v1::StateCount { state: (*state).into(), count: *count }).collect();
        v1::Counts {
            states,
            processing_p50: Some(prost_types::Duration { seconds: 1, nanos: 250_000_000 }),
            ..Default::default()
        }
    }

    #[test]
    fn success_is_measured_among_those_that_came_to_something() {
        assert_eq!(success_rate(&counts(&[(State::Processing, 3), (State::Pending, 1)])), None);
        let some = counts(&[(State::Completed, 3), (State::Dead, 1), (State::Processing, 100)]);
        assert_eq!(success_rate(&some), Some(0.75));
    }

    #[test]
    fn stats_have_the_names_of_the_contract() {
        let response = v1::StatsResponse {
            total: Some(counts(&[(State::Completed, 2)])),
            providers: vec![v1::ProviderCounts { provider: "stripe".into(), counts: None }],
            buckets: vec![v1::Bucket { start_time: Some(prost_types::Timestamp::default()), providers: vec![] }],
            as_of_time: None,
        };
        let shown = serde_json::to_value(Stats::from(&response)).unwrap();
        assert_eq!(shown["total"]["states"], serde_json::json!([{ "state": "completed", "count": 2 }]));
        assert_eq!((&shown["total"]["processing_p50"], &shown["total"]["processing_p95"]), (&1.25.into(), &().into()));
        assert_eq!(shown["providers"][0]["counts"]["total"], 0);
        assert_eq!(shown["buckets"][0]["start_time"], "1970-01-01T00:00:00Z");
        assert!(shown["as_of_time"].is_null());
    }

    #[test]
    fn a_listing_does_not_say_that_there_were_no_attempts() {
        let history = v1::EventHistory { event: Some(v1::Event::default()), ..Default::default() };
        let listed = serde_json::to_value(EventHistory::listed(&history)).unwrap();
        assert!(listed.get("attempts").is_none() && listed.get("resolutions").is_none(), "{listed}");
        let whole = serde_json::to_value(EventHistory::whole(&history)).unwrap();
        assert_eq!(whole["attempts"], serde_json::json!([]));
        assert_eq!(whole["event"]["state"], "unspecified");
    }

    #[test]
    fn times_and_lengths_are_for_people() {
        let at = prost_types::Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 };
        assert_eq!(time(Some(&at)), "2023-11-14T22:13:20.123Z");
        assert_eq!(second(Some(&at)), "2023-11-14T22:13:20Z");
        assert_eq!(time(None), "-");
        for (milliseconds, expected) in [(1, "1.0 ms"), (1_234, "1.23 s"), (125_000, "2m 5s")] {
            assert_eq!(length_in_words(SignedDuration::from_millis(milliseconds)), expected);
        }
    }

    #[test]
    fn metadata_is_the_json_that_it_was() {
        let structure = prost_types::Struct {
            fields: [
                ("whole", Kind::NumberValue(3.0)),
                ("part", Kind::NumberValue(0.5)),
                ("none", Kind::NullValue(0)),
                ("text", Kind::StringValue("x".into())),
            ]
            .map(|(name, kind)| (name.to_owned(), prost_types::Value { kind: Some(kind) }))
            .into(),
        };
        let expected = serde_json::json!({ "whole": 3, "part": 0.5, "none": null, "text": "x" });
        assert_eq!(object(&structure), expected);
    }
}
