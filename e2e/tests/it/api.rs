//! The API over real sockets, on each ledger: what a client in any language sees.

mod bounds;
mod metadata;
mod stats;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use oncegate_api::{
    reason,
    v1::{self, Decision, State, idempotency_service_client::IdempotencyServiceClient},
};
use oncegate_e2e::eventually;
use oncegate_sidecar::{
    Sidecar,
    cache::CacheSettings,
    config::{Policy, Settings, Store},
    coordinator::Limits,
};
use tempfile::TempDir;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_types::StatusExt as _;

use crate::setup::{Ledger, on_each_ledger};

/// A sidecar on a port of its own.
struct Served {
    client: IdempotencyServiceClient<Channel>,
    channel: Channel,
    service: oncegate_sidecar::grpc::Service,
    metrics: oncegate_runtime::admin::Metrics,
    shutdown: CancellationToken,
    running: AbortOnDropHandle<Result<(), oncegate_sidecar::RunError>>,
    ledger: Ledger,
    directory: TempDir,
}

impl Served {
    async fn start(ledger: Ledger) -> Result<Served> {
        Served::with_limits(ledger, Limits::default()).await
    }

    async fn with_limits(ledger: Ledger, limits: Limits) -> Result<Served> {
        let directory = tempfile::tempdir()?;
        let store = match &ledger {
            Ledger::Sqlite => Store::Embedded(directory.path().join("oncegate.db")),
            Ledger::Postgres(database) => {
                let source =
                    oncegate_runtime::secret::SecretSource::choose("DATABASE_URL", Some(database.url().parse()?), None);
                Store::Postgres(source.map_err(|problem| anyhow::anyhow!("{problem}"))?.context("a URL")?)
            }
        };
        let settings = Settings {
            listen: Some(std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()),
            access: oncegate_sidecar::config::Access::open(),
            store,
            migrate: false,
            policy: Policy::default(),
            cache: CacheSettings::default(),
            limits,
            count_interval: Duration::from_secs(15),
            drain: Duration::from_secs(5),
        };
        let sidecar = Sidecar::start(settings).await?;
        let address = sidecar.local_addr().context("a listener")?.clone();
        let (service, metrics) = (sidecar.service(), sidecar.metrics());
        let shutdown = CancellationToken::new();
        let running = AbortOnDropHandle::new(tokio::spawn(sidecar.run(shutdown.clone())));
        let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
        let client = IdempotencyServiceClient::new(channel.clone());
        Ok(Served { client, channel, service, metrics, shutdown, running, ledger, directory })
    }

    fn client(&self) -> IdempotencyServiceClient<Channel> {
        self.client.clone()
    }

    async fn claim(&self, request: v1::CheckAndLockRequest) -> Result<v1::CheckAndLockResponse, Status> {
        Ok(self.client().check_and_lock(request).await?.into_inner())
    }

    /// Claims an event that nobody holds.
    async fn lock(&self, event_id: &str) -> Result<v1::Lock> {
        self.claim(claim(event_id)).await?.lock.context("the lock")
    }

    async fn complete(&self, event_id: &str, fencing_token: i64) -> Result<v1::MarkCompletedResponse, Status> {
        let request = v1::MarkCompletedRequest {
            key: key(event_id),
            fencing_token,
            result: Some(v1::Result { code: 200, body: b"done".as_slice().into(), content_type: "text/plain".into() }),
            ..Default::default()
        };
        Ok(self.client().mark_completed(request).await?.into_inner())
    }
}

fn key(event_id: &str) -> Option<v1::EventKey> {
    Some(v1::EventKey { tenant: String::new(), provider: "stripe".into(), event_id: event_id.into() })
}

fn claim(event_id: &str) -> v1::CheckAndLockRequest {
    v1::CheckAndLockRequest { key: key(event_id), event_type: "charge.succeeded".into(), ..Default::default() }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// The reason of a status, which has to be the only `ErrorInfo`.
fn reason_of(status: &Status) -> String {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, reason::DOMAIN);
    assert!(reason::ALL.contains(&info.reason.as_str()), "{} is not documented", info.reason);
    info.reason
}

on_each_ledger!(
    the_whole_life_of_an_event,
    each_refusal_has_its_code_and_reason,
    a_waiting_caller_gets_the_outcome_of_the_running_attempt,
    a_waiting_caller_gets_the_lock_when_the_pause_ends,
    one_waiting_caller_gets_the_lock_when_the_attempt_fails,
    those_who_wait_on_a_connection_leave_room_for_the_mark_that_they_wait_for,
    a_waiting_call_is_counted_once,
    an_elapsed_deadline_is_deadline_exceeded,
    resolve_replays_and_is_on_record,
    cleanup_spares_what_is_young,
    shutdown_ends_open_watches_and_waits_within_its_bound,
    metadata_results_and_digests_come_back_as_they_were_given,
    a_history_fits_into_a_message_whatever_its_results,
    buckets_of_an_open_range_are_limited,
    percentiles_are_told_unless_they_are_not_wanted,
);

async fn the_whole_life_of_an_event(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let granted = served.claim(claim("evt_1")).await?;
    assert_eq!(granted.decision(), Decision::Acquired);
    let lock = granted.lock.context("a lock")?;
    assert_eq!(lock.attempt, 1);
    assert_eq!(lock.remaining_duration, seconds(300));
    let event = granted.event.context("an event")?;
    assert_eq!(event.key.context("a key")?.tenant, "default");
    assert_eq!(event.state, i32::from(State::Processing));

    let duplicate = served.claim(claim("evt_1")).await?;
    assert_eq!(duplicate.decision(), Decision::InProgress);
    assert!(duplicate.lock.is_none());
    assert!(duplicate.retry_after.context("when to ask again")?.seconds >= 298);

    let extended = served
        .client()
        .extend_lock(v1::ExtendLockRequest {
            key: key("evt_1"),
            fencing_token: lock.fencing_token,
            lock_duration: seconds(600),
            ..Default::default()
        })
        .await?
        .into_inner();
    assert!(extended.lock.context("a lock")?.remaining_duration.context("a rest")?.seconds >= 599);

    let completed = served.complete("evt_1", lock.fencing_token).await?;
    assert!(!completed.repeated);
    assert_eq!(completed.event.context("an event")?.state, i32::from(State::Completed));
    assert!(served.complete("evt_1", lock.fencing_token).await?.repeated);

    let duplicate = served.claim(claim("evt_1")).await?;
    assert_eq!(duplicate.decision(), Decision::AlreadyCompleted);
    assert_eq!(duplicate.result.context("the result")?.body.as_ref(), b"done");

    // Duplicates are written each second.
    eventually("both duplicates are counted", async || {
        let request = v1::HistoryRequest { key: key("evt_1"), ..Default::default() };
        let history = served.client().history(request).await.ok()?.into_inner();
        let event = history.events.first()?;
        assert_eq!(event.attempts.len(), 1);
        (event.event.as_ref()?.duplicate_count == 2).then_some(())
    })
    .await;
    let stats = served.client().stats(v1::StatsRequest::default()).await?.into_inner();
    let total = stats.total.context("a total")?;
    assert_eq!((total.total, total.duplicates, total.retries, total.stuck), (1, 2, 0, 0));
    assert_eq!(total.states.len(), 6);
    Ok(())
}

async fn each_refusal_has_its_code_and_reason(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.claim(v1::CheckAndLockRequest {
        claim_id: "first".into(),
        fingerprint: vec![1; 32].into(),
        payload_digest: vec![1; 32].into(),
        delivery_id: "delivery".into(),
        ..claim("evt_1")
    });
    let lock = lock.await?.lock.context("a lock")?;

    let mismatch = v1::CheckAndLockRequest { fingerprint: vec![2; 32].into(), ..claim("evt_1") };
    let status = served.claim(mismatch).await.expect_err("another fingerprint");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::FailedPrecondition, reason::FINGERPRINT_MISMATCH));

    // Whatever the event.
    let forged = v1::CheckAndLockRequest {
        payload_digest: vec![2; 32].into(),
        delivery_id: "delivery".into(),
        ..claim("evt_other")
    };
    let status = served.claim(forged).await.expect_err("a known delivery with another payload");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::FailedPrecondition, reason::DELIVERY_MISMATCH));
    let request = v1::HistoryRequest { key: key("evt_other"), ..Default::default() };
    let status = served.client().history(request).await.expect_err("no row");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::NotFound, reason::EVENT_NOT_FOUND));

    let status = served.complete("evt_1", lock.fencing_token + 1).await.expect_err("another token");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::Aborted, reason::LOCK_LOST));
    let info = status.get_details_error_info().context("details")?;
    assert_eq!(info.metadata.get("state").map(String::as_str), Some("STATE_PROCESSING"));
    assert_eq!(info.metadata.get("fencing_token"), Some(&lock.fencing_token.to_string()));

    served.complete("evt_1", lock.fencing_token).await?;
    let failed = v1::MarkFailedRequest { key: key("evt_1"), fencing_token: lock.fencing_token, ..Default::default() };
    let status = served.client().mark_failed(failed).await.expect_err("it was completed");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::FailedPrecondition, reason::OUTCOME_CONFLICT));

    let late = v1::CheckAndLockRequest { claim_id: "first".into(), ..claim("evt_1") };
    let status = served.claim(late).await.expect_err("a late copy");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::FailedPrecondition, reason::CLAIM_ENDED));

    let status = served.client().resolve(resolve("evt_1", State::Pending, false)).await.expect_err("no force");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::FailedPrecondition, reason::STATE_CONFLICT));

    let status = served.complete("evt_unknown", 1).await.expect_err("no such event");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::NotFound, reason::EVENT_NOT_FOUND));

    let status = served.claim(v1::CheckAndLockRequest::default()).await.expect_err("nothing given");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::InvalidArgument, reason::INVALID_FIELD));
    let fields = status.get_details_bad_request().context("violations")?.field_violations;
    assert_eq!(fields.iter().map(|f| f.field.as_str()).collect::<Vec<_>>(), ["key", "event_type"]);

    // Over the message limit, and an unknown method: the framework's errors carry a reason as well.
    let large = v1::CheckAndLockRequest { holder: "h".repeat(2 << 20), ..claim("evt_1") };
    let status = served.claim(large).await.expect_err("too large");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::InvalidArgument, reason::INVALID_FIELD));
    Ok(())
}

fn resolve(event_id: &str, to: State, force: bool) -> v1::ResolveRequest {
    v1::ResolveRequest {
        key: key(event_id),
        to: to.into(),
        force,
        reason: "a test".into(),
        actor: "ada".into(),
        ..Default::default()
    }
}

/// A claim that waits for its answer.
type Waiting = AbortOnDropHandle<Result<v1::CheckAndLockResponse, Status>>;

/// Sends claims that wait, and returns once all of them have taken their seats.
async fn waiting(served: &Served, event_id: &str, claims: usize) -> Vec<Waiting> {
    let request = v1::CheckAndLockRequest { wait_duration: seconds(20), ..claim(event_id) };
    let ask = |_| {
        let (mut client, request) = (served.client(), request.clone());
        AbortOnDropHandle::new(tokio::spawn(async move { Ok(client.check_and_lock(request).await?.into_inner()) }))
    };
    let waiting = (0..claims).map(ask).collect();
    let line = format!("\noncegate_calls_waiting {claims}\n");
    eventually("they wait", async || (served.metrics)().contains(&line).then_some(())).await;
    waiting
}

/// The only one of them.
async fn one_waiting(served: &Served, event_id: &str) -> Waiting {
    waiting(served, event_id, 1).await.remove(0)
}

async fn a_waiting_caller_gets_the_outcome_of_the_running_attempt(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.lock("evt_1").await?;
    let waiter = one_waiting(&served, "evt_1").await;
    served.complete("evt_1", lock.fencing_token).await?;
    // Whose time was over would hear that it is in progress.
    let response = waiter.await??;
    assert_eq!(response.decision(), Decision::AlreadyCompleted);
    assert_eq!(response.result.context("the result")?.code, 200);
    Ok(())
}

async fn a_waiting_caller_gets_the_lock_when_the_pause_ends(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.lock("evt_1").await?;
    let failed = v1::MarkFailedRequest {
        key: key("evt_1"),
        fencing_token: lock.fencing_token,
        error: "not yet".into(),
        retry_after: seconds(1),
        ..Default::default()
    };
    served.client().mark_failed(failed).await?;
    let paused = served.claim(claim("evt_1")).await?;
    assert_eq!(paused.decision(), Decision::InProgress);
    assert!(paused.event.context("an event")?.retry_time.is_some());
    let response = one_waiting(&served, "evt_1").await.await??;
    assert_eq!(response.decision(), Decision::Acquired);
    assert_eq!(response.lock.context("a lock")?.attempt, 2);
    Ok(())
}

async fn one_waiting_caller_gets_the_lock_when_the_attempt_fails(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.lock("evt_1").await?;
    let waiters = waiting(&served, "evt_1", 5).await;
    let failed = v1::MarkFailedRequest { key: key("evt_1"), fencing_token: lock.fencing_token, ..Default::default() };
    served.client().mark_failed(failed).await?;
    let mut tokens = Vec::new();
    // The others learn the outcome of whoever got the lock.
    let mut waiters = futures::stream::FuturesUnordered::from_iter(waiters);
    while let Some(answer) = futures::StreamExt::next(&mut waiters).await {
        let response = answer??;
        match response.decision() {
            Decision::Acquired => {
                let lock = response.lock.context("a lock")?;
                tokens.push(lock.fencing_token);
                served.complete("evt_1", lock.fencing_token).await?;
            }
            other => assert_eq!(other, Decision::AlreadyCompleted),
        }
    }
    assert_eq!(tokens.len(), 1);
    assert!(tokens[0] > lock.fencing_token);
    Ok(())
}

async fn those_who_wait_on_a_connection_leave_room_for_the_mark_that_they_wait_for(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.lock("evt_1").await?;
    let waiters = waiting(&served, "evt_1", 600).await;
    served.complete("evt_1", lock.fencing_token).await?;
    for waiter in waiters {
        assert_eq!(waiter.await??.decision(), Decision::AlreadyCompleted);
    }
    Ok(())
}

async fn a_waiting_call_is_counted_once(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.lock("evt_1").await?;
    let request = v1::CheckAndLockRequest { wait_duration: seconds(1), ..claim("evt_1") };
    assert_eq!(served.claim(request).await?.decision(), Decision::InProgress);
    let waiter = one_waiting(&served, "evt_1").await;
    served.complete("evt_1", lock.fencing_token).await?;
    waiter.await??;
    eventually("two calls are counted, no more", async || {
        let stats = served.client().stats(v1::StatsRequest::default()).await.ok()?.into_inner();
        let duplicates = stats.total?.duplicates;
        assert!(duplicates <= 2, "{duplicates}");
        (duplicates == 2).then_some(())
    })
    .await;
    Ok(())
}

async fn an_elapsed_deadline_is_deadline_exceeded(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    served.lock("evt_1").await?;
    // Past tonic's channel, which reads the header itself and gives up with a status of its own.
    let mut client = IdempotencyServiceClient::new(served.service.clone());
    let mut request = Request::new(v1::CheckAndLockRequest { wait_duration: seconds(20), ..claim("evt_1") });
    request.metadata_mut().insert("grpc-timeout", "100m".parse()?);
    let status = client.check_and_lock(request).await.expect_err("the deadline");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::DeadlineExceeded, reason::DEADLINE_EXCEEDED));
    Ok(())
}

async fn resolve_replays_and_is_on_record(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.lock("evt_1").await?;
    let unknown = v1::MarkFailedRequest {
        key: key("evt_1"),
        fencing_token: lock.fencing_token,
        kind: v1::FailureKind::Unknown.into(),
        error: "timed out".into(),
        ..Default::default()
    };
    served.client().mark_failed(unknown).await?;
    assert_eq!(served.claim(claim("evt_1")).await?.decision(), Decision::Refused);
    let decision = v1::ResolveRequest { fencing_token: lock.fencing_token, ..resolve("evt_1", State::Pending, false) };
    let resolved = served.client().resolve(decision.clone()).await?.into_inner().event.context("an event")?;
    assert_eq!(resolved.state, i32::from(State::Pending));
    assert!(resolved.fencing_token > lock.fencing_token);
    // A repetition, after a lost reply.
    let again = served.client().resolve(decision).await?.into_inner().event.context("an event")?;
    assert_eq!(again.fencing_token, resolved.fencing_token);
    let second = served.lock("evt_1").await?;
    assert_eq!(second.attempt, 2);
    let request = v1::HistoryRequest { key: key("evt_1"), ..Default::default() };
    let history = served.client().history(request).await?.into_inner().events.remove(0);
    assert_eq!(history.attempts.len(), 2);
    assert_eq!(history.attempts[0].error, "timed out");
    assert_eq!(history.resolutions.len(), 1);
    assert_eq!(history.resolutions[0].actor, "ada");
    assert_eq!(history.resolutions[0].from_state, i32::from(State::Unknown));
    Ok(())
}

async fn cleanup_spares_what_is_young(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let lock = served.lock("evt_1").await?;
    served.complete("evt_1", lock.fencing_token).await?;
    for dry_run in [true, false] {
        let mut stream =
            served.client().cleanup(v1::CleanupRequest { dry_run, ..Default::default() }).await?.into_inner();
        let mut last = None;
        while let Some(message) = stream.message().await? {
            last = Some(message);
        }
        let last = last.context("a message")?;
        assert!(last.done);
        assert_eq!((last.matched_count, last.deleted_count), (0, 0));
    }
    let young = v1::CleanupRequest { older_than: seconds(3_600), ..Default::default() };
    let status = served.client().cleanup(young).await.expect_err("below the minimum retention");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::InvalidArgument, reason::INVALID_FIELD));
    assert_eq!(served.claim(claim("evt_1")).await?.decision(), Decision::AlreadyCompleted, "it is still there");
    Ok(())
}

// T31
async fn shutdown_ends_open_watches_and_waits_within_its_bound(ledger: Ledger) -> Result<()> {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let served = Served::start(ledger).await?;
    served.lock("evt_1").await?;
    let mut health = HealthClient::new(served.channel.clone());
    let mut watch = health.watch(HealthCheckRequest { service: String::new() }).await?.into_inner();
    let serving = i32::from(tonic_health::pb::health_check_response::ServingStatus::Serving);
    while watch.message().await?.context("a status")?.status != serving {}
    let waiter = one_waiting(&served, "evt_1").await;
    let began = Instant::now();
    served.shutdown.cancel();
    let response = waiter.await??;
    assert_eq!(response.decision(), Decision::InProgress);
    served.running.await??;
    assert!(began.elapsed() < Duration::from_secs(4), "the watch did not hold up the drain");
    Ok(())
}

async fn metadata_results_and_digests_come_back_as_they_were_given(ledger: Ledger) -> Result<()> {
    use prost_types::{Struct, Value, value::Kind};
    let served = Served::start(ledger).await?;
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.into())) };
    let metadata = |pairs: &[(&str, Value)]| Struct {
        fields: pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect(),
    };
    let first = metadata(&[("order", text("42")), ("amount", Value { kind: Some(Kind::NumberValue(12.5)) })]);
    let request = v1::CheckAndLockRequest {
        metadata: Some(first.clone()),
        payload_digest: vec![7; 32].into(),
        holder: "pod-1".into(),
        claim_id: "claim-1".into(),
        ..claim("evt_1")
    };
    let granted = served.claim(request).await?;
    assert_eq!(granted.event.context("an event")?.metadata, Some(first));
    let lock = granted.lock.context("a lock")?;
    assert_eq!(lock.claim_id, "claim-1");
    let mark = v1::MarkCompletedRequest {
        key: key("evt_1"),
        fencing_token: lock.fencing_token,
        claim_id: "claim-1".into(),
        metadata: Some(metadata(&[("order", text("43")), ("note", Value { kind: Some(Kind::NullValue(0)) })])),
        ..Default::default()
    };
    let event = served.client().mark_completed(mark).await?.into_inner().event.context("an event")?;
    let fields = event.metadata.context("metadata")?.fields;
    assert_eq!(fields.get("order"), Some(&text("43")));
    assert_eq!(fields.get("note"), Some(&Value { kind: Some(Kind::NullValue(0)) }));
    assert_eq!(fields.len(), 3);
    let request = v1::HistoryRequest { key: key("evt_1"), ..Default::default() };
    let history = served.client().history(request).await?.into_inner().events.remove(0);
    assert_eq!(history.attempts[0].payload_digest.as_ref(), [7; 32]);
    assert_eq!(history.attempts[0].holder, "pod-1");
    assert_eq!(history.attempts[0].outcome, i32::from(v1::Outcome::Completed));
    Ok(())
}

// A client in any language takes 4 MiB unless told otherwise.
async fn a_history_fits_into_a_message_whatever_its_results(ledger: Ledger) -> Result<()> {
    const ATTEMPTS: i32 = 70;
    let served = Served::start(ledger).await?;
    for _ in 0..ATTEMPTS {
        let lock = served.lock("evt").await?;
        let failed = v1::MarkFailedRequest {
            key: key("evt"),
            fencing_token: lock.fencing_token,
            kind: v1::FailureKind::Retryable.into(),
            retry_after: seconds(0),
            result: Some(v1::Result { code: 502, body: vec![7; 64 << 10].into(), ..Default::default() }),
            ..Default::default()
        };
        served.client().mark_failed(failed).await?;
    }
    let asked = v1::HistoryRequest { key: key("evt"), ..Default::default() };
    let mut history = served.client().history(asked).await?.into_inner();
    let attempts = history.events.remove(0).attempts;
    let with_body = attempts.iter().filter(|attempt| !attempt.body_omitted).count();
    assert_eq!((attempts.len(), with_body), (70, 32), "2 MiB of the latest");
    for (place, attempt) in attempts.iter().enumerate() {
        let result = attempt.result.as_ref().context("a result")?;
        let body = if place < 70 - 32 { 0 } else { 64 << 10 };
        assert_eq!((result.code, result.body.len(), attempt.body_omitted), (502, body, body == 0), "{place}");
    }
    Ok(())
}

/// Two completions, each of which took a second, with more than 1,000 hours between them.
async fn plant_completions_far_apart(served: &Served) -> Result<()> {
    match &served.ledger {
        Ledger::Sqlite => rusqlite::Connection::open(served.directory.path().join("oncegate.db"))?.execute_batch(
            "insert into payment_webhook_counts (tenant, provider, hour, completed)
            values ('default', 'stripe', 1728000000000000, 1), ('default', 'stripe', 1731603600000000, 1);
            insert into payment_webhook_timings
            values ('default', 'stripe', 1728000000000000, 509, 1), ('default', 'stripe', 1731603600000000, 509, 1)",
        )?,
        Ledger::Postgres(database) => {
            let sql = "insert into payment_webhook_counts (slot, tenant, provider, hour, completed)
                values (1, 'default', 'stripe', to_timestamp(1728000000), 1),
                    (1, 'default', 'stripe', to_timestamp(1731603600), 1);
                insert into payment_webhook_timings
                values (1, 'default', 'stripe', to_timestamp(1728000000), '{509}', '{1}'),
                    (1, 'default', 'stripe', to_timestamp(1731603600), '{509}', '{1}')";
            sqlx::raw_sql(sql).execute(&mut database.connect().await?).await?;
        }
    }
    Ok(())
}

async fn buckets_of_an_open_range_are_limited(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    plant_completions_far_apart(&served).await?;
    let asked = |hours: i64| v1::StatsRequest { bucket_duration: seconds(hours * 3_600), ..Default::default() };
    let status = served.client().stats(asked(1)).await.expect_err("too many buckets");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::InvalidArgument, reason::INVALID_FIELD));
    let told = "gives 1002 buckets in the time asked for, and at most 1000 are permitted";
    assert!(status.message().contains(told), "{status:?}");
    let stats = served.client().stats(asked(2)).await?.into_inner();
    assert_eq!(stats.buckets.len(), 2);
    for bucket in stats.buckets {
        let counts = bucket.providers[0].counts.as_ref().context("counts")?;
        assert!(counts.total == 1 && counts.processing_p99.is_some(), "{counts:?}");
    }
    Ok(())
}

async fn percentiles_are_told_unless_they_are_not_wanted(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    plant_completions_far_apart(&served).await?;
    for without_percentiles in [false, true] {
        let asked = v1::StatsRequest { without_percentiles, ..Default::default() };
        let stats = served.client().stats(asked).await?.into_inner();
        let of_provider = stats.providers.first().and_then(|of| of.counts.clone()).context("a provider")?;
        for counts in [stats.total.context("a total")?, of_provider] {
            assert_eq!(counts.total, 2);
            for told in [counts.processing_p50, counts.processing_p95, counts.processing_p99] {
                assert_eq!(told.is_none(), without_percentiles, "{told:?}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn reflection_and_unknown_methods_are_answered() -> Result<()> {
    use tonic_reflection::pb::{v1, v1alpha};
    let served = Served::start(Ledger::Sqlite).await?;
    let names = |services: Vec<String>| {
        assert!(services.contains(&"oncegate.v1.IdempotencyService".to_owned()), "{services:?}");
        assert!(services.contains(&"grpc.health.v1.Health".to_owned()), "{services:?}");
    };

    let request = v1::ServerReflectionRequest {
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(served.channel.clone());
    let mut answers = client.server_reflection_info(futures::stream::iter([request])).await?.into_inner();
    let answer = answers.message().await?.context("an answer")?.message_response;
    match answer.context("a response")? {
        v1::server_reflection_response::MessageResponse::ListServicesResponse(list) => {
            names(list.service.into_iter().map(|service| service.name).collect());
        }
        other => panic!("{other:?}"),
    }

    // What older grpcurl speaks.
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(served.channel.clone());
    let mut answers = client.server_reflection_info(futures::stream::iter([request])).await?.into_inner();
    let answer = answers.message().await?.context("an answer")?.message_response;
    match answer.context("a response")? {
        v1alpha::server_reflection_response::MessageResponse::ListServicesResponse(list) => {
            names(list.service.into_iter().map(|service| service.name).collect());
        }
        other => panic!("{other:?}"),
    }

    let mut grpc = tonic::client::Grpc::new(served.channel.clone());
    grpc.ready().await?;
    let path = http::uri::PathAndQuery::from_static("/oncegate.v1.IdempotencyService/Forget");
    let codec = tonic_prost::ProstCodec::<v1::ServerReflectionRequest, v1::ServerReflectionRequest>::default();
    let status = grpc.unary(Request::new(v1::ServerReflectionRequest::default()), path, codec).await;
    let status = status.expect_err("no such method");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::Unimplemented, reason::UNIMPLEMENTED));
    Ok(())
}
