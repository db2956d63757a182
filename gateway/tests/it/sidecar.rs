//! The sidecar: the real service trait, which answers from a script and records every call.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use oncegate_api::{
    reason,
    v1::{self, idempotency_service_server::IdempotencyService},
};
use tokio::{sync::Notify, time::timeout};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::client::PATIENCE;

/// A call that was received.
#[derive(Debug, Clone)]
pub(crate) enum Call {
    /// With the `grpc-timeout` that came along.
    Claim(v1::CheckAndLockRequest, Option<String>),
    Extend(v1::ExtendLockRequest),
    Completed(v1::MarkCompletedRequest),
    Failed(v1::MarkFailedRequest),
    Stats(v1::StatsRequest),
}

/// What happens to a call.
#[derive(Debug)]
pub(crate) enum Scripted<R> {
    Answer(R),
    /// An answer that takes this long.
    Late(Duration, R),
    Error(Status),
    /// No answer, ever.
    Hang,
}

/// Grants every lock and accepts every mark, unless the script says otherwise.
#[derive(Clone, Default)]
pub(crate) struct Sidecar {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    calls: Mutex<Vec<Call>>,
    called: Notify,
    claims: Mutex<VecDeque<Scripted<v1::CheckAndLockResponse>>>,
    extensions: Mutex<VecDeque<Scripted<v1::ExtendLockResponse>>>,
    /// For both kinds of marks.
    marks: Mutex<VecDeque<Scripted<()>>>,
    stats: Mutex<VecDeque<Scripted<v1::StatsResponse>>>,
    /// What every call gets that has no script.
    outage: Mutex<Option<Status>>,
}

impl Sidecar {
    pub(crate) fn claim(&self, scripted: Scripted<v1::CheckAndLockResponse>) {
        self.shared.claims.lock().unwrap().push_back(scripted);
    }

    pub(crate) fn extension(&self, scripted: Scripted<v1::ExtendLockResponse>) {
        self.shared.extensions.lock().unwrap().push_back(scripted);
    }

    pub(crate) fn mark(&self, scripted: Scripted<()>) {
        self.shared.marks.lock().unwrap().push_back(scripted);
    }

    pub(crate) fn stats(&self, scripted: Scripted<v1::StatsResponse>) {
        self.shared.stats.lock().unwrap().push_back(scripted);
    }

    /// From now on, calls without a script fail with this, or are answered again.
    pub(crate) fn outage(&self, outage: Option<Status>) {
        *self.shared.outage.lock().unwrap() = outage;
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.shared.calls.lock().unwrap().clone()
    }

    pub(crate) fn claims(&self) -> Vec<v1::CheckAndLockRequest> {
        self.calls()
            .into_iter()
            .filter_map(|call| if let Call::Claim(claim, _) = call { Some(claim) } else { None })
            .collect()
    }

    pub(crate) fn completions(&self) -> Vec<v1::MarkCompletedRequest> {
        self.calls()
            .into_iter()
            .filter_map(|call| if let Call::Completed(mark) = call { Some(mark) } else { None })
            .collect()
    }

    pub(crate) fn failures(&self) -> Vec<v1::MarkFailedRequest> {
        self.calls()
            .into_iter()
            .filter_map(|call| if let Call::Failed(mark) = call { Some(mark) } else { None })
            .collect()
    }

    /// Waits until the recorded calls fulfil a condition.
    pub(crate) async fn until(&self, condition: impl Fn(&[Call]) -> bool) {
        let met = async {
            loop {
                let called = self.shared.called.notified();
                if condition(&self.calls()) {
                    return;
                }
                called.await;
            }
        };
        timeout(PATIENCE, met).await.unwrap_or_else(|_| panic!("calls in time, got {:?}", self.calls()));
    }

    async fn play<R>(
        &self,
        call: Call,
        script: &Mutex<VecDeque<Scripted<R>>>,
        usual: impl FnOnce() -> R,
    ) -> Result<Response<R>, Status> {
        let scripted = script.lock().unwrap().pop_front();
        self.shared.calls.lock().unwrap().push(call);
        self.shared.called.notify_waiters();
        match scripted {
            None => match self.shared.outage.lock().unwrap().clone() {
                Some(outage) => Err(outage),
                None => Ok(Response::new(usual())),
            },
            Some(Scripted::Answer(answer)) => Ok(Response::new(answer)),
            Some(Scripted::Late(latency, answer)) => {
                tokio::time::sleep(latency).await;
                Ok(Response::new(answer))
            }
            Some(Scripted::Error(status)) => Err(status),
            Some(Scripted::Hang) => std::future::pending().await,
        }
    }
}

/// A lock of 300 s, or as long as the test says.
pub(crate) fn lock(token: i64, remaining: Duration) -> v1::Lock {
    v1::Lock {
        fencing_token: token,
        attempt: 1,
        expire_time: None,
        remaining_duration: Some(prost_types::Duration::try_from(remaining).unwrap()),
        claim_id: String::new(),
    }
}

pub(crate) fn acquired(token: i64, remaining: Duration) -> v1::CheckAndLockResponse {
    v1::CheckAndLockResponse {
        decision: v1::Decision::Acquired.into(),
        lock: Some(lock(token, remaining)),
        ..v1::CheckAndLockResponse::default()
    }
}

pub(crate) fn decided(
    decision: v1::Decision,
    state: v1::State,
    retry_after: Option<Duration>,
) -> v1::CheckAndLockResponse {
    v1::CheckAndLockResponse {
        decision: decision.into(),
        event: Some(v1::Event { state: state.into(), ..v1::Event::default() }),
        retry_after: retry_after.map(|after| prost_types::Duration::try_from(after).unwrap()),
        ..v1::CheckAndLockResponse::default()
    }
}

/// An error of the contract.
pub(crate) fn error(code: Code, reason: &str, metadata: &[(&str, &str)], retry: Option<Duration>) -> Status {
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, reason::DOMAIN, metadata);
    if retry.is_some() {
        details.set_retry_info(retry);
    }
    Status::with_error_details(code, "scripted", details)
}

pub(crate) fn unknown<R>() -> Scripted<R> {
    Scripted::Error(error(Code::Unavailable, reason::OUTCOME_UNKNOWN, &[], None))
}

pub(crate) fn unavailable<R>(retry: Duration) -> Scripted<R> {
    Scripted::Error(error(Code::Unavailable, reason::STORE_UNAVAILABLE, &[], Some(retry)))
}

pub(crate) fn lock_lost<R>(state: &str) -> Scripted<R> {
    Scripted::Error(error(Code::Aborted, reason::LOCK_LOST, &[("state", state), ("fencing_token", "9")], None))
}

#[async_trait::async_trait]
impl IdempotencyService for Sidecar {
    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        let deadline = request.metadata().get("grpc-timeout").map(|value| value.to_str().unwrap().to_owned());
        let call = Call::Claim(request.into_inner(), deadline);
        self.play(call, &self.shared.claims, || acquired(1, Duration::from_secs(300))).await
    }

    async fn extend_lock(
        &self,
        request: Request<v1::ExtendLockRequest>,
    ) -> Result<Response<v1::ExtendLockResponse>, Status> {
        let call = Call::Extend(request.into_inner());
        let usual = || v1::ExtendLockResponse { lock: Some(lock(1, Duration::from_secs(300))) };
        self.play(call, &self.shared.extensions, usual).await
    }

    async fn mark_completed(
        &self,
        request: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        self.play(Call::Completed(request.into_inner()), &self.shared.marks, || ()).await?;
        Ok(Response::new(v1::MarkCompletedResponse::default()))
    }

    async fn mark_failed(
        &self,
        request: Request<v1::MarkFailedRequest>,
    ) -> Result<Response<v1::MarkFailedResponse>, Status> {
        self.play(Call::Failed(request.into_inner()), &self.shared.marks, || ()).await?;
        Ok(Response::new(v1::MarkFailedResponse::default()))
    }

    async fn history(&self, _: Request<v1::HistoryRequest>) -> Result<Response<v1::HistoryResponse>, Status> {
        Err(Status::unimplemented("the gateway has no use for it"))
    }

    async fn resolve(&self, _: Request<v1::ResolveRequest>) -> Result<Response<v1::ResolveResponse>, Status> {
        Err(Status::unimplemented("the gateway has no use for it"))
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        self.play(Call::Stats(request.into_inner()), &self.shared.stats, v1::StatsResponse::default).await
    }

    type CleanupStream = tonic::codegen::BoxStream<v1::CleanupResponse>;

    async fn cleanup(&self, _: Request<v1::CleanupRequest>) -> Result<Response<Self::CleanupStream>, Status> {
        Err(Status::unimplemented("the gateway has no use for it"))
    }
}
