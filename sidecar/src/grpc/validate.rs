//! From the API's messages to the domain, with every limit of the contract (`oncegate_api::limits`) checked here and
//! nowhere else. All violations of a request are reported at once, each naming the field, the limit, and what was given
//! (never a whole value: it may be large or private).

mod fields;

use std::time::Duration;

use bytes::Bytes;
use oncegate_api::{
    limits::{
        ACTOR_BYTES_MAX, BATCH_SIZE_MAX, BUCKETS_MAX, CLAIM_ID_BYTES_MAX, CONTENT_TYPE_BYTES_MAX, COUNTS_MAX,
        DELIVERY_ID_BYTES_MAX, ERROR_BYTES_MAX, EVENT_ID_BYTES_MAX, EVENT_TYPE_BYTES_MAX, HOLDER_BYTES_MAX,
        LOCK_DURATION_MAX, LOCK_DURATION_MIN, PAGE_SIZE_MAX, PROVIDER_BYTES_MAX, REASON_BYTES_MAX,
        RESULT_BODY_BYTES_MAX, RETRY_AFTER_MAX, STATS_BYTES_MAX, TENANT_BYTES_MAX, WAIT_DURATION_MAX,
    },
    v1,
};
use oncegate_runtime::config::ShownDuration;
use tonic::Status;

use self::fields::{Charset, Fields};
use super::page_token;
use crate::{
    config::Policy,
    event::{
        Claim, Ending, Extend, FailureKind, FencingToken, Key, Mark, Micros, Resolve, Resolved, State, StoredResult,
        Time,
    },
    ledger::filter::{HistoryFilter, StatsFilter, buckets_between},
};

const PAGE_SIZE_DEFAULT: usize = 50;
const BATCH_SIZE_DEFAULT: usize = 1_000;
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(24 * 3_600);
const CLEANUP_AGE_DEFAULT: Duration = Duration::from_secs(30 * 24 * 3_600);
/// An age beyond this must be a mistake in the unit.
const CLEANUP_AGE_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);

/// Stands in for a key too broken to use; never leaves this module, since the request is refused.
fn no_key() -> Key {
    Key { tenant: String::new(), provider: String::new(), event_id: String::new() }
}

fn key(fields: &mut Fields, given: Option<v1::EventKey>) -> Key {
    let Some(given) = given else {
        fields.violation("key", "is required");
        return no_key();
    };
    fields.text("key.tenant", &given.tenant, 0..=TENANT_BYTES_MAX, Charset::Name);
    fields.text("key.provider", &given.provider, 1..=PROVIDER_BYTES_MAX, Charset::LowerName);
    fields.text("key.event_id", &given.event_id, 1..=EVENT_ID_BYTES_MAX, Charset::Visible);
    let tenant = if given.tenant.is_empty() { "default".to_owned() } else { given.tenant };
    Key { tenant, provider: given.provider, event_id: given.event_id }
}

fn optional_text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn claim_id(fields: &mut Fields, given: String) -> Option<String> {
    fields.text("claim_id", &given, 0..=CLAIM_ID_BYTES_MAX, Charset::Visible);
    optional_text(given)
}

fn fencing_token(fields: &mut Fields, given: i64) -> FencingToken {
    match given {
        0 => fields.violation("fencing_token", "is required"),
        i64::MIN..0 => fields.violation("fencing_token", format!("must be positive, not {given}")),
        1.. => {}
    }
    FencingToken(given)
}

fn result(fields: &mut Fields, given: Option<v1::Result>) -> Option<StoredResult> {
    let given = given?;
    fields.bytes_max("result.body", given.body.len(), RESULT_BODY_BYTES_MAX);
    fields.text("result.content_type", &given.content_type, 0..=CONTENT_TYPE_BYTES_MAX, Charset::Printable);
    Some(StoredResult { code: given.code, body: given.body, content_type: given.content_type })
}

fn lock_duration(fields: &mut Fields, given: Option<prost_types::Duration>, policy: &Policy) -> Micros {
    fields
        .duration("lock_duration", given, LOCK_DURATION_MIN..=LOCK_DURATION_MAX)
        .map_or(policy.lock_duration, Micros::from)
}

/// CheckAndLock: the claim, and how long to wait.
///
/// # Errors
/// INVALID_ARGUMENT with every field that breaks the contract.
pub fn check_and_lock(request: v1::CheckAndLockRequest, policy: &Policy) -> Result<(Claim, Duration), Status> {
    let mut fields = Fields::default();
    let key = key(&mut fields, request.key);
    fields.text("event_type", &request.event_type, 1..=EVENT_TYPE_BYTES_MAX, Charset::Visible);
    let claim_id = claim_id(&mut fields, request.claim_id);
    fields.text("holder", &request.holder, 0..=HOLDER_BYTES_MAX, Charset::Printable);
    let lock_duration = lock_duration(&mut fields, request.lock_duration, policy);
    let fingerprint = fields.digest("fingerprint", &request.fingerprint);
    let metadata = fields.metadata("metadata", request.metadata);
    let wait = fields.duration("wait_duration", request.wait_duration, Duration::ZERO..=WAIT_DURATION_MAX);
    let payload_digest = fields.digest("payload_digest", &request.payload_digest);
    fields.text("delivery_id", &request.delivery_id, 0..=DELIVERY_ID_BYTES_MAX, Charset::Visible);
    fields.finish()?;
    let attempts_max = policy.attempts_max(&key.provider);
    let claim = Claim {
        key,
        event_type: request.event_type,
        claim_id: claim_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        holder: request.holder,
        lock_duration,
        fingerprint,
        metadata,
        payload_digest,
        delivery_id: optional_text(request.delivery_id),
        attempts_max,
        waiting: false,
    };
    Ok((claim, wait.unwrap_or_default()))
}

/// ExtendLock.
pub(crate) fn extend_lock(request: v1::ExtendLockRequest, policy: &Policy) -> Result<Extend, Status> {
    let mut fields = Fields::default();
    let extend = Extend {
        key: key(&mut fields, request.key),
        fencing_token: fencing_token(&mut fields, request.fencing_token),
        claim_id: claim_id(&mut fields, request.claim_id),
        lock_duration: lock_duration(&mut fields, request.lock_duration, policy),
    };
    fields.finish()?;
    Ok(extend)
}

/// MarkCompleted. Metadata is never a violation here, since it must not make a completion fail. Also returns how many of
/// its keys were left out.
///
/// # Errors
/// INVALID_ARGUMENT with every field that breaks the contract.
pub fn mark_completed(request: v1::MarkCompletedRequest, policy: &Policy) -> Result<(Mark, usize), Status> {
    let mut fields = Fields::default();
    let (metadata, left_out) = fields::metadata_of_completion(request.metadata);
    let key = key(&mut fields, request.key);
    let attempts_max = policy.attempts_max(&key.provider);
    let mark = Mark {
        key,
        fencing_token: fencing_token(&mut fields, request.fencing_token),
        claim_id: claim_id(&mut fields, request.claim_id),
        ending: Ending::Completed { metadata },
        result: result(&mut fields, request.result),
        attempts_max,
    };
    fields.finish()?;
    Ok((mark, left_out))
}

/// MarkFailed.
pub(crate) fn mark_failed(request: v1::MarkFailedRequest, policy: &Policy) -> Result<Mark, Status> {
    let mut fields = Fields::default();
    let key = key(&mut fields, request.key);
    let fencing_token = fencing_token(&mut fields, request.fencing_token);
    let kind = match v1::FailureKind::try_from(request.kind) {
        Ok(v1::FailureKind::Unspecified | v1::FailureKind::Retryable) => FailureKind::Retryable,
        Ok(v1::FailureKind::Terminal) => FailureKind::Terminal,
        Ok(v1::FailureKind::Unknown) => FailureKind::Unknown,
        Err(_) => {
            fields.violation("kind", format!("{} is no FailureKind", request.kind));
            FailureKind::Retryable
        }
    };
    fields.text("error", &request.error, 0..=ERROR_BYTES_MAX, Charset::Printable);
    let retry_after = fields.duration("retry_after", request.retry_after, Duration::ZERO..=RETRY_AFTER_MAX);
    let result = result(&mut fields, request.result);
    let claim_id = claim_id(&mut fields, request.claim_id);
    fields.finish()?;
    let attempts_max = policy.attempts_max(&key.provider);
    Ok(Mark {
        key,
        fencing_token,
        claim_id,
        ending: Ending::Failed {
            kind,
            error: optional_text(request.error),
            retry_after: retry_after.map(Micros::from),
        },
        result,
        attempts_max,
    })
}

/// Resolve.
pub(crate) fn resolve(request: v1::ResolveRequest) -> Result<Resolve, Status> {
    let mut fields = Fields::default();
    let key = key(&mut fields, request.key);
    if request.fencing_token < 0 {
        fields.violation("fencing_token", format!("must not be negative, not {}", request.fencing_token));
    }
    let to = match v1::State::try_from(request.to) {
        Ok(v1::State::Pending) => Resolved::Pending,
        Ok(v1::State::Completed) => Resolved::Completed,
        Ok(v1::State::Dead) => Resolved::Dead,
        Ok(v1::State::Unspecified) => {
            fields.violation("to", "is required: STATE_PENDING, STATE_COMPLETED or STATE_DEAD");
            Resolved::Pending
        }
        Ok(other) => {
            fields.violation(
                "to",
                format!("must be STATE_PENDING, STATE_COMPLETED or STATE_DEAD, not {}", other.as_str_name()),
            );
            Resolved::Pending
        }
        Err(_) => {
            fields.violation("to", format!("{} is no State", request.to));
            Resolved::Pending
        }
    };
    fields.text("reason", &request.reason, 1..=REASON_BYTES_MAX, Charset::Printable);
    fields.text("actor", &request.actor, 1..=ACTOR_BYTES_MAX, Charset::Printable);
    let result = result(&mut fields, request.result);
    fields.finish()?;
    Ok(Resolve {
        key,
        fencing_token: (request.fencing_token != 0).then_some(FencingToken(request.fencing_token)),
        to,
        force: request.force,
        reason: request.reason,
        actor: request.actor,
        result,
    })
}

/// What a History request asks for.
pub(crate) enum History {
    /// One event.
    Event(Key),
    /// A listing.
    Page(HistoryFilter),
}

/// History.
pub(crate) fn history(request: v1::HistoryRequest) -> Result<History, Status> {
    let mut fields = Fields::default();
    if let Some(given) = request.key {
        let key = key(&mut fields, Some(given));
        for (field, given) in [
            ("tenant", !request.tenant.is_empty()),
            ("provider", !request.provider.is_empty()),
            ("event_type", !request.event_type.is_empty()),
            ("states", !request.states.is_empty()),
            ("start_time", request.start_time.is_some()),
            ("end_time", request.end_time.is_some()),
            ("page_token", !request.page_token.is_empty()),
        ] {
            if given {
                fields.violation(field, "must not be set together with key");
            }
        }
        // One event is no page, but a caller that asks for a negative one is wrong about something.
        page_size(&mut fields, request.page_size);
        fields.finish()?;
        return Ok(History::Event(key));
    }
    fields.text("tenant", &request.tenant, 0..=TENANT_BYTES_MAX, Charset::Name);
    fields.text("provider", &request.provider, 0..=PROVIDER_BYTES_MAX, Charset::LowerName);
    fields.text("event_type", &request.event_type, 0..=EVENT_TYPE_BYTES_MAX, Charset::Visible);
    let states = states(&mut fields, &request.states);
    let start_time = fields.time("start_time", request.start_time);
    let end_time = fields.time("end_time", request.end_time);
    ordered(&mut fields, start_time, end_time);
    let page_size = page_size(&mut fields, request.page_size);
    let mut filter = HistoryFilter {
        tenant: optional_text(request.tenant),
        provider: optional_text(request.provider),
        event_type: optional_text(request.event_type),
        states,
        start_time,
        end_time,
        page_size,
        after: None,
    };
    if !request.page_token.is_empty() {
        match page_token::decode(&request.page_token, &filter) {
            Ok(after) => filter.after = Some(after),
            Err(error) => fields.violation("page_token", error.to_string()),
        }
    }
    fields.finish()?;
    Ok(History::Page(filter))
}

fn page_size(fields: &mut Fields, given: i32) -> usize {
    match usize::try_from(given) {
        Ok(0) => PAGE_SIZE_DEFAULT,
        Ok(size) => size.min(PAGE_SIZE_MAX),
        Err(_) => {
            fields.violation("page_size", format!("must not be negative, not {given}"));
            PAGE_SIZE_DEFAULT
        }
    }
}

fn states(fields: &mut Fields, given: &[i32]) -> Vec<State> {
    let mut states = Vec::new();
    for (place, number) in given.iter().enumerate() {
        if fields.is_full() {
            break;
        }
        let state = match v1::State::try_from(*number) {
            Ok(v1::State::Pending) => State::Pending,
            Ok(v1::State::Processing) => State::Processing,
            Ok(v1::State::Completed) => State::Completed,
            Ok(v1::State::Failed) => State::Failed,
            Ok(v1::State::Unknown) => State::Unknown,
            Ok(v1::State::Dead) => State::Dead,
            Ok(v1::State::Unspecified) => {
                fields.violation(format!("states[{place}]"), "must not be STATE_UNSPECIFIED");
                continue;
            }
            Err(_) => {
                fields.violation(format!("states[{place}]"), format!("{number} is no State"));
                continue;
            }
        };
        if !states.contains(&state) {
            states.push(state);
        }
    }
    states
}

fn ordered(fields: &mut Fields, start_time: Option<Time>, end_time: Option<Time>) {
    if let (Some(start), Some(end)) = (start_time, end_time)
        && start > end
    {
        fields.violation("end_time", "must not be before start_time");
    }
}

/// Stats. For an open range, the number of buckets is checked once the events have been counted, by
/// [`buckets_within_limit`]; so are the counts, by [`counts_within_limit`], and what they are told in, by
/// [`stats_within_limit`].
pub(crate) fn stats(request: v1::StatsRequest) -> Result<StatsFilter, Status> {
    let mut fields = Fields::default();
    fields.text("tenant", &request.tenant, 0..=TENANT_BYTES_MAX, Charset::Name);
    fields.text("provider", &request.provider, 0..=PROVIDER_BYTES_MAX, Charset::LowerName);
    let start_time = fields.time("start_time", request.start_time);
    let end_time = fields.time("end_time", request.end_time);
    ordered(&mut fields, start_time, end_time);
    let start_time = start_time.map(Time::hour);
    let end_time = end_time.map(Time::hour);
    let bucket = fields.duration("bucket_duration", request.bucket_duration, HOUR..=CLEANUP_AGE_MAX);
    if let Some(bucket) = bucket {
        if bucket.subsec_nanos() != 0 || !bucket.as_secs().is_multiple_of(HOUR.as_secs()) {
            fields.violation("bucket_duration", format!("must be a multiple of 1 h, not {}", ShownDuration(bucket)));
        } else if let (Some(start), Some(end)) = (start_time, end_time) {
            check_buckets(&mut fields, start, end, Micros::from(bucket));
        }
    }
    fields.finish()?;
    Ok(StatsFilter {
        tenant: optional_text(request.tenant),
        provider: optional_text(request.provider),
        start_time,
        end_time,
        bucket: bucket.map(Micros::from),
        buckets_max: BUCKETS_MAX,
        counts_max: COUNTS_MAX,
        by_provider: true,
        timings: !request.without_percentiles,
    })
}

fn check_buckets(fields: &mut Fields, start: Time, end: Time, bucket: Micros) {
    let buckets = buckets_between(start, end, bucket);
    if buckets > BUCKETS_MAX {
        fields.violation(
            "bucket_duration",
            format!("gives {buckets} buckets in the time asked for, and at most {BUCKETS_MAX} are permitted"),
        );
    }
}

/// Whether a report over an open range has no more buckets than permitted. One with more was cut short by the ledger.
pub(crate) fn buckets_within_limit(first: Time, last: Time, bucket: Micros) -> Result<(), Status> {
    let mut fields = Fields::default();
    check_buckets(&mut fields, first, last.plus(bucket), bucket);
    fields.finish()
}

/// Whether a report has no more counts than permitted, one for each provider in each bucket. One with more was cut short by the
/// ledger.
pub(crate) fn counts_within_limit(counts: usize, bucketed: bool) -> Result<(), Status> {
    let limit = format!("more than {COUNTS_MAX} counts, one for each provider");
    stats_permitted(counts <= COUNTS_MAX, bucketed, &limit)
}

/// Whether an answer of Stats has no more bytes than a client takes.
pub(crate) fn stats_within_limit(bytes: usize, bucketed: bool) -> Result<(), Status> {
    let limit = format!("an answer of {bytes} bytes, where {STATS_BYTES_MAX} are permitted");
    stats_permitted(bytes <= STATS_BYTES_MAX, bucketed, &limit)
}

fn stats_permitted(permitted: bool, bucketed: bool, limit: &str) -> Result<(), Status> {
    let mut fields = Fields::default();
    if !permitted && bucketed {
        let way = "ask for longer buckets, a shorter time, or one provider";
        fields.violation("bucket_duration", format!("gives {limit}, bucket by bucket: {way}"));
    } else if !permitted {
        fields.violation("provider", format!("unset gives {limit}: ask for one provider, or for a shorter time"));
    }
    fields.finish()
}

/// What a Cleanup request asks for. The cutoff time is computed from the database's clock.
pub(crate) struct Cleanup {
    pub(crate) tenant: Option<String>,
    pub(crate) provider: Option<String>,
    pub(crate) older_than: Micros,
    pub(crate) states: Vec<State>,
    pub(crate) dry_run: bool,
    pub(crate) batch_size: usize,
}

/// Cleanup.
pub(crate) fn cleanup(request: v1::CleanupRequest, policy: &Policy) -> Result<Cleanup, Status> {
    let mut fields = Fields::default();
    fields.text("tenant", &request.tenant, 0..=TENANT_BYTES_MAX, Charset::Name);
    fields.text("provider", &request.provider, 0..=PROVIDER_BYTES_MAX, Charset::LowerName);
    let older_than = fields.duration("older_than", request.older_than, policy.retention_min..=CLEANUP_AGE_MAX);
    let mut wanted = states(&mut fields, &request.states);
    for state in &wanted {
        if !state.is_deletable() {
            fields.violation("states", format!("{} is never deleted", super::convert::state(*state).as_str_name()));
        }
    }
    if wanted.is_empty() {
        wanted.push(State::Completed);
    }
    let batch_size = match request.batch_size {
        0 => BATCH_SIZE_DEFAULT,
        1..=BATCH_SIZE_MAX => usize::try_from(request.batch_size).unwrap_or(BATCH_SIZE_DEFAULT),
        given => {
            fields.violation("batch_size", format!("must be between 1 and {BATCH_SIZE_MAX}, not {given}"));
            BATCH_SIZE_DEFAULT
        }
    };
    fields.finish()?;
    Ok(Cleanup {
        tenant: optional_text(request.tenant),
        provider: optional_text(request.provider),
        // The default never undercuts the minimum.
        older_than: older_than.unwrap_or(CLEANUP_AGE_DEFAULT.max(policy.retention_min)).into(),
        states: wanted,
        dry_run: request.dry_run,
        batch_size,
    })
}

/// A digest that a field holds, for [`Fields::digest`].
fn digest_of(given: &Bytes) -> Option<[u8; 32]> {
    given.as_ref().try_into().ok()
}

/// A duration in the unit that people would use, for messages.
fn people(span: Duration) -> String {
    if span >= DAY * 2 && span.as_secs().is_multiple_of(DAY.as_secs()) && span.subsec_nanos() == 0 {
        format!("{} days", span.as_secs() / DAY.as_secs())
    } else {
        ShownDuration(span).to_string()
    }
}

#[cfg(test)]
mod tests;
