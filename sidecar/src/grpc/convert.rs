//! From the domain to the API's messages.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use oncegate_api::v1;
use prost_types::{Duration, ListValue, Struct, Timestamp, Value, value::Kind};
use serde_json::Map;

use crate::{
    cache::entry::Completion,
    event::{
        Attempt, Claimed, Decision, Digest, Event, Key, Lock, Micros, Outcome, Resolution, State, StoredResult, Time,
        metadata,
    },
    ledger::{
        EventHistory,
        filter::{Counts, StatsReport},
        timings::{Percentiles, Timings},
    },
};

pub(super) fn timestamp(time: Time) -> Timestamp {
    Timestamp {
        seconds: time.0.div_euclid(1_000_000),
        // The remainder is below a million, and a thousand times that fits.
        nanos: i32::try_from(time.0.rem_euclid(1_000_000) * 1_000).unwrap_or_default(),
    }
}

pub(super) fn duration(micros: Micros) -> Duration {
    Duration {
        seconds: micros.0.div_euclid(1_000_000),
        nanos: i32::try_from(micros.0.rem_euclid(1_000_000) * 1_000).unwrap_or_default(),
    }
}

pub(super) fn state(state: State) -> v1::State {
    match state {
        State::Pending => v1::State::Pending,
        State::Processing => v1::State::Processing,
        State::Completed => v1::State::Completed,
        State::Failed => v1::State::Failed,
        State::Unknown => v1::State::Unknown,
        State::Dead => v1::State::Dead,
    }
}

fn outcome(outcome: Outcome) -> v1::Outcome {
    match outcome {
        Outcome::Running => v1::Outcome::Running,
        Outcome::Completed => v1::Outcome::Completed,
        Outcome::FailedRetryable => v1::Outcome::FailedRetryable,
        Outcome::FailedTerminal => v1::Outcome::FailedTerminal,
        Outcome::FailedUnknown => v1::Outcome::FailedUnknown,
        Outcome::LockExpired => v1::Outcome::LockExpired,
    }
}

fn key(key: Key) -> v1::EventKey {
    v1::EventKey { tenant: key.tenant, provider: key.provider, event_id: key.event_id }
}

pub(super) fn lock(lock: Lock) -> v1::Lock {
    v1::Lock {
        fencing_token: lock.fencing_token.0,
        attempt: lock.attempt,
        expire_time: Some(timestamp(lock.expire_time)),
        remaining_duration: Some(duration(lock.remaining)),
        claim_id: lock.claim_id,
    }
}

fn result(result: StoredResult) -> v1::Result {
    v1::Result { code: result.code, body: result.body, content_type: result.content_type }
}

/// The event, and how many keys of its metadata were left out for exceeding the limit.
pub(super) fn event(event: Event) -> (v1::Event, usize) {
    let (metadata, left_out) = if event.metadata.is_none() && event.completion_metadata.is_none() {
        (None, 0)
    } else {
        let merged = metadata::merged(event.metadata.as_deref(), event.completion_metadata.as_deref());
        (Some(structure(merged.metadata)), merged.left_out)
    };
    let (holder, lock_expire_time) = match event.latest {
        Some(latest) => (latest.holder, Some(timestamp(latest.lock_expire_time))),
        None => (String::new(), None),
    };
    let event = v1::Event {
        key: Some(key(event.key)),
        event_type: event.event_type,
        state: state(event.state).into(),
        attempt_count: event.attempt_count,
        duplicate_count: event.duplicate_count,
        holder,
        lock_expire_time,
        create_time: Some(timestamp(event.create_time)),
        update_time: Some(timestamp(event.update_time)),
        end_time: event.end_time.map(timestamp),
        last_error: event.last_error.unwrap_or_default(),
        metadata,
        fencing_token: event.fencing_token.0,
        retry_time: event.retry_time.map(timestamp),
        result: event.result.map(result),
    };
    (event, left_out)
}

fn digest(digest: Option<Digest>) -> Bytes {
    digest.map(|digest| Bytes::copy_from_slice(&digest)).unwrap_or_default()
}

fn attempt(attempt: Attempt, body_omitted: bool) -> v1::Attempt {
    v1::Attempt {
        attempt: attempt.attempt,
        fencing_token: attempt.fencing_token.0,
        holder: attempt.holder,
        start_time: Some(timestamp(attempt.start_time)),
        end_time: attempt.end_time.map(timestamp),
        outcome: outcome(attempt.outcome).into(),
        error: attempt.error.unwrap_or_default(),
        claim_id: attempt.claim_id,
        payload_digest: digest(attempt.payload_digest),
        result: attempt.result.map(result),
        body_omitted,
    }
}

fn resolution(resolution: Resolution) -> v1::Resolution {
    v1::Resolution {
        from_state: state(resolution.from_state).into(),
        to_state: state(resolution.to_state).into(),
        reason: resolution.reason,
        actor: resolution.actor,
        time: Some(timestamp(resolution.time)),
    }
}

pub(super) fn event_history(history: EventHistory) -> v1::EventHistory {
    let mismatch_count = history.event.mismatch_count;
    let last_mismatch_time = history.event.last_mismatch_time.map(timestamp);
    let attempts_omitted = history.attempts.first().map_or(0, |first| first.attempt - 1);
    let without_body = history.bodies_omitted;
    let attempts = history.attempts.into_iter().map(|of| {
        let body_omitted = without_body.contains(&of.attempt);
        attempt(of, body_omitted)
    });
    v1::EventHistory {
        event: Some(event(history.event).0),
        attempts: attempts.collect(),
        mismatch_count,
        last_mismatch_time,
        resolutions: history.resolutions.into_iter().map(resolution).collect(),
        attempts_omitted,
    }
}

/// An event of a listing, without its attempts.
pub(super) fn listed(of: Event) -> v1::EventHistory {
    event_history(EventHistory {
        event: of,
        attempts: Vec::new(),
        bodies_omitted: BTreeSet::new(),
        resolutions: Vec::new(),
    })
}

/// A duplicate's answer from the cache: only what the contract requires is set.
pub(super) fn completed(of: Key, completion: Completion) -> v1::CheckAndLockResponse {
    let result = completion.result.map(result);
    v1::CheckAndLockResponse {
        decision: v1::Decision::AlreadyCompleted.into(),
        lock: None,
        event: Some(v1::Event {
            key: Some(key(of)),
            state: v1::State::Completed.into(),
            attempt_count: completion.attempt_count,
            fencing_token: completion.fencing_token.0,
            end_time: Some(timestamp(completion.end_time)),
            result: result.clone(),
            ..v1::Event::default()
        }),
        result,
        retry_after: None,
    }
}

pub(super) fn claimed(claimed: Claimed) -> v1::CheckAndLockResponse {
    let (event, _) = event(claimed.event);
    let mut response = v1::CheckAndLockResponse::default();
    match claimed.decision {
        Decision::Acquired(granted) => {
            response.set_decision(v1::Decision::Acquired);
            response.lock = Some(lock(granted));
        }
        Decision::InProgress { retry_after } => {
            response.set_decision(v1::Decision::InProgress);
            response.retry_after = Some(duration(retry_after));
        }
        Decision::AlreadyCompleted => {
            response.set_decision(v1::Decision::AlreadyCompleted);
            response.result.clone_from(&event.result);
        }
        Decision::Refused => response.set_decision(v1::Decision::Refused),
    }
    response.event = Some(event);
    response
}

fn counts(counts: &Counts, times: Option<Percentiles>) -> v1::Counts {
    v1::Counts {
        total: counts.total(),
        states: State::ALL
            .into_iter()
            .zip(counts.states)
            .map(|(at, count)| v1::StateCount { state: state(at).into(), count })
            .collect(),
        duplicates: counts.duplicates,
        retries: counts.retries,
        stuck: counts.stuck,
        processing_p50: times.map(|times| duration(times.p50)),
        processing_p95: times.map(|times| duration(times.p95)),
        processing_p99: times.map(|times| duration(times.p99)),
    }
}

/// The report, with buckets where they were asked for.
pub(super) fn stats(report: StatsReport, bucketed: bool) -> v1::StatsResponse {
    let (mut total, mut all_timings) = (Counts::default(), Timings::default());
    let mut providers: BTreeMap<String, Counts> = BTreeMap::new();
    let mut buckets: Vec<v1::Bucket> = Vec::new();
    for (place, found) in report.counts {
        let times = report.percentiles.get(&place).copied();
        let (start, provider) = place;
        total.add(&found);
        if bucketed {
            let start_time = Some(timestamp(start));
            let of_provider = v1::ProviderCounts { provider: provider.clone(), counts: Some(counts(&found, times)) };
            // In the order of their start.
            match buckets.last_mut().filter(|last| last.start_time == start_time) {
                Some(last) => last.providers.push(of_provider),
                None => buckets.push(v1::Bucket { start_time, providers: vec![of_provider] }),
            }
        }
        providers.entry(provider).or_default().add(&found);
    }
    for timings in providers.keys().filter_map(|provider| report.timings.get(provider)) {
        all_timings.add_all(timings);
    }
    v1::StatsResponse {
        total: Some(counts(&total, all_timings.percentiles())),
        providers: providers
            .into_iter()
            .map(|(provider, found)| {
                let times = report.timings.get(&provider).and_then(|times| Timings::from(times).percentiles());
                v1::ProviderCounts { provider, counts: Some(counts(&found, times)) }
            })
            .collect(),
        buckets,
        as_of_time: Some(timestamp(report.as_of)),
    }
}

/// A JSON object as the API has it. Numbers become doubles, as they were when they came.
fn structure(object: Map<String, serde_json::Value>) -> Struct {
    Struct { fields: object.into_iter().map(|(key, value)| (key, protobuf_value(value))).collect() }
}

fn protobuf_value(value: serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(value) => Kind::BoolValue(value),
        serde_json::Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        serde_json::Value::String(value) => Kind::StringValue(value),
        serde_json::Value::Array(values) => {
            Kind::ListValue(ListValue { values: values.into_iter().map(protobuf_value).collect() })
        }
        serde_json::Value::Object(object) => Kind::StructValue(structure(object)),
    };
    Value { kind: Some(kind) }
}
