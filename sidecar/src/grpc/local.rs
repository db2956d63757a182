//! The API for callers in the same process: observed like any other call, but without encoding and without access checks.

use std::{future::Future, sync::Arc, time::Instant};

use oncegate_api::v1::{self, idempotency_service_server::IdempotencyService};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};
use tracing::{Instrument as _, Span};

use super::{
    observe::{Call, call_span, listening},
    service::Api,
};
use crate::{
    event::{Key, Payload},
    method::{Called, Method},
    metrics::{ClaimLabel, Metrics, Told},
};

/// See the module. Clones share everything.
#[derive(Clone)]
pub struct Local {
    api: Arc<Api>,
    metrics: Arc<Metrics>,
}

impl Local {
    pub(super) fn new(api: Arc<Api>, metrics: Arc<Metrics>) -> Self {
        Self { api, metrics }
    }

    /// Whether this process can tell, without waiting, that a CheckAndLock of the event would be answered as a plain duplicate:
    /// the common case, in which making the call costs more than answering it. If so, this counts as that call: it is counted,
    /// logged and given a span like any other. False says nothing about the event.
    #[must_use]
    pub fn is_duplicate(&self, tenant: &str, provider: &str, event_id: &str, payload: Payload<'_>) -> bool {
        // Whether the tenant is over its quota is for the actual call to say.
        if self.api.has_quotas() {
            return false;
        }
        let started = Instant::now();
        let key = Key { tenant: tenant.to_owned(), provider: provider.to_owned(), event_id: event_id.to_owned() };
        if !self.api.is_duplicate(&key, payload, started) {
            return false;
        }
        let called = Called::Api(Method::CheckAndLock);
        let span = call_span(Span::current().id(), called);
        let told = Told::Claimed(ClaimLabel::Duplicate);
        Call::begun(called, span, &self.metrics, started).answered(Code::Ok, Some(told));
        true
    }

    /// Counts a call, logs it, and gives it a span in its caller's trace. Dropping the future counts it as cancelled.
    async fn observed<R>(
        &self,
        method: Method,
        answer: impl Future<Output = Result<Response<R>, Status>>,
    ) -> Result<Response<R>, Status> {
        let called = Called::Api(method);
        let span = call_span(Span::current().id(), called);
        let mut call = Call::begin(called, span.clone(), &self.metrics);
        let (answer, told) = listening(answer.instrument(span)).await;
        let code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        call.answered(code, told);
        answer
    }
}

#[tonic::async_trait]
impl IdempotencyService for Local {
    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        self.observed(Method::CheckAndLock, self.api.check_and_lock(request)).await
    }

    async fn extend_lock(
        &self,
        request: Request<v1::ExtendLockRequest>,
    ) -> Result<Response<v1::ExtendLockResponse>, Status> {
        self.observed(Method::ExtendLock, self.api.extend_lock(request)).await
    }

    async fn mark_completed(
        &self,
        request: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        self.observed(Method::MarkCompleted, self.api.mark_completed(request)).await
    }

    async fn mark_failed(
        &self,
        request: Request<v1::MarkFailedRequest>,
    ) -> Result<Response<v1::MarkFailedResponse>, Status> {
        self.observed(Method::MarkFailed, self.api.mark_failed(request)).await
    }

    async fn resolve(&self, request: Request<v1::ResolveRequest>) -> Result<Response<v1::ResolveResponse>, Status> {
        self.observed(Method::Resolve, self.api.resolve(request)).await
    }

    async fn history(&self, request: Request<v1::HistoryRequest>) -> Result<Response<v1::HistoryResponse>, Status> {
        self.observed(Method::History, self.api.history(request)).await
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        self.observed(Method::Stats, self.api.stats(request)).await
    }

    type CleanupStream = ReceiverStream<Result<v1::CleanupResponse, Status>>;

    async fn cleanup(&self, request: Request<v1::CleanupRequest>) -> Result<Response<Self::CleanupStream>, Status> {
        self.observed(Method::Cleanup, self.api.cleanup(request)).await
    }
}
