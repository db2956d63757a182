//! A connection to a sidecar, spoken by the HTTP/2 library itself: with a channel and a client of gRPC around it, the load took
//! twice the processor time for each call, on the machine that it measures.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use h2::{
    PingPong,
    client::{self, ResponseFuture, SendRequest},
};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version, header, uri::PathAndQuery};
use oncegate_gateway::sidecar::Reach;
use tokio::sync::Mutex;
use tonic::Status;

/// Room for answers that the load has not read yet, on the whole connection.
const WINDOW_BYTES: u32 = 1 << 20;
/// How often the other side is asked whether it is there, and how long it has for the answer: what vanishes silently is
/// replaced before every caller has waited for its time-out.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// In front of each message: whether it is compressed, and its length (gRPC over HTTP/2, "Length-Prefixed-Message").
pub(super) const PREFIX_BYTES: usize = 5;

/// A connection that some callers share. It is made anew when it was lost.
pub(super) struct Connection {
    reach: Reach,
    open: Mutex<Open>,
}

/// What requests are sent with.
#[derive(Clone)]
struct Open {
    requests: SendRequest<Bytes>,
    /// How many times it was made anew.
    number: u64,
    head: Arc<Head>,
}

/// What all requests have in common.
struct Head {
    origin: Uri,
    headers: HeaderMap,
}

/// One caller's use of a connection.
pub(super) struct Calls {
    connection: Arc<Connection>,
    open: Open,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// What was wrong with the last address that was tried.
    pub(super) async fn open(reach: &Reach) -> anyhow::Result<Arc<Connection>> {
        let open = Open::new(reach, 0).await?;
        Ok(Arc::new(Connection { reach: reach.clone(), open: Mutex::new(open) }))
    }

    /// For one more caller.
    pub(super) async fn calls(self: &Arc<Self>) -> Calls {
        Calls { connection: Arc::clone(self), open: self.open.lock().await.clone() }
    }

    /// The connection after the one with this number: whoever comes first makes it, and the others wait for that.
    async fn after(&self, number: u64) -> Result<Open, Status> {
        let mut open = self.open.lock().await;
        if open.number == number {
            let again = Open::new(&self.reach, number + 1).await;
            *open = again.map_err(|error| Status::unavailable(format!("no connection: {error:#}")))?;
        }
        Ok(open.clone())
    }
}

impl Open {
    async fn new(reach: &Reach, number: u64) -> anyhow::Result<Open> {
        let (stream, origin) = reach.open().await.map_err(anyhow::Error::from_boxed)?;
        let handshake = client::Builder::new()
            .initial_connection_window_size(WINDOW_BYTES)
            .enable_push(false)
            .handshake::<_, Bytes>(stream);
        let (requests, mut connection) = handshake.await?;
        let pings = connection.ping_pong();
        tokio::spawn(async move {
            // Ends when nobody has it any more; its callers are told of an error as well.
            tokio::select! {
                _ended = connection => {}
                () = until_silent(pings) => {}
            }
        });
        let mut headers = HeaderMap::with_capacity(4);
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.extend(reach.authorization().map(|value| (header::AUTHORIZATION, value)));
        Ok(Open { requests, number, head: Arc::new(Head { origin, headers }) })
    }
}

/// Returns when the other side no longer answers.
async fn until_silent(pings: Option<PingPong>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(KEEP_ALIVE_INTERVAL).await;
        let answer = tokio::time::timeout(KEEP_ALIVE_TIMEOUT, pings.ping(h2::Ping::opaque())).await;
        if !matches!(answer, Ok(Ok(_))) {
            return;
        }
    }
}

impl Calls {
    /// Sends a message, with its prefix, and returns the answer's, without.
    ///
    /// # Errors
    /// What the service answers, or what became of the connection.
    pub(super) async fn unary(&mut self, path: &'static str, message: Bytes) -> Result<Bytes, Status> {
        let answer = self.send(path, message).await?;
        let (head, mut body) = answer.await.map_err(status)?.into_parts();
        // An error without a message stands here.
        if let Some(refused) = Status::from_header_map(&head.headers) {
            return Err(refused);
        }
        let mut message = Bytes::new();
        while let Some(part) = body.data().await {
            let part = part.map_err(status)?;
            body.flow_control().release_capacity(part.len()).map_err(status)?;
            message = if message.is_empty() { part } else { joined(&message, &part) };
        }
        let trailers = body.trailers().await.map_err(status)?.unwrap_or_default();
        match Status::from_header_map(&trailers) {
            Some(status) if status.code() == tonic::Code::Ok => {}
            Some(refused) => return Err(refused),
            None => return Err(Status::unknown(format!("HTTP {} without a status of gRPC", head.status))),
        }
        if message.len() < PREFIX_BYTES {
            return Err(Status::internal("the answer has no message"));
        }
        Ok(message.split_off(PREFIX_BYTES))
    }

    async fn send(&mut self, path: &'static str, message: Bytes) -> Result<ResponseFuture, Status> {
        // Consumed by the wait until it has room for one more, and given back.
        let mut ready = self.open.requests.clone().ready().await;
        if ready.is_err() {
            self.open = self.connection.after(self.open.number).await?;
            ready = self.open.requests.clone().ready().await;
        }
        let mut requests = ready.map_err(status)?;
        let head = &self.open.head;
        let mut uri = head.origin.clone().into_parts();
        uri.path_and_query = Some(PathAndQuery::from_static(path));
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(uri).expect("an origin and a path make a URI");
        *request.headers_mut() = head.headers.clone();
        let (answer, mut body) = requests.send_request(request, false).map_err(status)?;
        body.send_data(message, true).map_err(status)?;
        self.open.requests = requests;
        Ok(answer)
    }
}

fn joined(first: &[u8], second: &[u8]) -> Bytes {
    let mut both = BytesMut::with_capacity(first.len() + second.len());
    both.extend_from_slice(first);
    both.extend_from_slice(second);
    both.freeze()
}

/// What an error of the connection means, in the terms of gRPC.
fn status(error: h2::Error) -> Status {
    if error.is_io() {
        return Status::unavailable(error.to_string());
    }
    Status::from_error(error.into())
}
