//! CheckAndLock with nothing behind it: what gRPC itself does on this machine. One thread, as the sidecar's calls have.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::Parser as _;
use oncegate_api::v1::{
    self,
    idempotency_service_server::{IdempotencyService, IdempotencyServiceServer},
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

#[derive(clap::Parser, Debug)]
struct Options {
    /// Where to listen
    address: SocketAddr,
}

/// Answers that every event is done.
struct Constant(v1::CheckAndLockResponse);

fn constant() -> v1::CheckAndLockResponse {
    v1::CheckAndLockResponse {
        decision: v1::Decision::AlreadyCompleted.into(),
        result: Some(v1::Result {
            code: 200,
            body: Bytes::from_static(br#"{"booked":true}"#),
            content_type: "application/json".to_owned(),
        }),
        ..v1::CheckAndLockResponse::default()
    }
}

fn no_such<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("only CheckAndLock"))
}

#[tonic::async_trait]
impl IdempotencyService for Constant {
    type CleanupStream = futures::stream::Empty<Result<v1::CleanupResponse, Status>>;

    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        // Decoded, as any server would, and ignored.
        drop(request);
        Ok(Response::new(self.0.clone()))
    }

    async fn extend_lock(&self, _: Request<v1::ExtendLockRequest>) -> Result<Response<v1::ExtendLockResponse>, Status> {
        no_such()
    }

    async fn mark_completed(
        &self,
        _: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        no_such()
    }

    async fn mark_failed(&self, _: Request<v1::MarkFailedRequest>) -> Result<Response<v1::MarkFailedResponse>, Status> {
        no_such()
    }

    async fn history(&self, _: Request<v1::HistoryRequest>) -> Result<Response<v1::HistoryResponse>, Status> {
        no_such()
    }

    async fn resolve(&self, _: Request<v1::ResolveRequest>) -> Result<Response<v1::ResolveResponse>, Status> {
        no_such()
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        no_such()
    }

    async fn cleanup(&self, _: Request<v1::CleanupRequest>) -> Result<Response<Self::CleanupStream>, Status> {
        no_such()
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(options.address).await.context("cannot listen")?;
        Server::builder()
            .add_service(IdempotencyServiceServer::new(Constant(constant())))
            .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
            .await
            .context("cannot serve")
    })
}
