//! The application: a real HTTP server that records what it gets and answers as it is told.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use oncegate_runtime::{
    server::{Options, serve},
    shutdown::CancellationToken,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    time::timeout,
};

use crate::client::PATIENCE;

/// What the application got.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What it answers.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    Status(u16),
    RetryAfter(u16, &'static str),
    /// 200, but only after [`Application::release`].
    Held,
    /// Never.
    Never,
}

/// The application.
#[derive(Clone)]
pub(crate) struct Application {
    address: SocketAddr,
    shared: Arc<Shared>,
    _stop: Arc<tokio_util::sync::DropGuard>,
}

#[derive(Default)]
struct Shared {
    deliveries: Mutex<Vec<Delivery>>,
    replies: Mutex<VecDeque<Reply>>,
    arrived: Notify,
    release: Notify,
}

impl Application {
    /// Answers 200, after the replies of [`Application::reply`] are used up.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let stop = CancellationToken::new();
        let handler = shared.clone();
        let service = service_fn(move |request| handle(handler.clone(), request));
        let options = Options::http1(std::time::Duration::ZERO);
        tokio::spawn(serve(listener, service, options, stop.clone()));
        Self { address, shared, _stop: Arc::new(stop.drop_guard()) }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// Queues the next answer.
    pub(crate) fn reply(&self, reply: Reply) {
        self.shared.replies.lock().unwrap().push_back(reply);
    }

    /// Lets one held answer go.
    pub(crate) fn release(&self) {
        self.shared.release.notify_one();
    }

    pub(crate) fn deliveries(&self) -> Vec<Delivery> {
        self.shared.deliveries.lock().unwrap().clone()
    }

    /// Waits until this many deliveries have arrived.
    pub(crate) async fn arrived(&self, count: usize) {
        let all = async {
            loop {
                let arrived = self.shared.arrived.notified();
                if self.deliveries().len() >= count {
                    return;
                }
                arrived.await;
            }
        };
        timeout(PATIENCE, all).await.expect("deliveries arrive in time");
    }
}

async fn handle(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    shared.deliveries.lock().unwrap().push(Delivery { headers: parts.headers, body });
    let reply = shared.replies.lock().unwrap().pop_front().unwrap_or(Reply::Status(200));
    shared.arrived.notify_waiters();
    let mut response = Response::builder();
    response = match reply {
        Reply::Status(status) => response.status(status),
        Reply::RetryAfter(status, after) => response.status(status).header("retry-after", after),
        Reply::Held => {
            shared.release.notified().await;
            response.status(200)
        }
        Reply::Never => std::future::pending().await,
    };
    Ok(response.body(Full::new(Bytes::from_static(b"thanks"))).unwrap())
}

/// An application that reads a little of each request and then resets the connection.
pub(crate) async fn that_resets() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut some = [0; 64];
            let _ = stream.read(&mut some).await;
        }
    });
    url
}

/// Waits for the end of the one event that is sent, and answers with the head of a body of so many bytes.
async fn begin(listener: TcpListener, length: usize) -> TcpStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    // Every event in these tests ends like this, and nothing before the end does.
    while !request.ends_with(b"}}}") {
        assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0, "closed early");
    }
    stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").as_bytes()).await.unwrap();
    stream
}

/// An application that answers an event with a body of so many bytes, and tells whether all of them were taken.
pub(crate) async fn that_floods(length: usize) -> (String, oneshot::Receiver<std::io::Result<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (ended, written) = oneshot::channel();
    tokio::spawn(async move {
        let mut stream = begin(listener, length).await;
        let (part, mut left, mut written) = ([b'x'; 1 << 16], length, Ok(()));
        while left > 0 && written.is_ok() {
            let next = left.min(part.len());
            written = stream.write_all(&part[..next]).await;
            left -= next;
        }
        let _ = ended.send(written);
    });
    (url, written)
}

/// An application that answers an event with a part of a body, and tells when the connection is closed.
pub(crate) async fn that_stalls_in_its_body() -> (String, oneshot::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (ended, closed) = oneshot::channel();
    tokio::spawn(async move {
        let mut stream = begin(listener, 100).await;
        stream.write_all(b"half").await.unwrap();
        let _ = stream.read(&mut [0]).await;
        let _ = ended.send(());
    });
    (url, closed)
}

/// An application that answers each event with exactly these bytes, and closes.
pub(crate) async fn that_answers(answer: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            // Every event in these tests ends like this, and nothing before the end does.
            while !request.ends_with(b"}}}") {
                assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0, "closed early");
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    url
}

/// An application that closes each connection after one answer without announcing it.
pub(crate) async fn that_closes_quietly() -> String {
    that_answers("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned()).await
}

/// An address where nobody listens.
pub(crate) fn that_is_away() -> String {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    format!("http://127.0.0.1:{port}/hook")
}
