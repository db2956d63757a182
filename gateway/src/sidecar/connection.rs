//! How calls get to a sidecar: by gRPC over some transport, or directly within the sidecar's own process.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use oncegate_api::v1::{
    self, idempotency_service_client::IdempotencyServiceClient, idempotency_service_server::IdempotencyService,
};
use tonic::{Request, Response, Status};
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};

use super::{BoxError, Pool};
use crate::trace::Traced;

/// The way to a sidecar. Clones share it.
#[derive(Clone)]
pub struct Connection(Arc<dyn Calls>);

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// gRPC over a transport.
    pub fn over<S, B>(transport: S) -> Self
    where
        S: Service<http::Request<tonic::body::Body>, Response = http::Response<B>> + Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let transport = transport
            .map_response(|response: http::Response<B>| response.map(tonic::body::Body::new))
            .map_err(|error: S::Error| TransportError(error.into()));
        Self(Arc::new(Remote(IdempotencyServiceClient::new(Traced(BoxCloneSyncService::new(transport))))))
    }

    /// The sidecar's service in this process: nothing is encoded, and nothing can be lost on the way. `is_duplicate` says
    /// without waiting whether CheckAndLock would answer that this is a plain duplicate; if so, it counts as that call, and
    /// most webhooks that come again need nothing else. If it says no, the call is made.
    pub fn within<S, D>(service: S, is_duplicate: D) -> Self
    where
        S: IdempotencyService,
        D: Fn(Question<'_>) -> bool + Send + Sync + 'static,
    {
        Self(Arc::new(Within { service, is_duplicate }))
    }

    pub(super) fn calls(&self) -> &dyn Calls {
        &*self.0
    }
}

/// What came in, as far as it is needed to recognise a plain duplicate.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// Whose it is.
    pub tenant: &'a str,
    /// Who sent it.
    pub provider: &'a str,
    /// What it is called.
    pub event_id: &'a str,
    /// The body.
    pub payload: &'a [u8],
    /// SHA-256 of the body. The first call computes it, which takes a while.
    pub payload_digest: &'a dyn Fn() -> [u8; 32],
}

impl From<Pool> for Connection {
    fn from(pool: Pool) -> Self {
        Self::over(pool)
    }
}

/// What a gateway asks of a sidecar.
#[tonic::async_trait]
pub(super) trait Calls: Send + Sync {
    /// Whether this is known at once to be a plain duplicate; if so, it was counted as the call.
    fn is_duplicate(&self, question: Question<'_>) -> bool;

    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status>;

    async fn extend_lock(
        &self,
        request: Request<v1::ExtendLockRequest>,
    ) -> Result<Response<v1::ExtendLockResponse>, Status>;

    async fn mark_completed(
        &self,
        request: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status>;

    async fn mark_failed(
        &self,
        request: Request<v1::MarkFailedRequest>,
    ) -> Result<Response<v1::MarkFailedResponse>, Status>;

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status>;
}

/// The error of a transport. A type of its own, because the compiler cannot prove that a boxed error is `Send` in futures
/// that borrow.
#[derive(Debug, thiserror::Error)]
#[error("the call was not carried")]
struct TransportError(#[source] BoxError);

/// Any transport, its type forgotten.
type Transport =
    BoxCloneSyncService<http::Request<tonic::body::Body>, http::Response<tonic::body::Body>, TransportError>;

struct Remote(IdempotencyServiceClient<Traced<Transport>>);

struct Within<S, D> {
    service: S,
    is_duplicate: D,
}

#[tonic::async_trait]
impl Calls for Remote {
    fn is_duplicate(&self, _: Question<'_>) -> bool {
        false
    }

    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        self.0.clone().check_and_lock(request).await
    }

    async fn extend_lock(
        &self,
        request: Request<v1::ExtendLockRequest>,
    ) -> Result<Response<v1::ExtendLockResponse>, Status> {
        self.0.clone().extend_lock(request).await
    }

    async fn mark_completed(
        &self,
        request: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        self.0.clone().mark_completed(request).await
    }

    async fn mark_failed(
        &self,
        request: Request<v1::MarkFailedRequest>,
    ) -> Result<Response<v1::MarkFailedResponse>, Status> {
        self.0.clone().mark_failed(request).await
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        self.0.clone().stats(request).await
    }
}

#[tonic::async_trait]
impl<S, D> Calls for Within<S, D>
where
    S: IdempotencyService,
    D: Fn(Question<'_>) -> bool + Send + Sync,
{
    fn is_duplicate(&self, question: Question<'_>) -> bool {
        (self.is_duplicate)(question)
    }

    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        self.service.check_and_lock(request).await
    }

    async fn extend_lock(
        &self,
        request: Request<v1::ExtendLockRequest>,
    ) -> Result<Response<v1::ExtendLockResponse>, Status> {
        self.service.extend_lock(request).await
    }

    async fn mark_completed(
        &self,
        request: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        self.service.mark_completed(request).await
    }

    async fn mark_failed(
        &self,
        request: Request<v1::MarkFailedRequest>,
    ) -> Result<Response<v1::MarkFailedResponse>, Status> {
        self.service.mark_failed(request).await
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        self.service.stats(request).await
    }
}
