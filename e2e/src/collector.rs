//! A collector of traces: accepts OTLP as http/protobuf, decodes it, and keeps the spans. Or accepts requests and never
//! answers.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{KeyValue, any_value::Value},
};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use crate::eventually;

/// A span as it arrived. Identifiers in hexadecimal, empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// What it is called.
    pub name: String,
    /// 1 internal, 2 server, 3 client.
    pub kind: i32,
    /// The name of its service.
    pub service: String,
    /// All attributes of its service.
    pub resource: BTreeMap<String, String>,
    /// The trace that it is in.
    pub trace: String,
    /// Itself.
    pub id: String,
    /// The span that it is within.
    pub parent: String,
    /// Trace and span of those that it is linked to.
    pub links: Vec<(String, String)>,
    /// Its attributes.
    pub attributes: BTreeMap<String, String>,
    /// 2: an error.
    pub status: i32,
}

#[derive(Debug, Default)]
struct Seen {
    requests: usize,
    headers: Option<HeaderMap>,
    spans: Vec<Span>,
}

/// See the module.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    _serving: AbortOnDropHandle<()>,
}

impl Collector {
    /// One that works.
    pub async fn start() -> Result<Self> {
        Self::serve(true).await
    }

    /// One that accepts every request and never answers.
    pub async fn silent() -> Result<Self> {
        Self::serve(false).await
    }

    async fn serve(answers: bool) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen")?;
        let address = listener.local_addr()?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let keep = seen.clone();
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let keep = keep.clone();
                let service = service_fn(move |request| take(request, keep.clone(), answers));
                tokio::spawn(async move {
                    // Clients come and go.
                    drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Ok(Self { address, seen, _serving: AbortOnDropHandle::new(serving) })
    }

    /// What to set `OTEL_EXPORTER_OTLP_ENDPOINT` to.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How many requests have arrived.
    pub fn requests(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).requests
    }

    /// A header of the latest request.
    pub fn header(&self, name: &str) -> Option<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Some(seen.headers.as_ref()?.get(name)?.to_str().ok()?.to_owned())
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Span> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).spans.clone()
    }

    /// The first wanted span, once it has arrived.
    pub async fn span(&self, what: &str, wanted: impl Fn(&Span) -> bool) -> Span {
        eventually(what, async || self.spans().into_iter().find(|span| wanted(span))).await
    }
}

async fn take(
    request: Request<Incoming>,
    seen: Arc<Mutex<Seen>>,
    answers: bool,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let right = request.uri().path() == "/v1/traces"
        && request.headers().get("content-type").is_some_and(|kind| kind == "application/x-protobuf");
    let headers = request.headers().clone();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let decoded = ExportTraceServiceRequest::decode(body);
    let mut response = Response::new(Full::new(ExportTraceServiceResponse::default().encode_to_vec().into()));
    {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.requests += 1;
        seen.headers = Some(headers);
        match decoded {
            Ok(decoded) if right => seen.spans.extend(spans(decoded)),
            _ => *response.status_mut() = http::StatusCode::BAD_REQUEST,
        }
    }
    if !answers {
        std::future::pending::<()>().await;
    }
    Ok(response)
}

fn spans(request: ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for of_resource in request.resource_spans {
        let resource = attributes(of_resource.resource.map(|resource| resource.attributes).unwrap_or_default());
        for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            spans.push(Span {
                name: span.name,
                kind: span.kind,
                service: resource.get("service.name").cloned().unwrap_or_default(),
                resource: resource.clone(),
                trace: hex::encode(span.trace_id),
                id: hex::encode(span.span_id),
                parent: hex::encode(span.parent_span_id),
                links: span
                    .links
                    .into_iter()
                    .map(|link| (hex::encode(link.trace_id), hex::encode(link.span_id)))
                    .collect(),
                attributes: attributes(span.attributes),
                status: span.status.map_or(0, |status| status.code),
            });
        }
    }
    spans
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Option<Value>| match value {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(truth)) => truth.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    pairs.into_iter().map(|pair| (pair.key, text(pair.value.and_then(|value| value.value)))).collect()
}
