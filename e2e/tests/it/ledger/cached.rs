//! The Postgres ledger as the service uses it: behind the cache, with a Redis in whatever condition (C4). What the cache
//! answers is compared with what the ledger holds.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use async_trait::async_trait;
use oncegate_e2e::{eventually, postgres::Database, redis::Redis, upstream};
use oncegate_runtime::tls::ClientTlsFiles;
use oncegate_sidecar::{
    cache::{Cache, CacheSettings, RedisOptions, stats::CacheStats},
    coordinator::{Answer, Coordinator, Limits},
    event::{Claim, Claimed, Decision, Event, Extend, FencingToken, Key, Lock, Mark, Marked, Resolve, State, Time},
    ledger::{
        Announcement, Error, EventHistory, Heard, Ledger, Replayed, Standing,
        filter::{CleanupProgress, CleanupScope, HistoryFilter, Page, StatsFilter, StatsReport},
        postgres::PostgresLedger,
    },
};
use tokio::sync::{broadcast, watch};

/// What is the matter with Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Nothing.
    On,
    /// Nobody listens there; and another sidecar marks what this one grants.
    Off,
    /// It loses everything, again and again.
    Flushed,
    /// It stops answering, again and again, without a word.
    Frozen,
    /// Somebody writes into it: rubbish, and genuine values under other names.
    Rubbish,
}

impl Condition {
    /// A server in this condition, shared by the tests of this process: names in it differ by database.
    fn url(self) -> String {
        static SERVERS: [OnceLock<String>; 4] = [const { OnceLock::new() }; 4];
        let server = match self {
            Condition::Off => {
                let url = upstream::refused_url().unwrap();
                let address = url.trim_start_matches("http://").split('/').next().unwrap().to_owned();
                return format!("redis://{address}");
            }
            Condition::On => &SERVERS[0],
            Condition::Flushed => &SERVERS[1],
            Condition::Frozen => &SERVERS[2],
            Condition::Rubbish => &SERVERS[3],
        };
        server.get_or_init(|| self.start()).clone()
    }

    fn strikes(self) -> &'static AtomicU64 {
        static STRIKES: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];
        &STRIKES[self as usize]
    }

    fn has_struck(self) {
        self.strikes().fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until it has happened once more, where it is one that happens.
    async fn strikes_again(self) {
        if matches!(self, Condition::On | Condition::Off) {
            return;
        }
        let before = self.strikes().load(Ordering::Relaxed);
        let struck = async || (self.strikes().load(Ordering::Relaxed) > before).then_some(());
        eventually(&format!("{self:?} strikes"), struck).await;
    }

    /// Starts the server, and a thread that does to it what it has to suffer, for as long as the process lives.
    fn start(self) -> String {
        let (url, started) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut redis = Redis::start().await.unwrap();
                url.send(redis.url()).unwrap();
                loop {
                    match self {
                        Condition::On | Condition::Off => std::future::pending::<()>().await,
                        Condition::Flushed => {
                            assert_eq!(redis.command("FLUSHALL").await.unwrap(), "+OK");
                            self.has_struck();
                        }
                        Condition::Frozen => {
                            redis.freeze().unwrap();
                            self.has_struck();
                            tokio::time::sleep(Duration::from_millis(400)).await;
                            redis.thaw().unwrap();
                            tokio::time::sleep(Duration::from_millis(180)).await;
                        }
                        Condition::Rubbish => {
                            let written = redis.command(RUBBISH).await.unwrap();
                            assert!(written.starts_with(':'), "{written}");
                            self.has_struck();
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
        });
        started.recv().unwrap()
    }
}

/// Every third name gets a value that is none, every third the value of its neighbour, if that is one, and the others no value
/// at all.
const RUBBISH: &str = "EVAL \"local names = redis.call('KEYS', 'oncegate:*') \
    for place, name in ipairs(names) do \
      if place % 3 == 0 then redis.call('SET', name, string.rep('x', place)) \
      elseif place % 3 == 1 then \
        local other = redis.pcall('GET', names[place % #names + 1]) \
        redis.call('SET', name, type(other) == 'string' and other or 'x') \
      else redis.call('DEL', name) redis.call('LPUSH', name, 'x') end \
    end return #names\" 0";

/// See the module.
pub(crate) struct Cached {
    ledger: Arc<PostgresLedger>,
    coordinator: Arc<Coordinator>,
    /// Whom marks go to, if it is another sidecar.
    marker: Option<PostgresLedger>,
    /// A Cleanup was run, by the ledger's own measure of what is old.
    cleaned: AtomicBool,
}

impl Cached {
    pub(crate) async fn connect(database: &Database, redis: &str) -> Self {
        // Half of the tests' look-ups should get as far as Redis.
        Self::with_memory(database, redis, 0).await
    }

    async fn with_memory(database: &Database, redis: &str, memory_bytes_max: u64) -> Self {
        let ledger = Arc::new(super::connected(database).await);
        let settings = CacheSettings {
            memory_bytes_max,
            redis: Some(RedisOptions::from_url(redis, &ClientTlsFiles::default()).unwrap()),
            ..CacheSettings::default()
        };
        let cache = Cache::new(&settings, ledger.standing()).unwrap();
        let coordinator = Coordinator::new(ledger.clone(), cache, Limits::default());
        Self { ledger, coordinator, marker: None, cleaned: AtomicBool::new(false) }
    }

    pub(crate) async fn in_condition(database: &Database, condition: Condition) -> Self {
        let mut cached = Self::connect(database, &condition.url()).await;
        if condition == Condition::Off {
            cached.marker = Some(super::connected(database).await);
        }
        // A test begins when its trouble does, however short it is.
        condition.strikes_again().await;
        cached
    }

    pub(crate) fn stats(&self) -> Arc<CacheStats> {
        self.coordinator.cache_stats()
    }
}

#[async_trait]
impl Ledger for Cached {
    async fn claim(&self, claim: Claim) -> Result<Claimed, Error> {
        match self.coordinator.claim(claim.clone(), Duration::ZERO).await? {
            Answer::Decided(claimed) => Ok(claimed),
            Answer::Completed(key, completion) => {
                // I9: what the cache says is what the ledger holds, or held a moment ago.
                let Some(history) = self.ledger.history_of(key).await? else {
                    // Deleted by a Cleanup without the minimum retention, which the API does not permit: there,
                    // an entry has ended long before.
                    assert!(self.cleaned.load(Ordering::Relaxed), "the cache knows an event that was never there");
                    return self.ledger.claim(claim).await;
                };
                let mut event = history.event;
                if event.fencing_token == completion.fencing_token {
                    assert_eq!(event.state, State::Completed);
                    assert_eq!(event.attempt_count, completion.attempt_count);
                    assert_eq!(event.end_time, Some(completion.end_time));
                    assert_eq!(event.result, completion.result);
                } else {
                    assert!(event.fencing_token > completion.fencing_token, "a token from the future");
                    // What was answered, and not what has become of it since.
                    event.fencing_token = completion.fencing_token;
                }
                let now = self.ledger.now().await?;
                Ok(Claimed { decision: Decision::AlreadyCompleted, granted: false, event, payload_changed: false, now })
            }
        }
    }

    async fn mark(&self, mark: Mark) -> Result<Marked, Error> {
        match &self.marker {
            Some(other) => other.mark(mark).await,
            None => self.coordinator.mark(mark).await,
        }
    }

    async fn extend(&self, extend: Extend) -> Result<Lock, Error> {
        self.coordinator.extend(extend).await
    }

    async fn resolve(&self, resolve: Resolve) -> Result<Event, Error> {
        self.coordinator.resolve(resolve, |_| {}).await
    }

    async fn peek(&self, keys: Vec<Key>) -> Result<Vec<(Key, State, FencingToken)>, Error> {
        self.ledger.peek(keys).await
    }

    async fn history_of(&self, key: Key) -> Result<Option<EventHistory>, Error> {
        self.ledger.history_of(key).await
    }

    async fn history(&self, filter: HistoryFilter) -> Result<Page, Error> {
        self.ledger.history(filter).await
    }

    async fn stats(&self, filter: StatsFilter) -> Result<StatsReport, Error> {
        self.ledger.stats(filter).await
    }

    async fn now(&self) -> Result<Time, Error> {
        self.ledger.now().await
    }

    async fn cleanup_step(&self, scope: &CleanupScope, progress: &mut CleanupProgress) -> Result<(), Error> {
        self.cleaned.fetch_or(!scope.dry_run, Ordering::Relaxed);
        self.ledger.cleanup_step(scope, progress).await
    }

    fn count_duplicate(&self, key: &Key) {
        self.ledger.count_duplicate(key);
    }

    fn standing(&self) -> watch::Receiver<Option<Standing>> {
        self.ledger.standing()
    }

    fn announce(&self, announcement: Announcement) {
        self.ledger.announce(announcement);
    }

    fn announcements(&self) -> broadcast::Receiver<Heard> {
        self.ledger.announcements()
    }

    async fn replays(&self, standing: &Standing, after: Option<Arc<str>>) -> Result<Replayed, Error> {
        self.ledger.replays(standing, after).await
    }

    async fn check(&self) -> Result<(), Error> {
        self.ledger.check().await
    }

    async fn close(&self) {
        if let Some(other) = &self.marker {
            other.close().await;
        }
        self.coordinator.close().await;
    }

    async fn ended(&self) {
        self.coordinator.ended().await;
    }
}

/// C2: only a completion that was acknowledged gets into the cache, and no other end of an attempt.
#[tokio::test]
async fn what_did_not_complete_is_not_answered_by_the_process_itself_or_redis() {
    use super::{HOUR, claim, completion, key, mark};
    use oncegate_sidecar::event::{Ending, FailureKind};

    let database = Database::create().await.unwrap();
    let cached = Cached::with_memory(&database, &Condition::On.url(), 1 << 20).await;
    for kind in [FailureKind::Retryable, FailureKind::Terminal, FailureKind::Unknown] {
        let key = key(&format!("{kind:?}"));
        let Decision::Acquired(lock) = cached.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
        let ending = Ending::Failed { kind, error: None, retry_after: Some(HOUR) };
        cached.mark(mark(&key, &lock, ending)).await.unwrap();
        let told = cached.coordinator.claim(claim(&key, "b"), Duration::ZERO).await.unwrap();
        let Answer::Decided(claimed) = told else { panic!("{kind:?}: completed, says the cache") };
        assert!(matches!(claimed.decision, Decision::InProgress { .. } | Decision::Refused), "{kind:?}: {claimed:?}");
    }
    // And the cache is there.
    let key = key("evt_1");
    let Decision::Acquired(lock) = cached.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
    cached.mark(completion(&key, &lock)).await.unwrap();
    // Not while it has read no replays lately (C7), as it may happen on a busy machine.
    eventually("the process itself answers", async || {
        let told = cached.coordinator.claim(claim(&key, "b"), Duration::ZERO).await.unwrap();
        matches!(told, Answer::Completed(..)).then_some(())
    })
    .await;
    cached.close().await;
}

#[tokio::test]
async fn a_duplicate_is_answered_by_redis_until_an_operator_replays_the_event() {
    use super::{claim, completion, key, resolution};
    use oncegate_sidecar::event::Resolved;

    let database = Database::create().await.unwrap();
    let first = Cached::in_condition(&database, Condition::On).await;
    let second = Cached::in_condition(&database, Condition::On).await;
    let key = key("evt_1");
    let Decision::Acquired(lock) = first.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
    first.mark(completion(&key, &lock)).await.unwrap();
    eventually("the other sidecar's duplicates are answered by what this one wrote", async || {
        let answer = second.claim(claim(&key, "b")).await.unwrap();
        assert_eq!(answer.decision, Decision::AlreadyCompleted);
        (second.stats().redis_hits.get() > 0).then_some(())
    })
    .await;

    let replay = Resolve { force: true, ..resolution(&key, Resolved::Pending) };
    first.resolve(replay).await.unwrap();
    // Through the tombstone, whoever asks.
    let lock = eventually("the replayed event is granted", async || {
        match second.claim(claim(&key, "c")).await.unwrap().decision {
            Decision::Acquired(lock) => Some(lock),
            _ => None,
        }
    })
    .await;
    assert_eq!(lock.attempt, 2);
    assert_eq!(first.stats().redis_invalid.get() + second.stats().redis_invalid.get(), 0);
    first.close().await;
    second.close().await;
}

/// C2. How old an event is is counted by the ledger, and the rest by Redis.
#[tokio::test]
async fn what_redis_has_ends_before_cleanup_may_delete_its_event_and_after_a_week_at_most() {
    use super::{HOUR, claim, completion, key};
    use oncegate_sidecar::event::Micros;

    const DAY: i64 = Micros::DAY.0;
    const WEEK: i64 = 7 * DAY;

    let database = Database::create().await.unwrap();
    let ledger = super::connected(&database).await;
    let Decision::Acquired(lock) = ledger.claim(claim(&key("evt"), "a")).await.unwrap().decision else {
        panic!("held")
    };
    let event = ledger.mark(completion(&key("evt"), &lock)).await.unwrap().event;
    let end_time = event.end_time.unwrap();
    for (retention_days, age, is_resolved, life) in [
        (6, 0, false, 6 * DAY - HOUR.0),
        (6, 2 * DAY, false, 4 * DAY - HOUR.0),
        (30, 0, false, WEEK),
        (30, 2 * DAY, false, WEEK - 2 * DAY),
        // A tombstone answers nothing: it may outlive its event.
        (6, 0, true, WEEK),
    ] {
        let redis = Redis::start().await.unwrap();
        let settings = CacheSettings {
            redis: Some(RedisOptions::from_url(&redis.url(), &ClientTlsFiles::default()).unwrap()),
            retention_min: Duration::from_secs(retention_days * 86_400),
            ..CacheSettings::default()
        };
        let cache = Arc::new(Cache::new(&settings, ledger.standing()).unwrap());
        let script = "local names = redis.call('KEYS', 'oncegate:*') return names[1] and redis.call('PTTL', names[1])";
        let mut number = 0;
        let left = eventually("redis takes what it is given", async || {
            number += 1;
            // Another one each time: none is written a second time.
            let event = Event { key: key(&format!("evt_{number}")), ..event.clone() };
            if is_resolved {
                cache.resolved(&event).await;
            } else {
                cache.fill(&cache.ticket(&event.key), &event, Time(end_time.0 + age));
            }
            let left = redis.command(&format!("EVAL \"{script}\" 0")).await.unwrap();
            left.strip_prefix(':').map(|left| left.parse::<i64>().unwrap())
        })
        .await;
        let most = life / 1_000;
        let least = most - 600_000;
        assert!((least..=most).contains(&left), "{left}, {retention_days} days, {age}, {is_resolved}");
        cache.close().await;
    }
    ledger.close().await;
}

/// The script by itself: two writers that race are too quick for a test of the whole to see the wrong order (C2).
#[tokio::test]
async fn a_write_to_redis_never_replaces_a_higher_token() {
    const SCRIPT: &str = include_str!("../../../../sidecar/src/cache/redis/write.lua");

    let redis = Redis::start().await.unwrap();
    let script = SCRIPT.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n");
    let write = async |version: u8, token: u64| {
        let token: String = token.to_be_bytes().map(|byte| format!(r"\x{byte:02x}")).concat();
        let value = format!(r"\x{version:02x}{token}rest");
        let written = redis.command(&format!("EVAL \"{script}\" 1 name \"{value}\" 60000")).await.unwrap();
        let left = redis.command("PTTL name").await.unwrap();
        let left: u32 = left.trim_start_matches(':').parse().unwrap_or_else(|_| panic!("it never ends: {left}"));
        assert!(left <= 60_000, "{left}");
        written
    };
    const HALF: u64 = 1 << 32;
    let tokens = [
        (5, ":1"),
        (4, ":0"),
        (5, ":1"),
        (255, ":1"),
        (6, ":0"),
        (256, ":1"),
        (255, ":0"),
        (HALF - 1, ":1"),
        (HALF, ":1"),
        (HALF - 1, ":0"),
        (2 * HALF + 1, ":1"),
        (HALF + 2, ":0"),
        (2 * HALF, ":0"),
        (i64::MAX.unsigned_abs(), ":1"),
        (i64::MAX.unsigned_abs() - 1, ":0"),
    ];
    for (token, written) in tokens {
        assert_eq!(write(1, token).await, written, "token {token}");
    }
    // What another version wrote is only ever a miss.
    assert_eq!(write(2, 1).await, ":1");
    redis.command("DEL name").await.unwrap();
    assert_eq!(redis.command("LPUSH name rubbish").await.unwrap(), ":1");
    assert_eq!(write(1, 1).await, ":1", "over what is no string");
}

#[tokio::test]
async fn forged_values_are_misses_that_are_counted() {
    use super::{claim, completion, key};

    let database = Database::create().await.unwrap();
    let redis = Redis::start().await.unwrap();
    let cached = Cached::connect(&database, &redis.url()).await;
    for number in 0..9 {
        let key = key(&format!("evt_{number}"));
        let Decision::Acquired(lock) = cached.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
        cached.mark(completion(&key, &lock)).await.unwrap();
        // Read by another caller until Redis has it.
        eventually("the entry is in redis", async || {
            let before = cached.stats().redis_hits.get();
            cached.claim(claim(&key, "b")).await.unwrap();
            (cached.stats().redis_hits.get() > before).then_some(())
        })
        .await;
    }
    assert_eq!(redis.command(RUBBISH).await.unwrap(), ":9");
    let hits = cached.stats().redis_hits.get();
    for number in 0..9 {
        let answer = cached.claim(claim(&key(&format!("evt_{number}")), "c")).await.unwrap();
        assert_eq!(answer.decision, Decision::AlreadyCompleted);
    }
    assert_eq!(cached.stats().redis_hits.get(), hits, "nothing forged is believed");
    assert!(cached.stats().redis_invalid.get() >= 5, "{:?}", cached.stats());
    cached.close().await;
}
