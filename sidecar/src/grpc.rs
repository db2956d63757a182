//! The API: `oncegate.v1.IdempotencyService`, health and reflection, over any HTTP/2 listener or in one process with
//! the gateway.

pub(crate) mod access;
mod arriving;
mod audit;
mod convert;
mod json;
mod layer;
mod local;
mod observe;
pub(crate) mod page_token;
mod quota;
mod service;
mod status;
#[cfg(test)]
mod tests;
pub mod validate;

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use oncegate_api::{FILE_DESCRIPTOR_SET, v1::idempotency_service_server::IdempotencyServiceServer};
use oncegate_runtime::server::Peer;
use tonic::{
    body::Body,
    codegen::{Service as TowerService, http},
    service::Routes,
};
use tonic_health::server::HealthReporter;

use self::{
    access::{Door, Guard},
    arriving::Held,
    layer::Answer,
    service::Api,
};
pub use self::{local::Local, observe::Observed};
use crate::{config::Policy, coordinator::Coordinator, method::Called, metrics::Metrics};

/// The largest message that is accepted, by whichever service.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// The largest message to Health: the name of a service. Strangers may send it.
const HEALTH_BYTES_MAX: usize = 1_024;

/// All of the sidecar's gRPC services as one tower service. It is cloned for each call; clones share everything.
#[derive(Clone)]
pub struct Service(Arc<Parts>);

struct Parts {
    services: Services,
    /// None where everybody may do everything.
    guard: Option<Guard>,
    local: Local,
    metrics: Arc<Metrics>,
    /// What has arrived of messages, over all connections.
    held: Arc<Held>,
}

/// The API itself, and the services beside it.
#[derive(Clone)]
struct Services {
    /// Tried first, without a router in between.
    api: IdempotencyServiceServer<Api>,
    others: Routes,
}

impl Services {
    /// Generic over the body: another box around the connection's body would be called through for each of its
    /// frames.
    fn call<B>(&self, called: Called, request: http::Request<B>) -> Answer
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        // Both are always ready.
        match called {
            Called::Api(_) => self.api.clone().call(request),
            // They also answer unknown calls, as such.
            Called::Health | Called::Reflection | Called::Unknown => Box::pin(self.others.clone().call(request)),
        }
    }
}

impl Service {
    /// The services over a coordinator, and the reporter of their health.
    pub(crate) fn new(
        coordinator: Arc<Coordinator>,
        policy: Arc<Policy>,
        metrics: Arc<Metrics>,
    ) -> (Service, HealthReporter) {
        let api = Arc::new(Api::new(coordinator, policy, metrics.clone()));
        let local = Local::new(api.clone(), metrics.clone());
        let api = IdempotencyServiceServer::from_arc(api)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            // A page of 500 events with results is larger than a request may be.
            .max_encoding_message_size(usize::MAX);
        let (reporter, health) = tonic_health::server::health_reporter();
        let mut others = Routes::new(health.max_decoding_message_size(HEALTH_BYTES_MAX));
        // Building reflection only fails on descriptors that do not parse, and these come from our own build.
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        if let Ok(v1) = reflection().build_v1() {
            others = others.add_service(v1.max_decoding_message_size(MESSAGE_BYTES_MAX));
        }
        if let Ok(v1alpha) = reflection().build_v1alpha() {
            others = others.add_service(v1alpha.max_decoding_message_size(MESSAGE_BYTES_MAX));
        }
        let services = Services { api, others: others.prepare() };
        (Service(Arc::new(Parts { services, guard: None, local, metrics, held: Arc::default() })), reporter)
    }

    /// The services with access checks, for one connection.
    pub(crate) fn guarded(&self, door: Arc<Door>, peer: Peer) -> Service {
        Service(Arc::new(Parts {
            services: self.0.services.clone(),
            guard: Some(Guard::new(door, peer)),
            local: self.0.local.clone(),
            metrics: self.0.metrics.clone(),
            held: self.0.held.clone(),
        }))
    }

    /// The API without gRPC around it, for callers in the same process.
    pub(crate) fn local(&self) -> Local {
        self.0.local.clone()
    }
}

impl<B> TowerService<http::Request<B>> for Service
where
    B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Observed;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Always ready: calls beyond the bounds are refused with a status, not kept waiting.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let Parts { services, guard, metrics, held, .. } = &*self.0;
        let called = Called::of(request.uri().path());
        Observed::new(called, request, metrics, |request| {
            layer::answer(called, guard.as_ref(), held, request, |request| services.call(called, request))
        })
    }
}
