//! The shared layer. Every key of ours is `oncegate:1:<identity of the database>:<digest of the event's name>`, a string with
//! a time to live; losing it costs one read of the ledger. The value is [`super::entry::Codec`]'s.
//!
//! Look-ups form batches by themselves: those that arrive while one is out go into the next one. A look-up that takes
//! longer than its budget is a miss (C4). After a few failures in a row Redis is not asked at all until a probe in the
//! background has found it again: its trouble must not become every caller's 50 ms.

mod breaker;
mod options;
mod refusals;

use std::{
    collections::HashMap,
    pin::{Pin, pin},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use fred::{
    bytes_utils::Str,
    clients::Client,
    error::ErrorKind,
    interfaces::{ClientLike as _, EventInterface as _, KeysInterface as _, LuaInterface as _},
    types::{
        Builder, Value,
        config::{
            ConnectionConfig, PerformanceConfig, ReconnectError, ReconnectPolicy, Server, TcpConfig, UnresponsiveConfig,
        },
    },
};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub use self::options::{RedisOptions, RedisOptionsError, RedisUrlError};
use self::{
    breaker::{Breaker, FAILURES_MAX, Reason},
    refusals::Refusals,
};
use super::{entry::VALUE_BYTES_MAX, stats::CacheStats};
use crate::{event::Micros, lockstep::Lockstep};

/// The longest that a look-up may hold up a call (C4).
const LOOK_UP_TIME_MAX: Duration = Duration::from_millis(50);
/// The longest that a resolution waits for its tombstone.
const WRITE_TIME_MAX: Duration = Duration::from_millis(200);
/// How often Redis is probed while it is left alone.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
/// Names in one look-up, entries in one write.
const BATCH_MAX: usize = 128;
/// How long entries gather before they are written together. Nobody waits for them, and a script for each few costs Redis
/// and us more than the entries do.
const WRITE_LINGER: Duration = Duration::from_millis(5);
/// Look-ups and writes that may wait. Beyond it a look-up is a miss and a write is lost.
const QUEUE_MAX: usize = 4_096;

/// Reads entries; reports oversized values as foreign.
static READ: LazyLock<Str> = LazyLock::new(|| without_comments(include_str!("redis/read.lua")));
/// Writes entries, each only over one with a smaller token (C2).
static WRITE: LazyLock<Str> = LazyLock::new(|| without_comments(include_str!("redis/write.lua")));

/// Scripts are sent, and hashed by the server, with every batch.
fn without_comments(script: &str) -> Str {
    script
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("--"))
        .collect::<Vec<_>>()
        .join("\n")
        .into()
}

/// A look-up, and where its answer goes.
struct Get {
    name: String,
    asker: Asker,
}

/// Who waits for a look-up, and since when. An answer that does not come within the budget is an error to it. It has no timer
/// of its own, because one for each call costs more than its place in the batch.
struct Asker {
    since: Instant,
    reply: oneshot::Sender<Option<Bytes>>,
}

/// An entry on its way to Redis.
struct Put {
    name: String,
    value: Vec<u8>,
    life: Micros,
}

pub(super) struct Redis {
    client: Client,
    gets: mpsc::Sender<Get>,
    puts: mpsc::Sender<Put>,
    breaker: Arc<Breaker>,
    stats: Arc<CacheStats>,
    closing: CancellationToken,
}

impl Redis {
    /// Starts to connect in the background.
    pub(super) fn start(options: &RedisOptions, stats: Arc<CacheStats>) -> Result<Redis, RedisUrlError> {
        let mut builder = Builder::from_config(options.config.clone());
        builder
            .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
            .set_performance_config(PerformanceConfig {
                // Without it a command waits for ever; the caller's own budget is shorter.
                default_command_timeout: Duration::from_millis(500),
                ..PerformanceConfig::default()
            })
            .set_connection_config(ConnectionConfig {
                connection_timeout: Duration::from_secs(1),
                internal_command_timeout: Duration::from_millis(500),
                // A command that is sent again after a broken connection arrives too late for its caller.
                max_command_attempts: 1,
                // The library sends a command that was redirected by ASK back to where it came from, until its attempts are
                // used up, and then ends itself. A slot on its way to another node is a miss; MOVED leads to it anyway.
                max_redirections: 0,
                max_command_buffer_len: QUEUE_MAX,
                unresponsive: UnresponsiveConfig {
                    max_timeout: Some(Duration::from_millis(500)),
                    interval: Duration::from_millis(200),
                },
                reconnect_on_auth_error: true,
                // After a failover the old primary answers with these: go and find the new one. To a write they are no
                // refusals either.
                reconnect_errors: vec![
                    ReconnectError::ReadOnly,
                    ReconnectError::Loading,
                    ReconnectError::ClusterDown,
                    ReconnectError::MasterDown,
                ],
                tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
                ..ConnectionConfig::default()
            });
        let client = builder.build().map_err(|_| RedisUrlError)?;
        let (gets, get_queue) = mpsc::channel(QUEUE_MAX);
        let (puts, put_queue) = mpsc::channel(QUEUE_MAX);
        // Until the first probe has found it.
        let breaker = Arc::new(Breaker::opened());
        let closing = CancellationToken::new();
        let clustered = client.is_clustered();
        tokio::spawn(connect_and_probe(client.clone(), breaker.clone(), closing.clone()));
        tokio::spawn(answer_gets(client.clone(), get_queue, breaker.clone(), clustered));
        tokio::spawn(do_puts(client.clone(), put_queue, breaker.clone(), stats.clone(), clustered));
        Ok(Redis { client, gets, puts, breaker, stats, closing })
    }

    /// The value under a name, if it comes within the budget, which runs from `since`.
    pub(super) async fn get(&self, name: String, since: Instant) -> Option<Bytes> {
        if self.breaker.is_open() {
            self.stats.redis_skipped.add();
            return None;
        }
        let (reply, answer) = oneshot::channel();
        if self.gets.try_send(Get { name, asker: Asker { since, reply } }).is_err() {
            self.stats.redis_errors.add();
            return None;
        }
        match answer.await {
            Ok(Some(value)) => Some(value),
            Ok(None) => {
                self.stats.redis_misses.add();
                None
            }
            Err(_failed) => {
                self.stats.redis_errors.add();
                None
            }
        }
    }

    /// Has an entry written, some time soon, if at all.
    pub(super) fn put(&self, name: String, value: Vec<u8>, life: Micros) {
        if self.puts.try_send(Put { name, value, life }).is_err() {
            self.stats.redis_writes_lost.add();
        }
    }

    /// Writes an entry and waits for it; whether it was written. Also while Redis is left alone: this has to be known.
    pub(super) async fn put_now(&self, name: &str, value: &[u8], life: Micros) -> bool {
        let put = Put { name: name.to_owned(), value: value.to_vec(), life };
        let written = tokio::time::timeout(WRITE_TIME_MAX, write(&self.client, [put])).await;
        matches!(written, Ok(Ok(())))
    }

    /// Whether it is not asked for now.
    pub(super) fn is_left_alone(&self) -> bool {
        self.breaker.is_open()
    }

    /// Whether the connections are being ended.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_cancelled()
    }

    pub(super) async fn close(&self) {
        self.closing.cancel();
        drop(tokio::time::timeout(Duration::from_millis(500), self.client.quit()).await);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

/// Connects, and probes while Redis is left alone.
async fn connect_and_probe(client: Client, breaker: Arc<Breaker>, closing: CancellationToken) {
    // Before it begins: why it does not succeed is heard nowhere else.
    let errors = client.error_rx();
    tokio::select! {
        // First, because what ends then was meant to end.
        biased;
        () = closing.cancelled() => {}
        () = stay_connected(&client, &breaker) => {}
        () = probe(&client, &breaker, errors) => {}
    }
}

/// Connects, for as long as it takes, and anew when the library has given up: it does so at an answer that it takes for a
/// mistake of ours, and wherever it does not know how to go on. Nobody would read what is sent after that.
async fn stay_connected(client: &Client, breaker: &Breaker) {
    loop {
        // Reconnects by its policy, without end; ends when the client quits, or by itself.
        let connection = AbortOnDropHandle::new(client.connect());
        match connection.await {
            Ok(Ok(())) => breaker.given_up(&"without a reason"),
            Ok(Err(error)) => breaker.given_up(&error),
            Err(panicked) => breaker.given_up(&panicked),
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

async fn probe(
    client: &Client,
    breaker: &Breaker,
    mut errors: broadcast::Receiver<(fred::error::Error, Option<Server>)>,
) {
    let mut interval = tokio::time::interval(PROBE_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut disconnected, mut unanswered) = (None, 0);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            Ok((error, _)) = errors.recv() => {
                // That the connection has ended is not a reason; why no other one can be made is.
                if *error.kind() != ErrorKind::Canceled {
                    disconnected = Some(error);
                }
                continue;
            }
        }
        if !breaker.is_open() {
            // It was mended by itself.
            (disconnected, unanswered) = (None, 0);
            continue;
        }
        // A real command: the client's own flag may lag.
        // And that of a look-up: what somebody has put under this name is no reason to leave it alone either.
        let probe = read(client, vec!["oncegate:1:probe".to_owned()]);
        match (tokio::time::timeout(LOOK_UP_TIME_MAX, probe).await, &disconnected) {
            (Ok(Ok(_)), _) => breaker.succeeded(),
            // That the library knows of no server to ask is not a reason either.
            (Ok(Err(error)), _) if *error.kind() != ErrorKind::Cluster => breaker.tell(Reason::Said(&error)),
            (_, Some(error)) => breaker.tell(Reason::Said(error)),
            // The first connection takes its time.
            (_, None) if unanswered < FAILURES_MAX => unanswered += 1,
            (Ok(Err(error)), None) => breaker.tell(Reason::Said(&error)),
            (Err(_), None) => breaker.tell(Reason::Silent),
        }
    }
}

/// Batches of this many names or more are read without a bound, as long as nothing foreign was seen: the script costs a tenth
/// of the rate. If somebody puts something large there, a smaller batch finds it, as most batches are.
const UNBOUNDED_MIN: usize = 16;
/// How long everything is read with a bound after something foreign was seen.
const WARY_TIME: Duration = Duration::from_secs(3_600);

async fn answer_gets(client: Client, mut queue: mpsc::Receiver<Get>, breaker: Arc<Breaker>, clustered: bool) {
    let mut batch: Vec<Get> = Vec::with_capacity(BATCH_MAX);
    let mut wary_since: Option<Instant> = None;
    let mut lockstep = Lockstep::default();
    while queue.recv_many(&mut batch, BATCH_MAX).await > 0 {
        // Those that nobody waits for any more.
        batch.retain(|get| !get.asker.reply.is_closed());
        if batch.is_empty() {
            continue;
        }
        let (names, askers): (Vec<String>, Vec<Asker>) = batch.drain(..).map(|get| (get.name, get.asker)).unzip();
        let (asked, mut askers) = (askers.len(), askers.into_iter());
        let is_wary = wary_since.is_some_and(|since| since.elapsed() < WARY_TIME);
        let bounded = clustered || is_wary || asked < UNBOUNDED_MIN;
        // Pinned here, because it has several kilobytes: each function that it is handed to would copy it.
        let look_up = pin!(many(&client, names, clustered, bounded));
        let mut judged = breaker.look_up();
        match while_they_wait(&mut askers, look_up, || judged.is_late()).await {
            Some(Ok(found)) => {
                judged.answered();
                if found.iter().any(Found::is_foreign) {
                    wary_since = Some(Instant::now());
                }
                let given_up = asked - askers.len();
                let half = lockstep.split(askers.len(), queue.len());
                for (place, (asker, found)) in askers.zip(found.into_iter().skip(given_up)).enumerate() {
                    if half == Some(place) {
                        tokio::task::yield_now().await;
                    }
                    match found {
                        // Its caller may have gone.
                        Found::Answer(value) => drop(asker.reply.send(value)),
                        // Whoever asked hears of it by the end of the channel.
                        Found::Failed => drop(asker),
                    }
                }
            }
            Some(Err(error)) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "a look-up in redis failed");
                judged.failed(Reason::Said(&error));
            }
            None => {}
        }
    }
}

/// What a look-up comes to, as long as somebody waits for it. Each asker has its own budget (C4): whoever has used it up is
/// removed, and `gave_up` is called. Askers stand in the order in which they began, or nearly.
async fn while_they_wait<T>(
    askers: &mut std::vec::IntoIter<Asker>,
    mut look_up: Pin<&mut impl Future<Output = T>>,
    mut gave_up: impl FnMut(),
) -> Option<T> {
    while let Some(longest) = askers.as_slice().first() {
        let until = longest.since + LOOK_UP_TIME_MAX;
        if let Ok(looked_up) = tokio::time::timeout_at(until.into(), look_up.as_mut()).await {
            return Some(looked_up);
        }
        drop(askers.next());
        gave_up();
    }
    None
}

/// What came of the look-up of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    /// The value, if there is one.
    Answer(Option<Bytes>),
    /// Nobody knows: the others of its batch went to other servers.
    Failed,
}

impl Found {
    /// Whether it is larger than any entry, or was: the script gives one byte in place of such a value.
    fn is_foreign(&self) -> bool {
        matches!(self, Found::Answer(Some(value)) if value.len() == 1 || value.len() > VALUE_BYTES_MAX)
    }
}

/// The values under names, in their order, `bounded` by what an entry can have. A cluster spreads names over nodes, so they are
/// read individually and concurrently, which fails when none of them was answered.
async fn many(
    client: &Client,
    names: Vec<String>,
    clustered: bool,
    bounded: bool,
) -> Result<Vec<Found>, fred::error::Error> {
    if clustered {
        let reads = names.into_iter().map(|name| read(client, vec![name]));
        let answers = futures::future::join_all(reads).await.into_iter();
        return each(
            answers.map(|answer| answer.map(|values| values.into_iter().next().unwrap_or(Value::Null))).collect(),
        );
    }
    let (distinct, places) = distinct(names);
    let asked = distinct.len();
    let values: Vec<Value> = if bounded { read(client, distinct).await? } else { client.mget(distinct).await? };
    // A reply of another length would put values under wrong names; they would not verify, but why try.
    if values.len() != asked {
        return Ok(vec![Found::Answer(None); places.len()]);
    }
    let values: Vec<Option<Bytes>> = values.into_iter().map(bytes).collect();
    Ok(places.into_iter().map(|place| Found::Answer(values[place].clone())).collect())
}

/// Each name once, and for each that was given its place among those: duplicates of one event come together.
fn distinct(names: Vec<String>) -> (Vec<String>, Vec<usize>) {
    let mut known: HashMap<String, usize, RandomState> =
        HashMap::with_capacity_and_hasher(names.len(), RandomState::default());
    let places = names
        .into_iter()
        .map(|name| {
            let next = known.len();
            *known.entry(name).or_insert(next)
        })
        .collect();
    let mut distinct: Vec<(String, usize)> = known.into_iter().collect();
    distinct.sort_unstable_by_key(|(_, place)| *place);
    (distinct.into_iter().map(|(name, _)| name).collect(), places)
}

/// The values under names, each given once.
async fn read(client: &Client, names: Vec<String>) -> Result<Vec<Value>, fred::error::Error> {
    let most = i64::try_from(VALUE_BYTES_MAX).expect("some kilobytes");
    client.eval(READ.clone(), names, most).await
}

/// The answers of a Cluster's servers, unless each is an error.
fn each(answers: Vec<Result<Value, fred::error::Error>>) -> Result<Vec<Found>, fred::error::Error> {
    let answered = answers.iter().any(Result::is_ok);
    let mut found = Vec::with_capacity(answers.len());
    for answer in answers {
        found.push(match answer {
            Ok(value) => Found::Answer(bytes(value)),
            Err(error) if is_redirection(&error) => Found::Answer(None),
            Err(_) if answered => Found::Failed,
            Err(error) => return Err(error),
        });
    }
    Ok(found)
}

/// ASK or MOVED: a Cluster's server that is well, and does not have this name now.
fn is_redirection(error: &fred::error::Error) -> bool {
    *error.kind() == ErrorKind::Routing
}

/// What a name holds, without a copy.
fn bytes(value: Value) -> Option<Bytes> {
    match value {
        Value::Bytes(bytes) => Some(bytes),
        Value::String(text) => Some(text.into_inner()),
        _ => None,
    }
}

async fn do_puts(
    client: Client,
    mut queue: mpsc::Receiver<Put>,
    breaker: Arc<Breaker>,
    stats: Arc<CacheStats>,
    clustered: bool,
) {
    let mut batch: Vec<Put> = Vec::with_capacity(BATCH_MAX);
    let mut refusals = Refusals::default();
    while queue.recv_many(&mut batch, BATCH_MAX).await > 0 {
        if batch.len() < BATCH_MAX && !breaker.is_open() {
            tokio::time::sleep(WRITE_LINGER).await;
            while let (true, Ok(put)) = (batch.len() < BATCH_MAX, queue.try_recv()) {
                batch.push(put);
            }
        }
        if breaker.is_open() {
            stats.redis_writes_lost.add_many(batch.drain(..).len() as u64);
            continue;
        }
        // Two entries of one name in one batch: the later one is the same, or newer. Where callers went on in another order it
        // is older, and costs a miss (C7).
        let latest: HashMap<String, (Vec<u8>, Micros)> =
            batch.drain(..).map(|put| (put.name, (put.value, put.life))).collect();
        let entries = latest.len();
        let puts = latest.into_iter().map(|(name, (value, life))| Put { name, value, life });
        // Each write, with its number of entries.
        let written: Vec<(usize, Result<(), fred::error::Error>)> = if clustered {
            let writes = futures::future::join_all(puts.map(|put| write(&client, [put]))).await;
            writes.into_iter().map(|written| (1, written)).collect()
        } else {
            vec![(entries, write(&client, puts).await)]
        };
        let taken = written.iter().any(|(_, written)| written.is_ok());
        let mut failed = None;
        for (entries, written) in written {
            let Err(error) = written else { continue };
            tracing::debug!(error = &error as &dyn std::error::Error, "entries could not be written to redis");
            stats.redis_writes_lost.add_many(entries as u64);
            // One that answers, and has no room for more, still has what it has: look-ups decide whether it is well.
            if !refusals.tell(&error) && !is_redirection(&error) {
                failed = Some(error);
            }
        }
        match failed {
            _ if taken => refusals.taken(),
            Some(error) => breaker.failed(Reason::Said(&error)),
            None => {}
        }
    }
}

async fn write(client: &Client, puts: impl IntoIterator<Item = Put>) -> Result<(), fred::error::Error> {
    let puts = puts.into_iter();
    let many = puts.size_hint().0;
    let (mut names, mut arguments) = (Vec::with_capacity(many), Vec::with_capacity(2 * many));
    for Put { name, value, life } in puts {
        names.push(name);
        arguments.extend([Value::Bytes(value.into()), Value::Integer((life.0 / 1_000).max(1))]);
    }
    client.eval::<Value, _, _, _>(WRITE.clone(), names, arguments).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::{future::pending, pin::pin, time::Duration};

    use fred::{
        error::{Error, ErrorKind},
        types::Value,
    };
    use oncegate_runtime::{config::scheme, tls::ClientTlsFiles};
    use tokio::{
        sync::oneshot::{self, error::TryRecvError},
        time::Instant,
    };

    use super::{
        Asker, Found, LOOK_UP_TIME_MAX, RedisOptions, RedisOptionsError, distinct, each, options::in_the_clear,
        while_they_wait,
    };

    #[tokio::test(start_paused = true)]
    async fn each_waits_for_its_own_budget_and_the_others_for_theirs() {
        const MILLISECOND: Duration = Duration::from_millis(1);
        let began = Instant::now();
        let waiting = [LOOK_UP_TIME_MAX + MILLISECOND, LOOK_UP_TIME_MAX - 5 * MILLISECOND, Duration::ZERO];
        let (askers, answers): (Vec<_>, Vec<_>) = waiting
            .map(|waited| {
                let (reply, answer) = oneshot::channel();
                (Asker { since: (began - waited).into_std(), reply }, answer)
            })
            .into_iter()
            .unzip();
        let [mut old, mut recent, mut new] = <[_; 3]>::try_from(answers).expect("three wait");
        let (mut askers, mut given_up) = (askers.into_iter(), 0);
        // It answers when the second has gone.
        let slow = async {
            assert!((&mut recent).await.is_err(), "it had its time");
            "answer"
        };
        assert_eq!(while_they_wait(&mut askers, pin!(slow), || given_up += 1).await, Some("answer"));
        assert_eq!((given_up, askers.len()), (2, 1));
        assert_eq!(old.try_recv(), Err(TryRecvError::Closed));
        assert_eq!(new.try_recv(), Err(TryRecvError::Empty));
        let waited = began.elapsed();
        assert!(waited >= 5 * MILLISECOND && waited < 10 * MILLISECOND, "{waited:?}");
        assert_eq!(while_they_wait(&mut askers, pin!(pending::<()>()), || given_up += 1).await, None);
        assert_eq!((given_up, askers.len()), (3, 0));
        let waited = began.elapsed();
        assert!(waited >= LOOK_UP_TIME_MAX && waited < LOOK_UP_TIME_MAX + 5 * MILLISECOND, "{waited:?}");
    }

    // C4, C5
    #[test]
    fn a_name_is_asked_for_once_however_many_ask_for_it() {
        let names = ["a", "b", "a", "c", "b", "a"].map(str::to_owned).to_vec();
        let (distinct, places) = distinct(names.clone());
        assert_eq!(distinct.len(), 3);
        assert_eq!(places.iter().map(|&place| distinct[place].clone()).collect::<Vec<_>>(), names);
    }

    #[test]
    fn a_cluster_fails_a_look_up_when_no_server_of_it_answers() {
        let routed = || Err(Error::new(ErrorKind::Routing, "Too many redirections."));
        let broken = || Err(Error::new(ErrorKind::IO, "Connection closed."));
        let value = || Ok(Value::Bytes("x".into()));
        let (found, nothing) = (Found::Answer(Some("x".into())), Found::Answer(None));
        assert_eq!(each(vec![value(), Ok(Value::Null)]).unwrap(), [found.clone(), nothing.clone()]);
        assert_eq!(each(vec![routed(), value()]).unwrap(), [nothing.clone(), found.clone()]);
        assert_eq!(each(vec![broken(), value()]).unwrap(), [Found::Failed, found]);
        // It is well, and has none of these now.
        assert_eq!(each(vec![routed()]).unwrap(), [nothing]);
        assert_eq!(each(vec![routed(), broken()]).unwrap_err().kind(), &ErrorKind::IO);
    }

    #[test]
    fn tls_is_spoken_where_the_url_says_so() {
        for (url, plain) in [
            ("redis://localhost", None),
            ("valkey-cluster://localhost?node=rediss", None),
            ("rediss://:rediss@localhost:6379/1", Some("redis://:rediss@localhost:6379/1")),
            ("REDISS-Cluster://localhost", Some("redis-cluster://localhost")),
            (
                "rediss-sentinel://localhost?sentinelServiceName=x",
                Some("redis-sentinel://localhost?sentinelServiceName=x"),
            ),
            ("valkeys://localhost", Some("valkey://localhost")),
        ] {
            let scheme = scheme(url).expect("a URL");
            assert_eq!(in_the_clear(url, scheme).as_deref(), plain, "{url}");
        }
        let missing = ClientTlsFiles { ca: Some("/nonexistent".into()), identity: None };
        assert!(RedisOptions::from_url("redis://localhost", &missing).is_ok_and(|options| options.tls().is_none()));
        for url in ["rediss://localhost", " rediss://:hunter2@localhost", "\trediss://localhost\n"] {
            let by_tls = RedisOptions::from_url(url, &missing);
            assert!(matches!(by_tls, Err(RedisOptionsError::Tls(_))), "{url:?}: {by_tls:?}");
        }
        assert!(matches!(RedisOptions::from_url("http:", &missing), Err(RedisOptionsError::Url(_))));
    }

    #[test]
    fn only_schemes_of_redis_are_taken() {
        let from_url = |url: &str| RedisOptions::from_url(url, &ClientTlsFiles::default());
        for kind in ["", "s", "-cluster", "s-cluster"] {
            for server in ["redis", "valkey", "Redis"] {
                let url = format!("{server}{kind}://localhost");
                assert!(from_url(&url).is_ok(), "{url}");
            }
        }
        assert!(from_url("redis-sentinel://localhost?sentinelServiceName=x").is_ok());
        for scheme in ["https", "http", "redisss", "redis-clusters", "tcp", "unix", "redis+unix"] {
            let refused = from_url(&format!("{scheme}://:hunter2@localhost")).expect_err(scheme).to_string();
            assert!(refused.contains(&format!("begins with {scheme}://, and is no URL of Redis")), "{refused}");
            assert!(!refused.contains("hunter2"), "{refused}");
        }
    }

    #[test]
    fn a_password_goes_with_a_url_that_has_none_and_never_against_one() {
        let known = |url: &str, password: &str| {
            let options =
                RedisOptions::from_url(url, &ClientTlsFiles::default()).expect("a URL").with_password(password)?;
            options.config.password
        };
        assert_eq!(known("redis://localhost:6379", "a-password").as_deref(), Some("a-password"));
        assert_eq!(known("redis://:a-password@localhost:6379", "a-password").as_deref(), Some("a-password"));
        assert_eq!(known("redis://:another@localhost:6379", "a-password"), None);
        assert_eq!(
            known("redis-cluster://localhost:6379?node=other:6379", "a-password").as_deref(),
            Some("a-password")
        );
    }
}
