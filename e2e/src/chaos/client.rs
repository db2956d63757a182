//! Callers whose every call is recorded, with what is known about its end.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Result;
use oncegate_api::{
    reason,
    v1::{
        CheckAndLockRequest, Decision, EventKey, ExtendLockRequest, FailureKind, MarkCompletedRequest,
        MarkFailedRequest, ResolveRequest, State, idempotency_service_client::IdempotencyServiceClient,
    },
};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use super::{
    history::{Call, Ending, Recorder, Reply},
    world::SECRET,
};
use crate::{http_client, stripe};

/// How long a call may take before its caller gives up on it, in addition to the wait it
/// asked for.
const CALL_TIME_MAX: Duration = Duration::from_millis(2_500);

/// How long a provider waits for an answer: longer than a gateway takes.
const WEBHOOK_TIME_MAX: Duration = Duration::from_secs(8);

/// The gateway's path.
const PATH: &str = "/webhooks/payments/stripe";

/// A caller of one sidecar.
#[derive(Clone, Debug)]
pub struct Caller {
    client: IdempotencyServiceClient<Channel>,
    way: Arc<str>,
    recorder: Recorder,
}

/// A claim id that encodes the fingerprint of its claim.
pub fn with_fingerprint(claim_id: &str, fingerprint: u8) -> String {
    format!("{claim_id}#{fingerprint}")
}

/// The fingerprint that a claim came with; none if its id does not encode one.
pub fn fingerprint(claim_id: &str) -> Option<u8> {
    claim_id.rsplit_once('#')?.1.parse().ok()
}

fn key(event: &str) -> Option<EventKey> {
    Some(EventKey { provider: "stripe".into(), event_id: event.into(), ..Default::default() })
}

fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

fn micros(time: Option<prost_types::Timestamp>) -> i64 {
    time.map(|time| time.seconds * 1_000_000 + i64::from(time.nanos) / 1_000).unwrap_or_default()
}

impl Caller {
    /// A caller of the sidecar at `url`. Connects when necessary.
    pub fn new(url: &str, recorder: Recorder) -> Result<Self> {
        let channel = Endpoint::from_shared(url.to_owned())?.connect_timeout(Duration::from_secs(1)).connect_lazy();
        Ok(Self { client: IdempotencyServiceClient::new(channel), way: url.into(), recorder })
    }

    async fn recorded<M, R>(
        &mut self,
        event: &str,
        call: Call,
        message: M,
        wait: Duration,
        ask: impl AsyncFnOnce(&mut IdempotencyServiceClient<Channel>, Request<M>) -> Result<tonic::Response<R>, Status>,
        read: impl FnOnce(R) -> Reply,
    ) -> Option<Reply> {
        let number = self.recorder.invoke_by(&self.way, event, call);
        let mut request = Request::new(message);
        let deadline = CALL_TIME_MAX + wait;
        // Sent as grpc-timeout; the other one is for a server that stays silent.
        request.set_timeout(deadline);
        let answer = tokio::time::timeout(deadline + CALL_TIME_MAX / 10, ask(&mut self.client, request)).await;
        let reply = match answer {
            Err(_elapsed) => None,
            Ok(Ok(response)) => Some(read(response.into_inner())),
            Ok(Err(status)) => refused(&status),
        };
        match &reply {
            Some(reply) => self.recorder.answer(number, reply.clone()),
            None => self.recorder.give_up(),
        }
        reply
    }

    /// CheckAndLock.
    pub async fn claim(
        &mut self,
        event: &str,
        claim_id: &str,
        lock: Option<Duration>,
        wait: Duration,
    ) -> Option<Reply> {
        let message = CheckAndLockRequest {
            key: key(event),
            event_type: "charge.succeeded".into(),
            claim_id: claim_id.into(),
            lock_duration: lock.and_then(duration),
            wait_duration: duration(wait),
            fingerprint: fingerprint(claim_id).map_or_else(Vec::new, |fingerprint| vec![fingerprint; 32]).into(),
            ..Default::default()
        };
        let read = |response: oncegate_api::v1::CheckAndLockResponse| match response.decision() {
            Decision::Acquired => response.lock.map_or(Reply::Defect("acquired without a lock".into()), |lock| {
                let expires = micros(lock.expire_time);
                Reply::Acquired { token: lock.fencing_token, attempt: lock.attempt, expires }
            }),
            Decision::InProgress => Reply::InProgress,
            Decision::AlreadyCompleted => {
                Reply::AlreadyCompleted { token: response.event.map(|event| event.fencing_token).unwrap_or_default() }
            }
            Decision::Refused => Reply::Refused,
            Decision::Unspecified => Reply::Defect("no decision".into()),
        };
        let call = Call::Claim { claim_id: claim_id.to_owned() };
        self.recorded(event, call, message, wait, async |client, request| client.check_and_lock(request).await, read)
            .await
    }

    /// ExtendLock.
    pub async fn extend(&mut self, event: &str, claim_id: &str, token: i64, lock: Duration) -> Option<Reply> {
        let message = ExtendLockRequest {
            key: key(event),
            fencing_token: token,
            claim_id: claim_id.into(),
            lock_duration: duration(lock),
        };
        let read = |response: oncegate_api::v1::ExtendLockResponse| Reply::Extended {
            expires: micros(response.lock.and_then(|lock| lock.expire_time)),
        };
        let call = Call::Extend { token, claim_id: claim_id.to_owned() };
        self.recorded(
            event,
            call,
            message,
            Duration::ZERO,
            async |client, request| client.extend_lock(request).await,
            read,
        )
        .await
    }

    /// MarkCompleted or MarkFailed.
    pub async fn mark(
        &mut self,
        event: &str,
        claim_id: &str,
        token: i64,
        ending: Ending,
        pause: Duration,
    ) -> Option<Reply> {
        let call = Call::Mark { token, claim_id: claim_id.to_owned(), ending };
        let kind = match ending {
            Ending::Completed => {
                let message = MarkCompletedRequest {
                    key: key(event),
                    fencing_token: token,
                    claim_id: claim_id.into(),
                    ..Default::default()
                };
                let read =
                    |response: oncegate_api::v1::MarkCompletedResponse| Reply::Marked { repeated: response.repeated };
                return self
                    .recorded(event, call, message, Duration::ZERO, async |c, r| c.mark_completed(r).await, read)
                    .await;
            }
            Ending::Retryable => FailureKind::Retryable,
            Ending::Terminal => FailureKind::Terminal,
            Ending::Unknown => FailureKind::Unknown,
        };
        let message = MarkFailedRequest {
            key: key(event),
            fencing_token: token,
            claim_id: claim_id.into(),
            kind: kind.into(),
            retry_after: duration(pause),
            ..Default::default()
        };
        let read = |response: oncegate_api::v1::MarkFailedResponse| Reply::Marked { repeated: response.repeated };
        self.recorded(event, call, message, Duration::ZERO, async |c, r| c.mark_failed(r).await, read).await
    }

    /// Resolve, whatever the event's token.
    pub async fn resolve(&mut self, event: &str, to: State, force: bool, reason: &str) -> Option<Reply> {
        let message = ResolveRequest {
            key: key(event),
            to: to.into(),
            force,
            reason: reason.into(),
            actor: "campaign".into(),
            ..Default::default()
        };
        let read = |response: oncegate_api::v1::ResolveResponse| Reply::Resolved {
            token: response.event.map(|event| event.fencing_token).unwrap_or_default(),
        };
        let call = Call::Resolve { to, force, reason: reason.to_owned() };
        self.recorded(event, call, message, Duration::ZERO, async |client, request| client.resolve(request).await, read)
            .await
    }
}

/// What an error means; None if it leaves open what happened.
fn refused(status: &Status) -> Option<Reply> {
    let info = status.get_details_error_info();
    let reason = info.as_ref().map(|info| info.reason.as_str()).unwrap_or_default();
    Some(match (status.code(), reason) {
        // The service itself says that nothing happened.
        (Code::Unavailable, reason::STORE_UNAVAILABLE | reason::OVERLOADED) => Reply::Nothing,
        (Code::Aborted, reason::LOCK_LOST) => {
            let given =
                |name: &str| info.as_ref().and_then(|info| info.metadata.get(name)).cloned().unwrap_or_default();
            Reply::LockLost {
                token: given("fencing_token").parse().unwrap_or_default(),
                state: given("state").trim_start_matches("STATE_").to_lowercase(),
            }
        }
        (Code::FailedPrecondition, reason::CLAIM_ENDED) => Reply::ClaimEnded,
        (Code::FailedPrecondition, reason::FINGERPRINT_MISMATCH) => Reply::FingerprintMismatch,
        (Code::FailedPrecondition, reason::OUTCOME_CONFLICT) => Reply::OutcomeConflict,
        (Code::FailedPrecondition, reason::STATE_CONFLICT) => Reply::StateConflict,
        (Code::NotFound, reason::EVENT_NOT_FOUND) => Reply::NotFound,
        (Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown, _) => return None,
        // The connection's own errors carry no reason.
        (Code::Internal, "") => return None,
        (code, reason) => Reply::Defect(format!("{code:?} {reason} {}", status.message())),
    })
}

/// Sends a signed webhook of Stripe's to a gateway.
pub async fn webhook(recorder: &Recorder, gateways: &[SocketAddr], gateway: usize, event: &str) -> Option<Reply> {
    let number = recorder.invoke(event, Call::Webhook { gateway });
    let body = stripe::event(event, "charge.succeeded");
    let signature = stripe::sign(SECRET, &body);
    let headers = [(stripe::HEADER, signature.as_str()), ("content-type", "application/json")];
    let sent = http_client::post(gateways[gateway], PATH, &headers, body);
    let reply = match tokio::time::timeout(WEBHOOK_TIME_MAX, sent).await {
        Err(_) | Ok(Err(_)) => {
            recorder.give_up();
            return None;
        }
        Ok(Ok(answer)) => Reply::Answered {
            status: answer.status.as_u16(),
            word: answer.json()["status"].as_str().unwrap_or_default().to_owned(),
        },
    };
    recorder.answer(number, reply.clone());
    Some(reply)
}
