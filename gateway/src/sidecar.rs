//! The sidecar as the gateway calls it: every call has a deadline, and errors are sorted by what may be done next.
//!
//! What matters is whether a call may have had an effect. A refusal says that it had none; a time-out, a lost connection
//! and a cancelled call (which is how tonic reports a deadline) say nothing. Errors are told apart by their `ErrorInfo`
//! reason and their code, never by their text.

mod connection;
mod dial;
mod options;
mod pool;
mod target;

use std::{error::Error as StdError, sync::Arc, time::Duration};

use bytes::Bytes;
use connection::Calls;
pub use connection::{Connection, Question};
pub use dial::Stream;
use oncegate_api::{reason, v1};
pub use options::{Reach, ReachOptions};
pub use pool::Pool;
pub use target::{Resolve, SystemResolver};
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt as _;

use crate::{
    config::{LockSettings, Settings},
    delivery::Event,
    key::Identity,
    route::Route,
};

pub(crate) type BoxError = Box<dyn StdError + Send + Sync>;

/// The sidecars of `settings`, as one service. Connections are made when they are needed. Has to be called inside a tokio
/// runtime.
#[must_use]
pub fn channel(settings: &Settings) -> Pool {
    Pool::new(settings.sidecar.clone())
}

/// The client.
#[derive(Clone)]
pub(crate) struct Sidecar {
    connection: Connection,
    timeout: Duration,
    holder: Arc<str>,
}

/// The answer to CheckAndLock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ClaimAnswer {
    Acquired(Grant),
    /// Somebody else holds the lock.
    InProgress(Duration),
    /// The pause after a failure has not passed.
    Paused(Duration),
    Completed,
    /// Dead or unknown.
    Refused,
}

/// A lock, as granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) fencing_token: i64,
    pub(crate) attempt: i32,
    /// Counted from before the call was sent (S5).
    pub(crate) remaining: Duration,
}

/// Which attempt a call is about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attempt<'a> {
    pub(crate) route: &'a Route,
    pub(crate) identity: &'a Identity,
    pub(crate) claim_id: &'a str,
    pub(crate) fencing_token: i64,
}

/// How an attempt failed, for MarkFailed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MarkedFailure {
    pub(crate) kind: v1::FailureKind,
    /// For people; texts of ours only.
    pub(crate) error: String,
    pub(crate) retry_after: Option<Duration>,
    /// The application's status, if it answered.
    pub(crate) code: Option<i32>,
}

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("the sidecar did not do it")]
pub(crate) struct CallError {
    pub(crate) kind: CallErrorKind,
    #[source]
    pub(crate) status: Status,
}

/// What may be done after an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallErrorKind {
    /// Nothing happened; ask again later.
    Unavailable { retry_after: Option<Duration> },
    /// It may or may not have happened; repeat it as it is.
    Unknown,
    /// The lock is somebody else's by now. `completed`: whether the event is completed.
    LockLost { completed: bool },
    /// The attempt of this claim has ended.
    ClaimEnded,
    /// The event was first claimed with something else.
    Mismatch,
    /// The attempt's outcome was recorded before, and it was another one.
    OutcomeConflict,
    /// No such event.
    NotFound,
    /// The call was wrong, and would be wrong again.
    Rejected,
}

impl Sidecar {
    pub(crate) fn new(connection: Connection, timeout: Duration, lock: &LockSettings) -> Self {
        Self { connection, timeout, holder: lock.holder.as_str().into() }
    }

    /// Whether the sidecar knows at once, in this process, that the event is completed and this a plain duplicate. Then
    /// that was its answer to a CheckAndLock, and is counted as one. False says nothing.
    pub(crate) fn is_duplicate(&self, event: &Event) -> bool {
        let Event { route, identity, delivery_id, body, .. } = event;
        // Only the ledger compares deliveries.
        delivery_id.is_empty()
            && self.calls().is_duplicate(Question {
                tenant: &route.tenant,
                provider: route.provider.name(),
                event_id: &identity.event_id,
                payload: &body.bytes,
                payload_digest: &|| *body.digest(),
            })
    }

    /// CheckAndLock. Repeating it with the same `claim_id` gets the same lock (S4).
    pub(crate) async fn claim(&self, event: &Event, claim_id: &str, wait: Duration) -> Result<ClaimAnswer, CallError> {
        let Event { route, identity, .. } = event;
        let message = v1::CheckAndLockRequest {
            key: Some(key(route, identity)),
            event_type: identity.event_type.clone(),
            claim_id: claim_id.to_owned(),
            holder: (*self.holder).to_owned(),
            // Always given: the sidecar's default may not cover our upstream time-out (G8).
            lock_duration: Some(proto_duration(route.application.lock_duration)),
            // G4: never a fingerprint, providers change bodies between tries.
            fingerprint: Bytes::new(),
            metadata: None,
            wait_duration: (!wait.is_zero()).then(|| proto_duration(wait)),
            payload_digest: Bytes::copy_from_slice(event.body.digest()),
            delivery_id: event.delivery_id.clone(),
        };
        let response =
            answered(self.timeout + wait, self.calls().check_and_lock(request(message, self.timeout + wait))).await?;
        let retry_after = response.retry_after.map_or(Duration::ZERO, std_duration);
        match response.decision() {
            v1::Decision::Acquired => response
                .lock
                .map(|lock| ClaimAnswer::Acquired(grant(&lock)))
                .ok_or_else(|| malformed("acquired without a lock")),
            v1::Decision::InProgress => {
                let state = response.event.as_ref().map_or(v1::State::Unspecified, v1::Event::state);
                Ok(match state {
                    v1::State::Failed => ClaimAnswer::Paused(retry_after),
                    v1::State::Unspecified
                    | v1::State::Pending
                    | v1::State::Processing
                    | v1::State::Completed
                    | v1::State::Unknown
                    | v1::State::Dead => ClaimAnswer::InProgress(retry_after),
                })
            }
            v1::Decision::AlreadyCompleted => Ok(ClaimAnswer::Completed),
            v1::Decision::Refused => Ok(ClaimAnswer::Refused),
            v1::Decision::Unspecified => Err(malformed("no decision")),
        }
    }

    /// ExtendLock, to the full duration from now.
    pub(crate) async fn extend(&self, attempt: Attempt<'_>) -> Result<Grant, CallError> {
        let message = v1::ExtendLockRequest {
            key: Some(key(attempt.route, attempt.identity)),
            fencing_token: attempt.fencing_token,
            lock_duration: Some(proto_duration(attempt.route.application.lock_duration)),
            claim_id: attempt.claim_id.to_owned(),
        };
        let response = answered(self.timeout, self.calls().extend_lock(request(message, self.timeout))).await?;
        response.lock.as_ref().map(grant).ok_or_else(|| malformed("extended without a lock"))
    }

    /// MarkCompleted, with the application's status as the result's code. Its body is not stored (G5).
    pub(crate) async fn mark_completed(&self, attempt: Attempt<'_>, code: i32) -> Result<(), CallError> {
        let message = v1::MarkCompletedRequest {
            key: Some(key(attempt.route, attempt.identity)),
            fencing_token: attempt.fencing_token,
            result: Some(result(code)),
            metadata: None,
            claim_id: attempt.claim_id.to_owned(),
        };
        answered(self.timeout, self.calls().mark_completed(request(message, self.timeout))).await.map(drop)
    }

    /// MarkFailed.
    pub(crate) async fn mark_failed(&self, attempt: Attempt<'_>, failure: MarkedFailure) -> Result<(), CallError> {
        let message = v1::MarkFailedRequest {
            key: Some(key(attempt.route, attempt.identity)),
            fencing_token: attempt.fencing_token,
            kind: failure.kind.into(),
            error: failure.error,
            retry_after: failure.retry_after.map(proto_duration),
            result: failure.code.map(result),
            claim_id: attempt.claim_id.to_owned(),
        };
        answered(self.timeout, self.calls().mark_failed(request(message, self.timeout))).await.map(drop)
    }

    /// Counts of everything that is kept of a tenant.
    pub(crate) async fn stats(&self, tenant: &str) -> Result<v1::StatsResponse, CallError> {
        let message =
            v1::StatsRequest { tenant: tenant.to_owned(), without_percentiles: true, ..v1::StatsRequest::default() };
        answered(self.timeout, self.calls().stats(request(message, self.timeout))).await
    }

    fn calls(&self) -> &dyn Calls {
        self.connection.calls()
    }
}

/// A request that tells the sidecar its deadline.
fn request<M>(message: M, deadline: Duration) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// The result of a call. Its deadline is enforced here as well.
async fn answered<R>(
    deadline: Duration,
    call: impl Future<Output = Result<Response<R>, Status>>,
) -> Result<R, CallError> {
    match tokio::time::timeout(deadline, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(CallError { kind: kind(&status), status }),
        Err(_) => Err(CallError {
            kind: CallErrorKind::Unknown,
            status: Status::deadline_exceeded("the sidecar did not answer in time"),
        }),
    }
}

/// Sorts an error by its reason, or by its code where there is none: proxies and tonic itself give no reasons.
fn kind(status: &Status) -> CallErrorKind {
    let details = status.get_error_details();
    let retry_after = details.retry_info().and_then(|info| info.retry_delay);
    let info = details.error_info().filter(|info| info.domain == reason::DOMAIN);
    if let Some(info) = info {
        match info.reason.as_str() {
            reason::STORE_UNAVAILABLE
            | reason::OVERLOADED
            | reason::QUOTA_EXCEEDED
            // Mended by the sidecar's operator, without a restart of the gateway.
            | reason::UNAUTHENTICATED
            | reason::PERMISSION_DENIED
            | reason::UNIMPLEMENTED => return CallErrorKind::Unavailable { retry_after },
            reason::LOCK_LOST => {
                let state = info.metadata.get("state").map(String::as_str);
                return CallErrorKind::LockLost { completed: state.is_some_and(is_completed) };
            }
            reason::CLAIM_ENDED => return CallErrorKind::ClaimEnded,
            reason::FINGERPRINT_MISMATCH | reason::DELIVERY_MISMATCH => return CallErrorKind::Mismatch,
            reason::OUTCOME_CONFLICT => return CallErrorKind::OutcomeConflict,
            reason::EVENT_NOT_FOUND => return CallErrorKind::NotFound,
            reason::INVALID_FIELD | reason::STATE_CONFLICT => return CallErrorKind::Rejected,
            // The defect may have come after the commit.
            reason::OUTCOME_UNKNOWN | reason::DEADLINE_EXCEEDED | reason::INTERNAL => return CallErrorKind::Unknown,
            // A reason of a newer sidecar: its code decides.
            _ => {}
        }
    }
    match status.code() {
        _ if never_sent(status) => CallErrorKind::Unavailable { retry_after },
        Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented => {
            CallErrorKind::Unavailable { retry_after }
        }
        Code::InvalidArgument => CallErrorKind::Rejected,
        _ => CallErrorKind::Unknown,
    }
}

/// Reads `state` in LOCK_LOST's metadata, with or without the enum's prefix.
fn is_completed(state: &str) -> bool {
    let name = v1::State::Completed.as_str_name();
    state.eq_ignore_ascii_case(name)
        || name.strip_prefix("STATE_").is_some_and(|short| state.eq_ignore_ascii_case(short))
}

/// Whether the connection could not even be made.
fn never_sent(status: &Status) -> bool {
    status.source().is_some_and(pool::never_sent)
}

/// An answer that breaks the contract. What was done is not known.
fn malformed(what: &'static str) -> CallError {
    CallError { kind: CallErrorKind::Unknown, status: Status::internal(what) }
}

fn key(route: &Route, identity: &Identity) -> v1::EventKey {
    v1::EventKey {
        tenant: route.tenant.clone(),
        provider: route.provider.name().to_owned(),
        event_id: identity.event_id.clone(),
    }
}

fn grant(lock: &v1::Lock) -> Grant {
    Grant {
        fencing_token: lock.fencing_token,
        attempt: lock.attempt,
        remaining: lock.remaining_duration.map_or(Duration::ZERO, std_duration),
    }
}

fn result(code: i32) -> v1::Result {
    v1::Result { code, body: Bytes::new(), content_type: String::new() }
}

fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).expect("less than a thousand million"),
    }
}

/// A negative one counts as zero.
fn std_duration(duration: prost_types::Duration) -> Duration {
    Duration::try_from(duration).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn status(code: Code, reason: &str, state: Option<&str>) -> Status {
        let metadata: HashMap<String, String> =
            state.map(|state| ("state".to_owned(), state.to_owned())).into_iter().collect();
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, reason::DOMAIN, metadata);
        details.set_retry_info(Some(Duration::from_secs(3)));
        Status::with_error_details(code, "some text", details)
    }

    #[test]
    fn every_reason_is_sorted() {
        let unavailable = CallErrorKind::Unavailable { retry_after: Some(Duration::from_secs(3)) };
        for name in reason::ALL {
            let wanted = match *name {
                reason::STORE_UNAVAILABLE
                | reason::OVERLOADED
                | reason::QUOTA_EXCEEDED
                | reason::UNAUTHENTICATED
                | reason::PERMISSION_DENIED
                | reason::UNIMPLEMENTED => unavailable,
                reason::OUTCOME_UNKNOWN | reason::DEADLINE_EXCEEDED | reason::INTERNAL => CallErrorKind::Unknown,
                reason::LOCK_LOST => CallErrorKind::LockLost { completed: false },
                reason::CLAIM_ENDED => CallErrorKind::ClaimEnded,
                reason::FINGERPRINT_MISMATCH | reason::DELIVERY_MISMATCH => CallErrorKind::Mismatch,
                reason::OUTCOME_CONFLICT => CallErrorKind::OutcomeConflict,
                reason::EVENT_NOT_FOUND => CallErrorKind::NotFound,
                reason::INVALID_FIELD | reason::STATE_CONFLICT => CallErrorKind::Rejected,
                other => panic!("{other} is not sorted"),
            };
            assert_eq!(kind(&status(Code::Unknown, name, None)), wanted, "{name}");
        }
    }

    #[test]
    fn a_lost_lock_says_whether_the_event_is_completed() {
        for (state, completed) in [
            (Some("STATE_COMPLETED"), true),
            (Some("COMPLETED"), true),
            (Some("completed"), true),
            (Some("STATE_PROCESSING"), false),
            (None, false),
        ] {
            let found = kind(&status(Code::Aborted, reason::LOCK_LOST, state));
            assert_eq!(found, CallErrorKind::LockLost { completed }, "{state:?}");
        }
    }

    #[test]
    fn without_a_reason_only_what_was_never_done_is_taken_for_that() {
        for (code, wanted) in [
            (Code::Cancelled, CallErrorKind::Unknown),
            (Code::DeadlineExceeded, CallErrorKind::Unknown),
            (Code::Unavailable, CallErrorKind::Unknown),
            (Code::Unknown, CallErrorKind::Unknown),
            (Code::Internal, CallErrorKind::Unknown),
            (Code::ResourceExhausted, CallErrorKind::Unknown),
            (Code::Aborted, CallErrorKind::Unknown),
            (Code::Unauthenticated, CallErrorKind::Unavailable { retry_after: None }),
            (Code::Unimplemented, CallErrorKind::Unavailable { retry_after: None }),
            (Code::InvalidArgument, CallErrorKind::Rejected),
        ] {
            assert_eq!(kind(&Status::new(code, "some text")), wanted, "{code:?}");
        }
        let mut foreign = ErrorDetails::new();
        foreign.set_error_info(reason::STORE_UNAVAILABLE, "example.com", HashMap::new());
        let foreign = Status::with_error_details(Code::Unavailable, "some text", foreign);
        assert_eq!(kind(&foreign), CallErrorKind::Unknown, "somebody else's reasons mean something else");
    }

    #[tokio::test]
    async fn a_connection_that_cannot_be_made_means_that_nothing_happened() {
        // Bound and closed again: nobody listens there.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let url = format!("http://127.0.0.1:{port}");
        let settings = crate::config::Options {
            sidecar_url: url,
            upstream_url: Some("http://127.0.0.1:1/".into()),
            stripe_webhook_secret: Some("whsec_test".into()),
            ..Default::default()
        };
        let channel = channel(&settings.validate().unwrap());
        let lock = LockSettings { margin: Duration::from_secs(15), holder: "test".into() };
        let sidecar = Sidecar::new(channel.into(), Duration::from_secs(10), &lock);
        let error = sidecar.stats("default").await.unwrap_err();
        assert_eq!(error.kind, CallErrorKind::Unavailable { retry_after: None });
    }
}
