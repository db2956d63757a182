//! What carries calls to a sidecar: gRPC over some transport, or nothing at all in the sidecar's own process.

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

    /// The sidecar's service in this process: nothing is encoded, and nothing can be lost on the way.
    pub fn within<S: IdempotencyService>(service: S) -> Self {
        Self(Arc::new(Within(service)))
    }

    pub(super) fn calls(&self) -> &dyn Calls {
        &*self.0
    }
}

impl From<Pool> for Connection {
    fn from(pool: Pool) -> Self {
        Self::over(pool)
    }
}

/// What a gateway asks of a sidecar.
#[tonic::async_trait]
pub(super) trait Calls: Send + Sync {
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

/// What a transport failed with. A type of its own, since the compiler cannot prove a boxed error `Send` in futures that
/// borrow.
#[derive(Debug, thiserror::Error)]
#[error("the call was not carried")]
struct TransportError(#[source] BoxError);

/// Any transport, its type forgotten.
type Transport =
    BoxCloneSyncService<http::Request<tonic::body::Body>, http::Response<tonic::body::Body>, TransportError>;

struct Remote(IdempotencyServiceClient<Traced<Transport>>);

struct Within<S>(S);

#[tonic::async_trait]
impl Calls for Remote {
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
impl<S: IdempotencyService> Calls for Within<S> {
    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        self.0.check_and_lock(request).await
    }

    async fn extend_lock(
        &self,
        request: Request<v1::ExtendLockRequest>,
    ) -> Result<Response<v1::ExtendLockResponse>, Status> {
        self.0.extend_lock(request).await
    }

    async fn mark_completed(
        &self,
        request: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        self.0.mark_completed(request).await
    }

    async fn mark_failed(
        &self,
        request: Request<v1::MarkFailedRequest>,
    ) -> Result<Response<v1::MarkFailedResponse>, Status> {
        self.0.mark_failed(request).await
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        self.0.stats(request).await
    }
}
