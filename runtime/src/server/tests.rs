use std::{convert::Infallible, net::Ipv4Addr, num::NonZeroUsize};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Notify,
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::*;
use crate::{
    tls::{ClientTls, ClientTlsFiles, ServerTlsFiles},
    written::Written,
};

/// No wait in these tests should take longer; beyond it a test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(10);

struct Running {
    address: SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<Served>,
    /// A request for `/slow` has reached the service.
    slow: Arc<Notify>,
    /// Lets one of them finish.
    release: Arc<Notify>,
}

/// Serves a service that answers `ok`, or 400 to an ambiguous length, and on `/slow` waits for `release`.
async fn start(options: Options) -> Running {
    let (slow, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begun, released) = (slow.clone(), release.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let service = service_fn(move |request: Request<Incoming>| {
        let (begun, released) = (begun.clone(), released.clone());
        async move {
            if request.uri().path() == "/slow" {
                begun.notify_one();
                released.notified().await;
            }
            let ambiguous = request.extensions().get::<AmbiguousFraming>().is_some();
            let _ = request.into_body().collect().await;
            let mut response = Response::new(Full::new(Bytes::from_static(b"ok")));
            if ambiguous {
                *response.status_mut() = http::StatusCode::BAD_REQUEST;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let task = tokio::spawn(serve(listener, service, options, shutdown.clone()));
    Running { address, shutdown, task, slow, release }
}

async fn connect(running: &Running) -> TcpStream {
    TcpStream::connect(running.address).await.unwrap()
}

/// Sends `request` and reads until the answer's body `ok` is there.
async fn exchange(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, async {
        while !answer.ends_with(b"ok") {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "closed early");
        }
    })
    .await
    .unwrap();
    String::from_utf8(answer).unwrap()
}

async fn ended(running: Running) -> Served {
    timeout(PATIENCE, running.task).await.expect("serve ends").unwrap()
}

/// Reads until the peer closes.
async fn closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // A reset is as good as an end here.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("connection is closed");
}

const GET: &str = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    for protocol in [Options::http1(PATIENCE), Options::http2(PATIENCE)] {
        let options = Options { first_byte_timeout: Duration::from_millis(100), ..protocol };
        let running = start(options).await;
        let mut silent = connect(&running).await;
        closed(&mut silent).await;
        running.shutdown.cancel();
        assert_eq!(ended(running).await, Served { cut: 0 });
    }
}

#[tokio::test]
async fn silent_connections_do_not_delay_shutdown() {
    for options in [Options::http1(PATIENCE * 10), Options::http2(PATIENCE * 10)] {
        let begun_at_shutdown = matches!(options.protocol, Protocol::Http2(_));
        let running = start(Options { first_byte_timeout: PATIENCE * 10, ..options }).await;
        let mut silent = connect(&running).await;
        let mut half = connect(&running).await;
        if begun_at_shutdown {
            half.write_all(b"PRI * HT").await.unwrap();
        }
        running.shutdown.cancel();
        assert_eq!(ended(running).await, Served { cut: 0 });
        closed(&mut silent).await;
        closed(&mut half).await;
    }
}

#[tokio::test]
async fn shutdown_closes_the_listener_at_once_and_lets_requests_finish() {
    let running = start(Options::http1(PATIENCE)).await;
    let mut idle = connect(&running).await;
    exchange(&mut idle, GET).await;
    let mut slow = connect(&running).await;
    slow.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    running.slow.notified().await;
    running.shutdown.cancel();
    closed(&mut idle).await;
    let refused = timeout(PATIENCE, async { while TcpStream::connect(running.address).await.is_ok() {} }).await;
    assert!(refused.is_ok(), "new connections are refused");
    running.release.notify_one();
    let mut answer = String::new();
    timeout(PATIENCE, slow.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(ended(running).await, Served { cut: 0 });
}

#[tokio::test]
async fn a_head_that_is_never_finished_does_not_hold_up_shutdown() {
    let running = start(Options::http1(PATIENCE * 10)).await;
    let (mut idle, mut first) = (connect(&running).await, connect(&running).await);
    first.write_all(b"POST /x HTTP/1.1\r\nhost").await.unwrap();
    let mut second = connect(&running).await;
    exchange(&mut second, GET).await;
    second.write_all(b"GET / HT").await.unwrap();
    let mut slow = connect(&running).await;
    slow.write_all(b"GET /slow HTTP/1.1\r\nhost: ").await.unwrap();
    // All of them have been read by then.
    exchange(&mut idle, GET).await;
    running.shutdown.cancel();
    closed(&mut idle).await;
    // A peer that finishes its head is served, however long that takes.
    slow.write_all(b"x\r\n\r\n").await.unwrap();
    running.slow.notified().await;
    closed(&mut first).await;
    closed(&mut second).await;
    running.release.notify_one();
    let mut answer = String::new();
    timeout(PATIENCE, slow.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(ended(running).await, Served { cut: 0 });
}

#[tokio::test]
async fn what_outlasts_the_drain_is_cut_and_counted() {
    let running = start(Options::http1(Duration::from_millis(50))).await;
    let mut slow = connect(&running).await;
    slow.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    running.slow.notified().await;
    running.shutdown.cancel();
    assert_eq!(ended(running).await, Served { cut: 1 });
    closed(&mut slow).await;
}

#[tokio::test]
async fn beyond_the_cap_connections_wait_for_their_turn() {
    let options = Options { connections_max: 1, ..Options::http1(PATIENCE) };
    let running = start(options).await;
    let mut first = connect(&running).await;
    exchange(&mut first, GET).await;
    let mut second = connect(&running).await;
    second.write_all(GET.as_bytes()).await.unwrap();
    let mut byte = [0];
    let early = timeout(Duration::from_millis(100), second.read(&mut byte)).await;
    assert!(early.is_err(), "the second connection has no slot yet");
    drop(first);
    assert_eq!(timeout(PATIENCE, second.read(&mut byte)).await.unwrap().unwrap(), 1);
    running.shutdown.cancel();
}

#[tokio::test]
async fn w15_an_address_that_has_its_share_keeps_nobody_else_out() {
    let shares = Shares::with_exemption(NonZeroUsize::new(2).unwrap(), |address| address == Ipv4Addr::LOCALHOST);
    let running = start(Options { shares: Some(shares.clone()), ..Options::http1(PATIENCE) }).await;
    let from = async |last: u8| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
        socket.connect(running.address).await.unwrap()
    };
    let (mut first, mut second) = (from(2).await, from(2).await);
    exchange(&mut first, GET).await;
    exchange(&mut second, GET).await;
    closed(&mut from(2).await).await;
    assert_eq!(shares.refused(), 1);
    for other in [3, 4, 1, 1, 1] {
        let mut other = from(other).await;
        exchange(&mut other, GET).await;
    }
    // A peer with a full share is served, and may connect again once it has closed a connection.
    exchange(&mut first, GET).await;
    drop(second);
    timeout(PATIENCE, async {
        loop {
            let mut again = from(2).await;
            let mut byte = [0];
            if again.write_all(GET.as_bytes()).await.is_ok() && again.read(&mut byte).await.is_ok_and(|read| read == 1)
            {
                break;
            }
        }
    })
    .await
    .expect("the place comes free");
    running.shutdown.cancel();
}

/// Peers that come and go while every place is taken cannot make the log grow at will.
#[tokio::test]
async fn a_full_listener_logs_a_line_a_second_at_most() {
    let written = Written::default();
    let logging = tracing::subscriber::set_default(written.subscriber());
    let begun = Instant::now();
    let running = start(Options { connections_max: 1, ..Options::http1(PATIENCE) }).await;
    for _ in 0..50 {
        let mut connection = connect(&running).await;
        exchange(&mut connection, GET).await;
    }
    let seconds = begun.elapsed().as_secs() + 2;
    running.shutdown.cancel();
    drop(logging);
    let lines = written.text().matches("connection limit reached").count() as u64;
    assert!((1..=seconds).contains(&lines), "{lines} in {seconds} s");
}

#[tokio::test]
async fn both_lengths_are_marked_in_either_order_and_nothing_else_is() {
    let running = start(Options::http1(PATIENCE)).await;
    let chunked = "2\r\nhi\r\n0\r\n\r\n";
    for (headers, body, status) in [
        ("content-length: 2\r\n", "hi", "200"),
        ("transfer-encoding: chunked\r\n", chunked, "200"),
        ("transfer-encoding: chunked\r\ncontent-length: 2\r\n", chunked, "400"),
        ("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", chunked, "400"),
    ] {
        // On one connection, twice each: one request says nothing about the next.
        let mut stream = connect(&running).await;
        exchange(&mut stream, "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await;
        let answer = exchange(&mut stream, &format!("POST / HTTP/1.1\r\nhost: x\r\n{headers}\r\n{body}")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{headers}: {answer}");
    }
    // An earlier request in the same read hides nothing.
    let mut stream = connect(&running).await;
    let hidden = "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi\
                  POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\
                  transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    stream.write_all(hidden.as_bytes()).await.unwrap();
    let mut answers = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answers)).await.unwrap().unwrap();
    assert!(answers.starts_with("HTTP/1.1 200") && answers.contains("HTTP/1.1 400"), "{answers}");
    let mut stream = connect(&running).await;
    stream.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi").await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    running.shutdown.cancel();
}

#[tokio::test]
async fn large_heads_and_slow_heads_are_refused() {
    let mut options = Options::http1(PATIENCE);
    options.protocol = Protocol::Http1(Http1 { header_read_timeout: Duration::from_millis(200), ..Http1::default() });
    let running = start(options).await;
    let mut large = connect(&running).await;
    let head = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(17 * 1024));
    large.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    timeout(PATIENCE, large.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"HTTP/1.1 431");
    let mut slow = connect(&running).await;
    let begun = Instant::now();
    slow.write_all(b"GET / HTTP/1.1\r\nhost").await.unwrap();
    closed(&mut slow).await;
    assert!(begun.elapsed() < PATIENCE);
    running.shutdown.cancel();
}

/// A connection that was served and then goes idle: closed after its time, and not before.
#[tokio::test]
async fn a_connection_that_goes_idle_is_closed() {
    const IDLE: Duration = Duration::from_millis(300);
    let mut options = Options::http1(PATIENCE);
    options.protocol = Protocol::Http1(Http1 { header_read_timeout: IDLE, ..Http1::default() });
    let running = start(options).await;
    let mut idle = connect(&running).await;
    for _ in 0..3 {
        exchange(&mut idle, GET).await;
    }
    let begun = Instant::now();
    closed(&mut idle).await;
    // The time starts at the last answer, which may have been under way for a moment.
    assert!(begun.elapsed() > IDLE / 2, "{:?}", begun.elapsed());
    running.shutdown.cancel();
    assert_eq!(ended(running).await, Served { cut: 0 });
}

/// A peer that sends its preface and then nothing more, not even answers to pings, is closed together with its open call.
#[tokio::test]
async fn a_peer_that_ignores_pings_is_cut() {
    let mut options = Options::http2(PATIENCE);
    options.protocol = Protocol::Http2(Http2 {
        keep_alive_interval: Duration::from_millis(100),
        keep_alive_timeout: Duration::from_millis(100),
        ..Http2::default()
    });
    let running = start(options).await;
    let mut deaf = connect(&running).await;
    // The preface, and settings: none, and the other side's acknowledged.
    deaf.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0").await.unwrap();
    closed(&mut deaf).await;
    // One that answers pings stays, and is still served after many times that long.
    let stream = TokioIo::new(connect(&running).await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    let client = tokio::spawn(connection);
    let get = |path: &str| Request::get(format!("http://x{path}")).body(Full::new(Bytes::new())).unwrap();
    let slow = tokio::spawn(sender.send_request(get("/slow")));
    running.slow.notified().await;
    let mut other = connect(&running).await;
    other.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    closed(&mut other).await;
    running.release.notify_one();
    assert_eq!(timeout(PATIENCE, slow).await.unwrap().unwrap().unwrap().status(), 200);
    running.shutdown.cancel();
    assert_eq!(ended(running).await, Served { cut: 0 });
    let _ = timeout(PATIENCE, client).await.expect("the connection is closed");
}

#[tokio::test]
async fn http2_with_prior_knowledge_is_served_and_drained() {
    let running = start(Options::http2(PATIENCE)).await;
    let stream = TokioIo::new(connect(&running).await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    let client = tokio::spawn(connection);
    let get = |path: &str| Request::get(format!("http://x{path}")).body(Full::new(Bytes::new())).unwrap();
    let answer = sender.send_request(get("/")).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "ok");
    let slow = sender.send_request(get("/slow"));
    let slow = tokio::spawn(slow);
    running.slow.notified().await;
    running.shutdown.cancel();
    running.release.notify_one();
    assert_eq!(timeout(PATIENCE, slow).await.unwrap().unwrap().unwrap().status(), 200);
    assert_eq!(ended(running).await, Served { cut: 0 });
    let _ = timeout(PATIENCE, client).await.expect("the connection is closed");
}

#[tokio::test]
async fn a_peer_that_never_reads_is_cut() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = service_fn(async |_: Request<Incoming>| {
        // More than the buffers of both kernels can hold.
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![0; 64 << 20]))))
    });
    let options = Options {
        write_timeout: Duration::from_millis(200),
        connections_max: 1,
        ..Options::http1(Duration::from_secs(1))
    };
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(serve(listener, service, options, shutdown.clone()));
    let mut deaf = TcpStream::connect(address).await.unwrap();
    deaf.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    // There is only one place, and it becomes free.
    let mut next = TcpStream::connect(address).await.unwrap();
    next.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    timeout(PATIENCE, next.read_u8()).await.expect("the place comes free").unwrap();
    drop(next);
    shutdown.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap();
}

/// A listener's TLS, and that of a client that trusts it.
fn tls() -> (ServerTls, ClientTls) {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, content: String| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (write("cert", own.cert.pem()), write("key", own.signing_key.serialize_pem()));
    let client = ClientTls::read(&ClientTlsFiles { ca: Some(certificate.clone()), identity: None }, &[]).unwrap();
    (ServerTls::read(&ServerTlsFiles { certificate, key, client_ca: None }, &[]).unwrap(), client)
}

/// TLS takes up to 64 KiB from hyper before it waits for the peer, in a flush or at the end of the connection. The answers here
/// fit into that, but not into the buffers of the kernels.
#[tokio::test]
async fn w15_a_peer_that_never_reads_is_cut_with_tls_as_well() {
    const REQUESTS: usize = 15;
    let (tls, client) = tls();
    let name = ServerName::try_from("localhost").unwrap();
    for last in [GET, "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"] {
        let socket = TcpSocket::new_v4().unwrap();
        // Those of the connections. With that of the client, some 12 KiB of answers are under way.
        socket.set_send_buffer_size(4 << 10).unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let listener = socket.listen(16).unwrap();
        let address = listener.local_addr().unwrap();
        let service = service_fn(async |_: Request<Incoming>| {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(&[0; 4 << 10]))))
        });
        let options = Options {
            write_timeout: Duration::from_millis(200),
            connections_max: 1,
            tls: Some(tls.clone()),
            ..Options::http1(Duration::from_secs(1))
        };
        let shutdown = CancellationToken::new();
        let served = tokio::spawn(serve(listener, service, options, shutdown.clone()));
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 << 10).unwrap();
        let mut deaf = client.connect(name.clone(), socket.connect(address).await.unwrap()).await.unwrap();
        deaf.write_all(format!("{}{last}", GET.repeat(REQUESTS - 1)).as_bytes()).await.unwrap();
        deaf.flush().await.unwrap();
        // There is only one place, and it becomes free.
        let next = TcpStream::connect(address).await.unwrap();
        let served_next = async {
            let mut next = client.connect(name.clone(), next).await.unwrap();
            next.write_all(GET.as_bytes()).await.unwrap();
            next.read_u8().await.unwrap();
        };
        timeout(PATIENCE, served_next).await.expect("the place comes free");
        drop(deaf);
        shutdown.cancel();
        timeout(PATIENCE, served).await.unwrap().unwrap();
    }
}
