//! An application with effects: a payment is booked when a delivery reaches it, guarded in one of three ways or not at all.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::{JoinHandle, JoinSet},
    time::sleep,
};

use super::{history::Recorder, seed::Seed};

/// What the application makes its effect conditional on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Nothing: every delivery has its effect.
    Nothing,
    /// The fencing token: a write with a smaller one than already seen is refused, one with the same or a larger one
    /// replaces the earlier write.
    Token,
    /// The event id is a unique key of the effect: a second one changes nothing and is answered with success.
    EventId,
}

/// How deliveries are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// 200, at once.
    Reliable,
    /// Mostly 200; sometimes late, too late, 500, or no answer at all, before or after the effect.
    Moody(Seed),
}

/// How one delivery goes.
#[derive(Clone, Copy, Debug)]
struct Course {
    before: Duration,
    applies: bool,
    after: Duration,
    answer: Option<u16>,
}

#[derive(Debug)]
struct Shared {
    guard: Guard,
    temper: Temper,
    behaves: AtomicBool,
    recorder: Recorder,
    // The largest token of each event, and the effects in force: one per event where a guard replaces them.
    books: Mutex<BTreeMap<String, Book>>,
}

#[derive(Clone, Debug, Default)]
struct Book {
    deliveries: u64,
    highest: i64,
    effects: Vec<i64>,
}

/// The application; ends when dropped.
#[derive(Debug)]
pub struct Application {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Application {
    /// Starts it on a free port.
    pub async fn start(guard: Guard, temper: Temper, recorder: Recorder) -> Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot bind the application's port")?;
        let address = listener.local_addr()?;
        let shared =
            Arc::new(Shared { guard, temper, behaves: AtomicBool::new(false), recorder, books: Mutex::default() });
        let server = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What guards its effects.
    pub fn guard(&self) -> Guard {
        self.shared.guard
    }

    /// From now on it does what it is asked to, whatever its temper: its moods are faults, and end with the others.
    pub fn behave(&self) {
        self.shared.behaves.store(true, Ordering::Relaxed);
    }

    /// The effects in force, by event, as the tokens that they were made with.
    pub fn effects(&self) -> BTreeMap<String, Vec<i64>> {
        let books = self.shared.books.lock().unwrap_or_else(PoisonError::into_inner);
        books.iter().map(|(event, book)| (event.clone(), book.effects.clone())).collect()
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            connections.spawn(serve(stream, Arc::clone(&shared)));
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let reset = Notify::new();
    let service = service_fn(|request| handle(request, &shared, &reset));
    let mut connection = http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // An error is the other side's concern.
        _ = &mut connection => {}
        () = reset.notified() => {
            let _ = connection.into_parts().io.into_inner().set_zero_linger();
        }
    }
}

async fn handle(
    request: Request<Incoming>,
    shared: &Shared,
    reset: &Notify,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let header =
        |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (event, token) = (header("oncegate-event-id"), header("oncegate-fencing-token").parse().unwrap_or(0));
    if body.collect().await.is_err() {
        // Only a part of it arrived: nothing to act on.
        return Ok(answer(400));
    }
    let course = shared.course(&event);
    sleep(course.before).await;
    let refused = course.applies && !shared.book(&event, token);
    sleep(course.after).await;
    Ok(match course.answer {
        _ if refused => answer(409),
        Some(status) => answer(status),
        None => {
            reset.notify_one();
            std::future::pending::<()>().await;
            answer(500)
        }
    })
}

fn answer(status: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from("{}"));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

impl Shared {
    fn course(&self, event: &str) -> Course {
        let good = Course { before: Duration::ZERO, applies: true, after: Duration::ZERO, answer: Some(200) };
        let Temper::Moody(seed) = self.temper else { return good };
        let number = {
            let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
            let book = books.entry(event.to_owned()).or_default();
            book.deliveries += 1;
            book.deliveries
        };
        let mut dice = seed.dice(&format!("application {event} {number}"));
        // It behaves in the end, whatever it did before: an event must be able to finish.
        let behaves = number > 6 || self.behaves.load(Ordering::Relaxed);
        let mood = if behaves { 0 } else { dice.between(0, 99) };
        match mood {
            0..60 => good,
            60..70 => Course { before: dice.millis(1, 300), ..good },
            // After the gateway has given up: the effect is there, the gateway has marked a failure.
            70..76 => Course { before: dice.millis(900, 2_500), ..good },
            76..82 => Course { after: dice.millis(900, 2_500), ..good },
            82..88 => Course { applies: false, answer: Some(500), ..good },
            88..94 => Course { answer: Some(503), ..good },
            94..97 => Course { applies: false, answer: None, ..good },
            _ => Course { answer: None, ..good },
        }
    }

    /// Makes the effect; false when the token forbids it.
    fn book(&self, event: &str, token: i64) -> bool {
        let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        let book = books.entry(event.to_owned()).or_default();
        let applied = match self.guard {
            Guard::Nothing => {
                book.effects.push(token);
                true
            }
            Guard::Token if token < book.highest => false,
            Guard::Token => {
                book.effects = vec![token];
                true
            }
            Guard::EventId => {
                let first = book.effects.is_empty();
                if first {
                    book.effects.push(token);
                }
                first
            }
        };
        book.highest = book.highest.max(token);
        self.recorder.deliver(event, token, applied);
        applied || self.guard == Guard::EventId
    }
}
