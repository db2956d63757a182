//! The accept loop: connections for hyper with every limit set, and a shutdown that is sure to end.
//!
//! hyper bounds neither the number of connections, nor the wait for the first bytes, nor its own graceful shutdown, which a
//! peer that connects and stays silent can hold up for an hour. This module does.

mod alarm;
mod clock;
mod framing;
mod listener;
mod scan;
mod shares;
mod unstalled;
mod watched;

use std::{
    convert::Infallible,
    error::Error as StdError,
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use alarm::Alarm;
use clock::Clock;
pub use framing::AmbiguousFraming;
use framing::Framed;
use http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    server::conn::{http1, http2},
    service::Service,
};
pub use hyper_util::service::TowerToHyperService;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::graceful::GracefulConnection,
};
pub use listener::{Accepted, Address, AddressError, Listener};
use shares::Share;
pub use shares::{Shares, network};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use unstalled::Unstalled;
use watched::{Seen, Watched};

use crate::{
    chain::Chain,
    throttle::Throttle,
    tls::{ClientCertificate, ServerTls},
};

/// How connections are served.
#[derive(Debug, Clone)]
pub struct Options {
    /// Connections open at once; beyond it the accept waits and further ones queue in the kernel. Default 4,096.
    pub connections_max: usize,
    /// How many of them one address may have; beyond it new ones are closed. Default none: behind a proxy or a mesh
    /// everybody has one address.
    pub shares: Option<Arc<Shares>>,
    /// How long a connection may take to send anything at all (HTTP/2: to send its preface) before it is closed. Default 5 s:
    /// nobody connects without having something to send, except health checks of load balancers.
    pub first_byte_timeout: Duration,
    /// How long a peer may accept nothing of what was written for it before its connection is cut. hyper waits for ever: a
    /// peer that sends requests and never reads would keep its place. Default 30 s.
    pub write_timeout: Duration,
    /// How long connections may take to finish once shutdown has begun. Any that are left are cut.
    pub drain: Duration,
    /// The protocol spoken.
    pub protocol: Protocol,
    /// TLS around it; not on Unix sockets. The handshake has to be done within `first_byte_timeout`.
    pub tls: Option<ServerTls>,
}

impl Options {
    /// HTTP/1 only, with defaults.
    #[must_use]
    pub fn http1(drain: Duration) -> Self {
        Self::new(Protocol::Http1(Http1::default()), drain)
    }

    /// HTTP/2 only, with prior knowledge (no upgrade), with defaults.
    #[must_use]
    pub fn http2(drain: Duration) -> Self {
        Self::new(Protocol::Http2(Http2::default()), drain)
    }

    fn new(protocol: Protocol, drain: Duration) -> Self {
        Self {
            connections_max: 4_096,
            shares: None,
            first_byte_timeout: Duration::from_secs(5),
            write_timeout: Duration::from_secs(30),
            drain,
            protocol,
            tls: None,
        }
    }
}

/// One protocol per listener: detecting both would wait for the first bytes without a time-out.
#[derive(Debug, Clone)]
pub enum Protocol {
    /// HTTP/1.0 and 1.1.
    Http1(Http1),
    /// HTTP/2 with prior knowledge: gRPC.
    Http2(Http2),
}

/// Limits of an HTTP/1 connection.
#[derive(Debug, Clone)]
pub struct Http1 {
    /// From the first wait for a request to the end of its head; also how long an idle connection is kept.
    /// Default 30 s.
    pub header_read_timeout: Duration,
    /// Request line and headers, in bytes. More is answered with 431. Default 16 KiB; together with hyper's own limit of 100
    /// headers this bounds the memory of a head. That limit is left as it is: changing it costs an allocation per request.
    pub header_bytes_max: usize,
    /// The read buffer of a connection, in bytes, at least 8,192. Default 32 KiB.
    pub buffer_bytes_max: usize,
}

impl Default for Http1 {
    fn default() -> Self {
        Self { header_read_timeout: Duration::from_secs(30), header_bytes_max: 16 * 1024, buffer_bytes_max: 32 * 1024 }
    }
}

/// Limits of an HTTP/2 connection. hyper's own limit against floods of continuations stays in force; those against floods of
/// resets follow from `streams_max`.
#[derive(Debug, Clone)]
pub struct Http2 {
    /// Requests under way on one connection. Default 256, which is too few where requests wait for others of the same client.
    pub streams_max: u32,
    /// How often a silent connection is asked whether it is alive. Default 20 s: below the idle time-outs of common
    /// load balancers and NATs.
    pub keep_alive_interval: Duration,
    /// How long the answer to that may take. Default 10 s.
    pub keep_alive_timeout: Duration,
    /// Headers of a request, in bytes as HTTP/2 counts them. Default 16 KiB.
    pub header_bytes_max: u32,
}

impl Http2 {
    /// How many streams may be reset on one connection, both of those whose requests have not been looked at yet, at a time (the
    /// peer cancels calls), and of those that are reset by this side, over the connection's life (the peer opens more than are
    /// permitted). Beyond it the connection ends, for everybody on it.
    ///
    /// h2 permits 20 and 1,024, made for a browser. Here many callers share a connection, and may cancel all that they have
    /// under way at once: when their process is told to end, or when what they all wait for fails. Four times as many as may be
    /// under way lets them, and more than once. What it costs is what h2 keeps of that many heads until the next turn of the
    /// connection, and a flood of resets still ends at it.
    fn resets_max(&self) -> usize {
        const TIMES: usize = 4;
        usize::try_from(self.streams_max).unwrap_or(usize::MAX).saturating_mul(TIMES).max(1_024)
    }
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            streams_max: 256,
            keep_alive_interval: Duration::from_secs(20),
            keep_alive_timeout: Duration::from_secs(10),
            header_bytes_max: 16 * 1024,
        }
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address; None on a Unix socket.
    pub address: Option<SocketAddr>,
    /// Its verified certificate, if it has one.
    pub certificate: Option<Arc<ClientCertificate>>,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.address {
            Some(address) => address.fmt(f),
            None => f.write_str("unix"),
        }
    }
}

/// How serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Connections that were still busy at the end of the drain, and were cut.
    pub cut: usize,
}

/// Serves `service` on `listener` until `shutdown` is cancelled and every connection has finished, or the drain time is
/// over. The listener is closed as soon as shutdown begins, so that new connections go elsewhere.
///
/// The service is cloned for each connection. A tower service fits through [`TowerToHyperService`]. An HTTP/1 request
/// whose length is ambiguous carries the extension [`AmbiguousFraming`].
///
/// Dropping the future closes the listener and leaves open connections running on their own until they end.
pub async fn serve<S, B>(
    listener: impl Into<Listener>,
    service: S,
    options: Options,
    shutdown: CancellationToken,
) -> Served
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    serve_each(listener, move |_: &Peer| service.clone(), options, shutdown).await
}

/// As [`serve`], but with a service made for each connection, which may depend on who is at the other end.
pub async fn serve_each<S, B>(
    listener: impl Into<Listener>,
    service: impl Fn(&Peer) -> S + Clone + Send + 'static,
    options: Options,
    shutdown: CancellationToken,
) -> Served
where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let drain = options.drain;
    let connections = TaskTracker::new();
    let cut = CancellationToken::new();
    let worker = Worker { service, options: Arc::new(options), shutdown: shutdown.clone(), cut: cut.clone() };
    accept(listener.into(), &worker, &connections, &shutdown).await;
    // The listener is gone; from here on only open connections count.
    connections.close();
    if tokio::time::timeout(drain, connections.wait()).await.is_ok() {
        return Served { cut: 0 };
    }
    let left = connections.len();
    tracing::warn!(connections = left, drain = ?drain, "drain time is over, cutting connections");
    cut.cancel();
    connections.wait().await;
    Served { cut: left }
}

/// Accepts until shutdown. Takes the listener so that it is closed on return.
async fn accept<M, S, B>(
    listener: Listener,
    worker: &Worker<M>,
    connections: &TaskTracker,
    shutdown: &CancellationToken,
) where
    M: Fn(&Peer) -> S + Clone + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let slots = Arc::new(Semaphore::new(worker.options.connections_max));
    let mut back_off = BackOff::default();
    let (full, refused) = (Throttle::default(), Throttle::default());
    loop {
        let slot = match slots.clone().try_acquire_owned() {
            Ok(slot) => slot,
            Err(_) => {
                // Strangers control how often this happens.
                if let Some(unreported) = full.pass() {
                    tracing::warn!(
                        connections_max = worker.options.connections_max,
                        unreported,
                        "connection limit reached, accept waits"
                    );
                }
                tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    slot = slots.clone().acquire_owned() => match slot {
                        Ok(slot) => slot,
                        Err(_) => return,
                    },
                }
            }
        };
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(accepted) => {
                back_off = BackOff::default();
                let share = match (&worker.options.shares, &accepted) {
                    (Some(shares), Accepted::Tcp(_, peer)) => match shares.take(*peer) {
                        Some(share) => Some(share),
                        None => {
                            if let Some(unreported) = refused.pass() {
                                let share = shares.max();
                                tracing::warn!(%peer, share, unreported, "an address has its share, connection closed");
                            }
                            continue;
                        }
                    },
                    _ => None,
                };
                connections.spawn(worker.clone().serve(accepted, Place { _slot: slot, _share: share }));
            }
            Err(error) if concerns_one_connection(&error) => {
                tracing::debug!(%error, "a connection went away before it was accepted");
            }
            Err(error) => {
                // EMFILE and its like persist: without a pause this loop would spin.
                let pause = back_off.next();
                tracing::error!(%error, ?pause, "cannot accept connections");
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }
}

fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

/// Pauses of 10 ms, doubling up to 1 s.
#[derive(Default)]
struct BackOff {
    last: Option<Duration>,
}

impl BackOff {
    fn next(&mut self) -> Duration {
        let pause = self.last.map_or(Duration::from_millis(10), |last| (last * 2).min(Duration::from_secs(1)));
        self.last = Some(pause);
        pause
    }
}

/// A connection's place among the others, given up when dropped.
struct Place {
    _slot: OwnedSemaphorePermit,
    _share: Option<Share>,
}

/// What every connection needs.
#[derive(Clone)]
struct Worker<M> {
    service: M,
    options: Arc<Options>,
    shutdown: CancellationToken,
    cut: CancellationToken,
}

impl<M> Worker<M> {
    async fn serve<S, B>(self, accepted: Accepted, place: Place)
    where
        M: Fn(&Peer) -> S,
        S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<Box<dyn StdError + Send + Sync>>,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        match accepted {
            Accepted::Tcp(stream, address) => {
                // Answers are small; waiting to fill a packet would add up to 40 ms to each.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(peer = %address, %error, "cannot set TCP_NODELAY");
                }
                let stream = Unstalled::new(stream, self.options.write_timeout);
                let mut peer = Peer { address: Some(address), certificate: None };
                let Some(tls) = self.options.tls.clone() else { return self.speak(stream, peer, place).await };
                let handshake = tokio::select! {
                    handshake = tls.accept(stream, self.options.first_byte_timeout) => handshake,
                    () = self.shutdown.cancelled() => return,
                };
                match handshake {
                    Ok((stream, certificate)) => {
                        peer.certificate = certificate.map(Arc::new);
                        self.speak(Box::new(stream) as Box<dyn Stream>, peer, place).await;
                    }
                    Err(error) => tracing::debug!(peer = %address, error = %Chain(&error), "no TLS with a client"),
                }
            }
            Accepted::Unix(stream) => {
                let stream = Unstalled::new(stream, self.options.write_timeout);
                let peer = Peer { address: None, certificate: None };
                self.speak(Box::new(stream) as Box<dyn Stream>, peer, place).await;
            }
        }
    }

    async fn speak<S, B, T>(self, stream: T, peer: Peer, place: Place)
    where
        M: Fn(&Peer) -> S,
        T: Stream + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<Box<dyn StdError + Send + Sync>>,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let seen = Arc::new(Seen::default());
        let Self { service, options, shutdown, cut } = self;
        let service = service(&peer);
        match &options.protocol {
            Protocol::Http1(limits) => {
                let io = TokioIo::new(Watched::http1(stream, seen.clone()));
                let service = Framed::new(service, seen.clone());
                let connection = http1::Builder::new()
                    // Without a timer the time-out is skipped silently.
                    .timer(Alarm::default())
                    .header_read_timeout(limits.header_read_timeout)
                    .max_header_size(limits.header_bytes_max)
                    .max_buf_size(limits.buffer_bytes_max)
                    // Answers are small: copying one to behind its head costs less than a list of pieces.
                    .writev(false)
                    .serve_connection(io, service);
                let watch = Watch {
                    seen: &seen,
                    begun_at: 1,
                    first_byte_timeout: options.first_byte_timeout,
                    first_head_drain: Some(FIRST_HEAD_DRAIN),
                    clock: None,
                };
                watch.drive(connection, &peer, &shutdown, &cut).await;
            }
            Protocol::Http2(limits) => {
                let io = TokioIo::new(Watched::http2(stream, seen.clone()));
                let clock = Clock::new();
                let connection = http2::Builder::new(TokioExecutor::new())
                    .timer(clock.clone())
                    // gRPC's answers have none (its protocol over HTTP/2, "Responses"); other servers of it send none.
                    .auto_date_header(false)
                    .max_concurrent_streams(limits.streams_max)
                    .max_pending_accept_reset_streams(limits.resets_max())
                    .max_local_error_reset_streams(limits.resets_max())
                    .keep_alive_interval(limits.keep_alive_interval)
                    .keep_alive_timeout(limits.keep_alive_timeout)
                    .max_header_list_size(limits.header_bytes_max)
                    .serve_connection(io, service);
                let watch = Watch {
                    seen: &seen,
                    begun_at: HTTP2_PREFACE_BYTES,
                    first_byte_timeout: options.first_byte_timeout,
                    first_head_drain: None,
                    clock: Some(&clock),
                };
                watch.drive(connection, &peer, &shutdown, &cut).await;
            }
        }
        drop(place);
    }
}

/// The stream below a connection.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// `PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n`
const HTTP2_PREFACE_BYTES: usize = 24;

/// How long a shutdown waits for the rest of a first head. hyper would wait for `header_read_timeout`: one socket with half a
/// head would turn each restart into an outage. A peer in the middle of sending one has long finished by then.
const FIRST_HEAD_DRAIN: Duration = Duration::from_secs(2);

/// Watches whether a connection has begun. Before that it has nothing to lose, and may be closed without notice.
struct Watch<'a> {
    seen: &'a Seen,
    begun_at: usize,
    first_byte_timeout: Duration,
    /// How long a shutdown waits for a first request. None for HTTP/2, where hyper agrees on the end with the peer. A
    /// connection with a later request half sent counts as idle, and hyper ends it at once.
    first_head_drain: Option<Duration>,
    /// The clock that the connection uses.
    clock: Option<&'a Clock>,
}

impl Watch<'_> {
    async fn drive<C>(&self, connection: C, peer: &Peer, shutdown: &CancellationToken, cut: &CancellationToken)
    where
        C: GracefulConnection<Error = hyper::Error>,
    {
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = self.timed(connection.as_mut()) => Some(ended),
            () = shutdown.cancelled() => None,
            () = self.silence() => {
                tracing::debug!(%peer, "connection said nothing, closing it");
                return;
            }
        };
        let ended = match ended {
            Some(ended) => ended,
            // hyper would wait for a preface that never comes.
            None if !self.begun() => return,
            None => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = self.timed(connection.as_mut()) => ended,
                    () = cut.cancelled() => return,
                    () = self.no_request() => {
                        tracing::debug!(%peer, "connection has sent no request, closing it");
                        return;
                    }
                }
            }
        };
        if let Err(error) = ended {
            // Nearly always caused by the peer: resets, half requests, time-outs.
            tracing::debug!(%peer, error = %Chain(&error), "connection ended");
        }
    }

    /// The connection, with the time read before each poll.
    fn timed<C: Future>(&self, mut connection: Pin<&mut C>) -> impl Future<Output = C::Output> {
        poll_fn(move |cx| {
            if let Some(clock) = self.clock {
                clock.tick();
            }
            connection.as_mut().poll(cx)
        })
    }

    fn begun(&self) -> bool {
        self.seen.bytes() >= self.begun_at
    }

    /// Resolves when no request has arrived in time during shutdown; never if one has.
    async fn no_request(&self) {
        if let Some(limit) = self.first_head_drain {
            tokio::time::sleep(limit).await;
            if !self.seen.asked() {
                return;
            }
        }
        std::future::pending::<Infallible>().await;
    }

    /// Resolves when the connection has not begun in time; never when it has.
    async fn silence(&self) {
        tokio::time::sleep(self.first_byte_timeout).await;
        if self.begun() {
            std::future::pending::<Infallible>().await;
        }
    }
}

#[cfg(test)]
mod tests;
