//! A TCP proxy between any two parts, which does to their live connections what networks do.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

/// How long the target has to accept. It is on this machine.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the target.
    Request,
    /// Back.
    Reply,
}

/// What happens to a proxy's connections, existing and new, until something else is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Bytes pass.
    Up,
    /// Bytes pass this much later, in both directions.
    Delay(Duration),
    /// Nothing moves, and nobody is told: connections are accepted and stay silent. What was sent in the meantime arrives
    /// when this ends.
    Stall,
    /// As [`Stall`](Self::Stall), one way only: requests arrive and their replies do not, or the other way round.
    StallOne(Direction),
    /// This many bytes pass in this direction on each connection, then both sides are reset.
    CutAfter(Direction, u64),
    /// One side is told once that the other has finished sending; whatever it still sends passes.
    HalfClose(Direction),
    /// This many bytes a second in each direction.
    Throttle(u32),
    /// Connections are reset as soon as they are made.
    Refuse,
}

/// How a connection is ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Orderly,
    Reset,
}

#[derive(Debug)]
struct Shared {
    target: Mutex<SocketAddr>,
    link: watch::Sender<Link>,
    severed: watch::Sender<End>,
    /// By the ports that the target sees.
    silenced: watch::Sender<BTreeSet<u16>>,
    connections: AtomicU64,
    requested: AtomicU64,
}

/// The proxy; ends with its connections when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port for connections to `target`.
    pub async fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot bind the proxy's port")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            link: watch::Sender::new(Link::Up),
            severed: watch::Sender::new(End::Orderly),
            silenced: watch::Sender::default(),
            connections: AtomicU64::new(0),
            requested: AtomicU64::new(0),
        });
        let server = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets where new connections go from now on.
    pub fn set_target(&self, target: SocketAddr) {
        // Only held for a copy: a panic cannot have left anything half done.
        *self.shared.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    /// Sets what happens to connections from now on.
    pub fn set(&self, link: Link) {
        self.shared.link.send_replace(link);
    }

    /// Resets every open connection, as a firewall that has forgotten them does.
    pub fn reset(&self) {
        self.shared.severed.send_replace(End::Reset);
    }

    /// Closes every open connection.
    pub fn close(&self) {
        self.shared.severed.send_replace(End::Orderly);
    }

    /// Silences for good the connection that the target sees as coming from this port, as a middlebox does that forgets a
    /// connection and drops whatever still arrives on it. Neither side is told, and no other connection is affected.
    pub fn silence(&self, port: u16) {
        self.shared.silenced.send_if_modified(|ports| ports.insert(port));
    }

    /// How many connections were made so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Relaxed)
    }

    /// How many bytes of requests have arrived here so far, whether or not they have been passed on.
    pub fn requested(&self) -> u64 {
        self.shared.requested.load(Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Connections end with the server: dropping the set aborts them.
    let mut connections = JoinSet::new();
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            shared.connections.fetch_add(1, Relaxed);
            connections.spawn(serve(stream, Arc::clone(&shared)));
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut near: TcpStream, shared: Arc<Shared>) {
    let (mut severed, mut silenced) = (shared.severed.subscribe(), shared.silenced.subscribe());
    let link = shared.link.subscribe();
    let target = *shared.target.lock().unwrap_or_else(PoisonError::into_inner);
    let refused = *link.borrow() == Link::Refuse;
    let far = if refused { None } else { timeout(CONNECT_TIME_MAX, TcpStream::connect(target)).await.ok() };
    let Some(Ok(mut far)) = far else {
        // With this, closing the socket sends a reset instead of an orderly end.
        let _ = near.set_zero_linger();
        return;
    };
    let port = far.local_addr().map_or(0, |address| address.port());
    for stream in [&near, &far] {
        let _ = stream.set_nodelay(true);
    }
    let end = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        let uncounted = AtomicU64::new(0);
        let request = pump(near_read, far_write, link.clone(), Direction::Request, &shared.requested);
        let reply = pump(far_read, near_write, link, Direction::Reply, &uncounted);
        let both = async { tokio::try_join!(request, reply) };
        let silent = async { drop(silenced.wait_for(|ports| ports.contains(&port)).await) };
        let mut cut = std::pin::pin!(async {
            match severed.changed().await {
                Ok(()) => *severed.borrow(),
                Err(_) => End::Orderly,
            }
        });
        tokio::select! {
            // In this order, so that nothing sent afterwards passes.
            biased;
            end = &mut cut => end,
            // Open, and nobody reads or writes.
            () = silent => {
                let end = cut.await;
                shared.silenced.send_if_modified(|ports| ports.remove(&port));
                end
            }
            // Both have finished, or one was cut.
            ended = both => match ended {
                Ok(_) => End::Orderly,
                Err(_) => End::Reset,
            },
        }
    };
    if end == End::Reset {
        let _ = near.set_zero_linger();
        let _ = far.set_zero_linger();
    }
}

/// Moves bytes in one direction until the sender has finished; fails when the connection has to be cut.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut link: watch::Receiver<Link>,
    direction: Direction,
    arrived: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1_024];
    let mut passed = 0;
    let mut half_closed = false;
    loop {
        let now = *link.borrow_and_update();
        let wanted = match now {
            Link::Stall => 0,
            Link::StallOne(which) if which == direction => 0,
            Link::CutAfter(which, limit) if which == direction => {
                let left = limit.saturating_sub(passed);
                if left == 0 {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                usize::try_from(left).unwrap_or(usize::MAX)
            }
            // A tenth of a second's worth, so that it trickles.
            Link::Throttle(rate) => usize::try_from(rate / 10).unwrap_or(usize::MAX).max(1),
            Link::HalfClose(which) if which == direction && !half_closed => {
                half_closed = true;
                to.shutdown().await?;
                buffer.len()
            }
            _ => buffer.len(),
        };
        if !matches!(now, Link::CutAfter(..)) {
            passed = 0;
        }
        if wanted == 0 {
            if link.changed().await.is_err() {
                return Ok(());
            }
            continue;
        }
        let wanted = wanted.min(buffer.len());
        let count = tokio::select! {
            count = from.read(&mut buffer[..wanted]) => count?,
            changed = link.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return Ok(()),
            },
        };
        if count == 0 {
            if !half_closed {
                to.shutdown().await?;
            }
            return Ok(());
        }
        arrived.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Relaxed);
        match now {
            Link::Delay(delay) => sleep(delay).await,
            Link::Throttle(_) => sleep(Duration::from_millis(100)).await,
            _ => {}
        }
        // A stall that began while this waited holds it back as well.
        while matches!(*link.borrow_and_update(), Link::Stall) {
            if link.changed().await.is_err() {
                return Ok(());
            }
        }
        if !half_closed {
            to.write_all(&buffer[..count]).await?;
        }
        passed += u64::try_from(count).unwrap_or(u64::MAX);
    }
}
