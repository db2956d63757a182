//! Requests that say in two ways how long they are.

use std::sync::Arc;

use http::{
    Request,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
};
use hyper::service::Service;

use super::watched::Seen;

/// Extension of an HTTP/1 request that carries both `Transfer-Encoding` and `Content-Length`. hyper drops the latter
/// before a service sees it; behind a proxy that goes by the other one, the rest of the body is somebody's next
/// request. Refuse it and close the connection (pitfalls 3.4.5). Two different `Content-Length` are refused by hyper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AmbiguousFraming;

/// Marks such requests for the service within.
#[derive(Clone)]
pub(super) struct Framed<S> {
    service: S,
    seen: Arc<Seen>,
}

impl<S> Framed<S> {
    pub(super) fn new(service: S, seen: Arc<Seen>) -> Self {
        Self { service, seen }
    }
}

impl<S, B> Service<Request<B>> for Framed<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, mut request: Request<B>) -> Self::Future {
        // Of several requests in one piece (pipelining), each accounts for its own line, so that an earlier one cannot
        // hide what a later one does. A chunked one before others may be refused for theirs; nobody sends that.
        let headers = request.headers();
        if headers.contains_key(TRANSFER_ENCODING) {
            if self.seen.take_content_lengths() {
                request.extensions_mut().insert(AmbiguousFraming);
            }
        } else if headers.contains_key(CONTENT_LENGTH) {
            self.seen.account_for_content_length();
        }
        self.service.call(request)
    }
}
