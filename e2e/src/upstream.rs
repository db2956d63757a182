//! An application behind the gateway: a real server that records what reaches it and answers as a test wants.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header::CONTENT_LENGTH};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::eventually::DEADLINE;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A request that reached the application.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// When its body had arrived.
    pub at: Instant,
    /// Its method.
    pub method: Method,
    /// Its target.
    pub uri: Uri,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body, as received.
    pub body: Bytes,
}

impl Recorded {
    /// A header's value as text, empty when there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// How a request is answered.
#[derive(Clone, Debug)]
pub struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    delay: Duration,
    fault: Option<Fault>,
}

/// What goes wrong with an answer.
#[derive(Clone, Copy, Debug)]
enum Fault {
    ResetBeforeAnswer,
    ResetInBody,
    HangBeforeAnswer,
    HangInBody,
}

impl Answer {
    /// A status and a short body.
    pub fn status(status: u16) -> Self {
        Self {
            status: StatusCode::from_u16(status).expect("a test names a status that exists"),
            headers: HeaderMap::new(),
            body: Bytes::from_static(b"{\"from\":\"application\"}"),
            delay: Duration::ZERO,
            fault: None,
        }
    }

    /// 200.
    pub fn ok() -> Self {
        Self::status(200)
    }

    /// With another body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// With a further header.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers.insert(name, http::HeaderValue::from_static(value));
        self
    }

    /// Answered only after this long.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// The connection is reset once the request has arrived.
    pub fn reset() -> Self {
        Self { fault: Some(Fault::ResetBeforeAnswer), ..Self::ok() }
    }

    /// No answer ever comes.
    pub fn hang() -> Self {
        Self { fault: Some(Fault::HangBeforeAnswer), ..Self::ok() }
    }

    /// The connection is reset after the headers and the first part of the body.
    #[must_use]
    pub fn reset_in_body(mut self) -> Self {
        self.fault = Some(Fault::ResetInBody);
        self
    }

    /// The rest of the body never comes.
    #[must_use]
    pub fn hang_in_body(mut self) -> Self {
        self.fault = Some(Fault::HangInBody);
        self
    }
}

#[derive(Debug)]
struct State {
    requests: Vec<Recorded>,
    next: VecDeque<Answer>,
    otherwise: Answer,
}

#[derive(Debug)]
struct Shared {
    // A synchronous lock: held for a push or a clone, never across an await.
    state: Mutex<State>,
    arrived: Notify,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked while holding the lock left nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The application. Answers 200 until told otherwise; ends when dropped.
#[derive(Debug)]
pub struct Upstream {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Upstream {
    /// Starts it on a free port.
    pub async fn start() -> Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot bind the application's port")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State { requests: Vec::new(), next: VecDeque::new(), otherwise: Answer::ok() }),
            arrived: Notify::new(),
        });
        let server = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What to set `UPSTREAM_URL` to.
    pub fn url(&self) -> String {
        format!("http://{}/payments", self.address)
    }

    /// Answers the next requests like this, in this order, each once.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = Answer>) {
        self.shared.state().next.extend(answers);
    }

    /// Answers like this when no scripted answer is left.
    pub fn answer_otherwise(&self, answer: Answer) {
        self.shared.state().otherwise = answer;
    }

    /// What has arrived so far.
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.state().requests.clone()
    }

    /// Waits until `count` requests have arrived, and returns all that have.
    pub async fn wait_for(&self, count: usize) -> Vec<Recorded> {
        self.wait_until(&format!("{count} requests reach the application"), |requests| requests.len() >= count).await
    }

    /// Waits until the requests that have arrived satisfy a condition, and returns them.
    pub async fn wait_until(&self, what: &str, condition: impl Fn(&[Recorded]) -> bool) -> Vec<Recorded> {
        let wait = async {
            loop {
                // Requested before the check, so that an arrival in between is not missed.
                let arrived = self.shared.arrived.notified();
                let requests = self.requests();
                if condition(&requests) {
                    return requests;
                }
                arrived.await;
            }
        };
        match timeout(DEADLINE, wait).await {
            Ok(requests) => requests,
            Err(_) => panic!("not within {DEADLINE:?}: {what}; arrived: {:#?}", self.requests()),
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// A URL on which nothing listens.
pub fn refused_url() -> Result<String> {
    Ok(format!("http://{}:{}/payments", Ipv4Addr::LOCALHOST, crate::postgres::free_port()?))
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Connections end with the server: dropping the set aborts them.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            connections.spawn(serve(stream, Arc::clone(&shared)));
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let reset = Notify::new();
    let reset = &reset;
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { answer(request, &shared, reset).await }
    });
    let mut connection = http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // An error is the other side's concern.
        _ = &mut connection => {}
        () = reset.notified() => {
            // With this, closing the socket sends a reset instead of an orderly end.
            let _ = connection.into_parts().io.into_inner().set_zero_linger();
        }
    }
}

async fn answer(request: Request<Incoming>, shared: &Shared, reset: &Notify) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else {
        // The other side went away: there is nobody to answer, and nothing arrived.
        return Ok(Response::new(Full::default().map_err(never).boxed_unsync()));
    };
    let answer = {
        let mut state = shared.state();
        state.requests.push(Recorded {
            at: Instant::now(),
            method: head.method,
            uri: head.uri,
            headers: head.headers,
            body: body.to_bytes(),
        });
        state.next.pop_front().unwrap_or_else(|| state.otherwise.clone())
    };
    shared.arrived.notify_waiters();
    sleep(answer.delay).await;
    match answer.fault {
        Some(Fault::ResetBeforeAnswer) => {
            reset.notify_one();
            std::future::pending::<()>().await;
        }
        Some(Fault::HangBeforeAnswer) => std::future::pending::<()>().await,
        None | Some(Fault::ResetInBody | Fault::HangInBody) => {}
    }
    let whole = answer.body.len();
    let body = match answer.fault {
        Some(Fault::ResetInBody) => part(answer.body)
            .chain(stream::once(async { Err(io::Error::from(io::ErrorKind::ConnectionReset)) }))
            .boxed(),
        Some(Fault::HangInBody) => part(answer.body).chain(stream::pending()).boxed(),
        None | Some(Fault::ResetBeforeAnswer | Fault::HangBeforeAnswer) => {
            stream::once(async move { Ok(Frame::data(answer.body)) }).boxed()
        }
    };
    let mut response = Response::new(StreamBody::new(body).boxed_unsync());
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    response.headers_mut().insert(CONTENT_LENGTH, whole.into());
    Ok(response)
}

/// The first half of a body, whose rest does not follow.
fn part(body: Bytes) -> impl futures::Stream<Item = io::Result<Frame<Bytes>>> + Send {
    let half = body.slice(..body.len() / 2);
    stream::once(async move { Ok(Frame::data(half)) })
}

fn never(error: Infallible) -> io::Error {
    match error {}
}
