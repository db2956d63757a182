//! A small application to stand behind the gateway of `dev`: it accepts everything, remembers what it got, and says so.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, service::service_fn};
use oncegate_runtime::{
    server::{Options, serve},
    shutdown::CancellationToken,
};
use serde::Serialize;
use tokio::{net::TcpListener, sync::mpsc};

/// The most that `GET /` shows: this is for looking at, not for keeping.
const REMEMBERED_MAX: usize = 1_000;

/// More than the gateway lets through.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// An event that reached the application, as the gateway describes it in its headers.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Delivery {
    pub(super) provider: String,
    pub(super) event_id: String,
    pub(super) event_type: String,
    pub(super) attempt: String,
    pub(super) fencing_token: String,
}

impl Delivery {
    fn new(headers: &HeaderMap) -> Self {
        let text =
            |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or("-").to_owned();
        Self {
            provider: text("oncegate-provider"),
            event_id: text("oncegate-event-id"),
            event_type: text("oncegate-event-type"),
            attempt: text("oncegate-attempt"),
            fencing_token: text("oncegate-fencing-token"),
        }
    }
}

/// Serves the application; every delivery also goes to `deliveries`.
pub(super) async fn run(
    listener: TcpListener,
    deliveries: mpsc::UnboundedSender<Delivery>,
    shutdown: CancellationToken,
) {
    let remembered = Arc::new(Mutex::new(VecDeque::new()));
    let service = service_fn(move |request| {
        let (remembered, deliveries) = (Arc::clone(&remembered), deliveries.clone());
        async move { Ok::<_, Infallible>(answer(request, &remembered, &deliveries).await) }
    });
    serve(listener, service, Options::http1(Duration::from_secs(1)), shutdown).await;
}

async fn answer(
    request: Request<Incoming>,
    remembered: &Mutex<VecDeque<Delivery>>,
    deliveries: &mpsc::UnboundedSender<Delivery>,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    match head.method {
        Method::GET => {
            let remembered = remembered.lock().unwrap_or_else(PoisonError::into_inner);
            json(StatusCode::OK, &*remembered)
        }
        Method::POST => {
            if Limited::new(body, BODY_BYTES_MAX).collect().await.is_err() {
                return json(StatusCode::BAD_REQUEST, &serde_json::json!({ "received": false }));
            }
            let delivery = Delivery::new(&head.headers);
            {
                let mut remembered = remembered.lock().unwrap_or_else(PoisonError::into_inner);
                if remembered.len() == REMEMBERED_MAX {
                    remembered.pop_front();
                }
                remembered.push_back(delivery.clone());
            }
            // Nobody is listening any more while the process ends.
            let _ = deliveries.send(delivery);
            json(StatusCode::OK, &serde_json::json!({ "received": true }))
        }
        _ => json(StatusCode::METHOD_NOT_ALLOWED, &serde_json::json!({ "received": false })),
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Response<Full<Bytes>> {
    let body = serde_json::to_vec_pretty(value).unwrap_or_default();
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
