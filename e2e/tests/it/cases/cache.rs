//! Redis in trouble: whatever it answers is a miss, and answers stay right (C1, C4). What is in it and not ours to believe
//! is a miss that is counted, by its reason (C3, I9).

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use oncegate_api::v1::Decision;
use oncegate_e2e::{eventually, http_client, postgres::Database, redis::Redis};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{Sidecar, ask, claim, completion, fake_redis::FakeRedis, metric, replay};
use crate::setup::Ledger;

/// A sidecar that keeps nothing in its own process, so that every duplicate asks Redis.
async fn sidecar(redis: &str) -> Result<Sidecar> {
    let ledger = Ledger::postgres().await?;
    Sidecar::start_with(ledger, |command| command.env("REDIS_URL", redis).env("CACHE_SIZE", "0B")).await
}

async fn complete(sidecar: &Sidecar, event_id: &str) -> Result<i64> {
    let client = sidecar.client().await?;
    let token = ask(&client, claim(event_id, "first")).await?.lock.context("the lock")?.fencing_token;
    client.clone().mark_completed(completion(event_id, token)).await?;
    Ok(token)
}

/// How long a look-up in Redis may take, by default.
const BUDGET: Duration = Duration::from_millis(50);

/// What a machine that is busy with other tests adds to a call in a hundred.
const BUSY: Duration = Duration::from_millis(100);

/// Every answer that matters, and how long nine in ten of them took at most.
async fn answers_are_right(sidecar: &Sidecar, round: &str) -> Result<Duration> {
    let client = sidecar.client().await?;
    let mut times = Vec::new();
    for number in 0..20 {
        let event_id = format!("evt_{round}_{number}");
        complete(sidecar, &event_id).await?;
        for _ in 0..3 {
            let began = Instant::now();
            let answer = ask(&client, claim(&event_id, "again")).await?;
            times.push(began.elapsed());
            assert_eq!(answer.decision(), Decision::AlreadyCompleted, "{event_id}");
        }
    }
    times.sort_unstable();
    Ok(times[times.len() * 9 / 10])
}

macro_rules! answers {
    ($($name:ident: $error:literal,)+) => {
        $(
            // T19
            #[tokio::test]
            async fn $name() -> Result<()> {
                redis_that_answers($error).await
            }
        )+
    };
}

answers! {
    redis_that_is_read_only_is_a_miss: "READONLY You can't write against a read only replica.",
    redis_that_is_loading_is_a_miss: "LOADING Redis is loading the dataset in memory",
    redis_that_is_full_is_a_miss: "OOM command not allowed when used memory > 'maxmemory'.",
    redis_that_cannot_save_is_a_miss: "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to.",
    redis_that_wants_a_password_is_a_miss: "NOAUTH Authentication required.",
    redis_that_sends_us_to_itself_is_a_miss: "MOVED 3999 {address}",
    redis_that_asks_us_to_itself_is_a_miss: "ASK 3999 {address}",
    redis_that_answers_what_nobody_knows_is_a_miss: "WHATEVER it is",
}

async fn redis_that_answers(error: &str) -> Result<()> {
    let redis = FakeRedis::start(error).await?;
    let sidecar = sidecar(&redis.url()).await?;
    let took = answers_are_right(&sidecar, "a").await?;
    assert!(took < BUDGET + BUSY, "{took:?}");
    eventually("redis has been asked, and refused", async || (redis.refused() > 0).then_some(())).await;
    answers_are_right(&sidecar, "b").await?;
    assert_eq!(metric(&sidecar, "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}").await?, 0);
    // No storm: a Redis that refuses is left alone.
    let before = redis.refused();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(redis.refused() - before < 100, "{} commands in half a second", redis.refused() - before);
    Ok(())
}

/// T16
#[tokio::test]
async fn without_redis_at_the_start_it_is_ready_and_uses_redis_when_it_comes() -> Result<()> {
    let mut redis = Redis::start().await?;
    redis.kill()?;
    let sidecar = sidecar(&redis.url()).await?;
    eventually("it is ready", async || {
        (http_client::get(sidecar.admin, "/readyz").await.ok()?.status == 200).then_some(())
    })
    .await;
    answers_are_right(&sidecar, "without").await?;
    redis.restart().await?;
    let client = sidecar.client().await?;
    complete(&sidecar, "evt_with").await?;
    eventually("duplicates are answered by redis", async || {
        ask(&client, claim("evt_with", "again")).await.ok()?;
        let hits = metric(&sidecar, "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}").await.ok()?;
        (hits > 0).then_some(())
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn a_redis_that_is_wrong_from_the_start_is_told_of_once_with_the_reason() -> Result<()> {
    let mut redis = Redis::start().await?;
    assert_eq!(redis.command("CONFIG SET requirepass another").await?, "+OK");
    let mut refused = sidecar(&redis.url().replace("redis://", "redis://:not-this-one@")).await?;
    let told = |reason: &'static str| move |line: &str| line.contains("is left alone") && line.contains(reason);
    refused.program.line_where("the password is told to be wrong", told("WRONGPASS")).await?;

    redis.kill()?;
    let mut alone = sidecar(&redis.url()).await?;
    alone.program.line_where("nobody is told to be there", told("Connection refused")).await?;
    // By now it has been tried, and has failed, several times. That nobody listens is told as what it is, unless the connection
    // that the kill broke was told of before, for that is trouble of the same kind.
    refused.program.line_where("the other reason is told", told("IO Error")).await?;
    redis.restart().await?;
    alone.program.line_where("redis is found", |line| line.contains("redis answers")).await?;
    let lines = alone.program.stop().await?.stderr;
    assert_eq!(lines.lines().filter(|line| told("")(line)).count(), 1, "{lines}");

    let mut nameless = sidecar("redis://redis.invalid").await?;
    nameless.program.line_where("the name is told to be wrong", told("lookup")).await?;
    Ok(())
}

/// The library takes a Cluster that is none for a mistake in the configuration, and gives up: it is found all the same when it
/// has become one.
#[tokio::test]
async fn redis_that_the_library_has_given_up_is_found_again() -> Result<()> {
    let mut redis = Redis::start().await?;
    let mut sidecar = sidecar(&redis.url().replace("redis://", "redis-cluster://")).await?;
    let told = |line: &str| line.contains("is left alone") && line.contains("cluster support disabled");
    sidecar.program.line_where("the reason is told", told).await?;
    redis.kill()?;
    redis.restart_as_cluster().await?;
    let client = sidecar.client().await?;
    complete(&sidecar, "evt_1").await?;
    eventually("duplicates are answered by redis", async || {
        ask(&client, claim("evt_1", "again")).await.ok()?;
        let hits = metric(&sidecar, "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}").await.ok()?;
        (hits > 0).then_some(())
    })
    .await;
    // By now it has given up several times.
    let lines = sidecar.program.stop().await?.stderr;
    assert_eq!(lines.lines().filter(|line| line.contains("was given up")).count(), 1, "{lines}");
    Ok(())
}

/// A server that is full and evicts nothing still has what it has.
#[tokio::test]
async fn redis_that_takes_no_more_entries_is_asked_for_those_that_it_has() -> Result<()> {
    let redis = Redis::start().await?;
    let mut sidecar = sidecar(&redis.url()).await?;
    let client = sidecar.client().await?;
    let hits = "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}";
    let skipped = "oncegate_cache_lookups_total{layer=\"redis\",result=\"skipped\"}";
    let (lost, open) = ("oncegate_cache_writes_lost_total", "oncegate_cache_breaker_open");
    let until_hit = async |event_id: &'static str| {
        let before = metric(&sidecar, hits).await?;
        eventually("a duplicate is answered by redis", async || {
            ask(&client, claim(event_id, "again")).await.ok()?;
            (metric(&sidecar, hits).await.ok()? > before).then_some(())
        })
        .await;
        anyhow::Ok(())
    };
    complete(&sidecar, "evt_before").await?;
    until_hit("evt_before").await?;
    assert_eq!(redis.command("CONFIG SET maxmemory-policy noeviction").await?, "+OK");
    assert_eq!(redis.command("CONFIG SET maxmemory 1").await?, "+OK");
    let before = (metric(&sidecar, lost).await?, metric(&sidecar, skipped).await?);
    // A run of new events: Redis is not asked for them, so that nothing but writes can be held against it.
    let mut number = 0;
    while metric(&sidecar, lost).await? < before.0 + 50 {
        complete(&sidecar, &format!("evt_{number}")).await?;
        assert_eq!(metric(&sidecar, open).await?, 0, "after {number} events");
        number += 1;
    }
    until_hit("evt_before").await?;
    assert_eq!(metric(&sidecar, skipped).await?, before.1, "look-ups were skipped");
    assert_eq!(metric(&sidecar, open).await?, 0);
    // It is written to again when there is room.
    assert_eq!(redis.command("CONFIG SET maxmemory 0").await?, "+OK");
    complete(&sidecar, "evt_after").await?;
    until_hit("evt_after").await?;
    let lines = sidecar.program.stop().await?.stderr;
    let told = |text: &str| lines.lines().filter(|line| line.contains(text)).count();
    assert_eq!(told("redis refuses entries"), 1, "{lines}");
    assert!(lines.contains("OOM"), "{lines}");
    assert_eq!(told("redis answers"), 1, "found at the start, and never lost: {lines}");
    Ok(())
}

/// Callers at once.
const CALLERS: usize = 32;

/// What duplicates by 32 callers at once came to.
struct Duplicates {
    /// Of a hundred, how long all but one took at most.
    p99: Duration,
    /// The most that was under way, and that waited for the ledger, at any moment that was looked at.
    under_way: u64,
    queued: u64,
}

/// Duplicates of these events, by 32 callers for two seconds.
async fn duplicates(sidecar: &Sidecar, events: &[String]) -> Result<Duplicates> {
    let end = Instant::now() + Duration::from_secs(2);
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..CALLERS {
        let (client, events) = (sidecar.client().await?, events.to_vec());
        callers.spawn(async move {
            let mut times = Vec::new();
            for event in events.iter().cycle().skip(caller) {
                let began = Instant::now();
                if began >= end {
                    break;
                }
                let answer = ask(&client, claim(event, "again")).await?;
                assert_eq!(answer.decision(), Decision::AlreadyCompleted, "{event}");
                times.push(began.elapsed());
            }
            anyhow::Ok(times)
        });
    }
    let (mut under_way, mut queued) = (0, 0);
    while Instant::now() < end {
        under_way = under_way.max(metric(sidecar, "oncegate_calls_under_way").await?);
        queued = queued.max(metric(sidecar, "oncegate_ledger_queue_calls").await?);
    }
    let mut times = Vec::new();
    while let Some(caller) = callers.join_next().await {
        times.extend(caller??);
    }
    times.sort_unstable();
    assert!(times.len() > 10 * CALLERS, "{} calls", times.len());
    Ok(Duplicates { p99: times[times.len() * 99 / 100], under_way, queued })
}

/// T17. A Redis that takes everything and says nothing, under load: a call waits for its budget at most, the breaker opens,
/// nothing piles up, and Redis is used again when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_that_stalls_is_left_alone_after_its_budget() -> Result<()> {
    let mut redis = Redis::start().await?;
    let sidecar = sidecar(&redis.url()).await?;
    let mut events = Vec::new();
    for number in 0..CALLERS {
        events.push(format!("evt_{number}"));
        complete(&sidecar, &events[number]).await?;
    }
    let hits = "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}";
    let skipped = "oncegate_cache_lookups_total{layer=\"redis\",result=\"skipped\"}";
    let before = duplicates(&sidecar, &events).await?;
    assert!(metric(&sidecar, hits).await? > 0, "redis is in use");
    let skipped_before = metric(&sidecar, skipped).await?;
    redis.freeze()?;
    let during = duplicates(&sidecar, &events).await?;
    assert!(during.p99 <= before.p99 + BUDGET + BUSY, "{:?} after {:?}", during.p99, before.p99);
    assert!(metric(&sidecar, skipped).await? > skipped_before, "the breaker did not open");
    assert_eq!(metric(&sidecar, "oncegate_cache_breaker_open").await?, 1);
    // No more than there are callers, and nothing that stays.
    let callers = u64::try_from(CALLERS)?;
    assert!(during.under_way <= callers && during.queued <= callers, "{} and {}", during.under_way, during.queued);
    eventually("nothing is under way", async || {
        let under_way = metric(&sidecar, "oncegate_calls_under_way").await.ok()?;
        (under_way == 0 && metric(&sidecar, "oncegate_ledger_queue_calls").await.ok()? == 0).then_some(())
    })
    .await;
    redis.thaw()?;
    let client = sidecar.client().await?;
    let hits_before = metric(&sidecar, hits).await?;
    eventually("redis is used again", async || {
        ask(&client, claim("evt_0", "again")).await.ok()?;
        (metric(&sidecar, hits).await.ok()? > hits_before).then_some(())
    })
    .await;
    Ok(())
}

/// Redis, and two sidecars of two databases on it.
struct Foreign {
    redis: Redis,
    sidecar: Sidecar,
}

/// A command in the binary form, and its answer: what an inline command cannot say.
pub(super) async fn raw(redis: &Redis, parts: &[&[u8]]) -> Result<Option<Vec<u8>>> {
    let address = redis.url().trim_start_matches("redis://").to_owned();
    let mut stream = TcpStream::connect(address).await?;
    let mut command = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        command.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        command.extend_from_slice(part);
        command.extend_from_slice(b"\r\n");
    }
    stream.write_all(&command).await?;
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await?);
    }
    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
    match line.strip_prefix('$') {
        Some("-1") => Ok(None),
        Some(length) => {
            let mut value = vec![0; length.parse()?];
            stream.read_exact(&mut value).await?;
            Ok(Some(value))
        }
        None => Ok(Some(line.into_bytes())),
    }
}

/// What Redis has of ours.
pub(super) async fn names(redis: &Redis) -> Result<Vec<String>> {
    let keys = "return table.concat(redis.call('KEYS', 'oncegate:*'), ' ')";
    let names = raw(redis, &[b"EVAL", keys.as_bytes(), b"0"]).await?.unwrap_or_default();
    Ok(String::from_utf8(names)?.split_whitespace().map(str::to_owned).collect())
}

impl Foreign {
    async fn start() -> Result<Self> {
        let redis = Redis::start().await?;
        let sidecar = sidecar(&redis.url()).await?;
        Ok(Self { redis, sidecar })
    }

    /// Completes an event, and tells the name and the value of its entry, which nobody is about to write again.
    async fn entry(&self, sidecar: &Sidecar, event_id: &str) -> Result<(String, Vec<u8>)> {
        let name = self.written(sidecar, event_id).await?;
        self.nothing_under_way(sidecar).await?;
        let value = raw(&self.redis, &[b"GET", name.as_bytes()]).await?.context("the entry")?;
        Ok((name, value))
    }

    /// Entries are written in the order of their events: with the last one's all are there.
    async fn nothing_under_way(&self, sidecar: &Sidecar) -> Result<()> {
        let last = format!("last_{}", uuid::Uuid::new_v4().simple());
        self.written(sidecar, &last).await.map(drop)
    }

    /// Completes an event, and tells the name of its entry.
    async fn written(&self, sidecar: &Sidecar, event_id: &str) -> Result<String> {
        let before = self.names().await?;
        complete(sidecar, event_id).await?;
        let client = sidecar.client().await?;
        let name = eventually("the entry is written", async || {
            // Written again after each duplicate that the ledger had to answer: at its start redis was not yet found.
            ask(&client, claim(event_id, "again")).await.ok()?;
            self.names().await.ok()?.into_iter().find(|name| !before.contains(name))
        })
        .await;
        Ok(name)
    }

    async fn names(&self) -> Result<Vec<String>> {
        names(&self.redis).await
    }

    async fn put(&self, name: &str, value: &[u8]) -> Result<()> {
        raw(&self.redis, &[b"SET", name.as_bytes(), value]).await?;
        Ok(())
    }

    async fn look_ups(&self, result: &str) -> Result<u64> {
        metric(&self.sidecar, &format!("oncegate_cache_lookups_total{{layer=\"redis\",result=\"{result}\"}}")).await
    }

    /// Where a value stands under the name of an event, a duplicate is answered right, by the ledger, and the value is counted
    /// under one of the reasons.
    async fn refuses(&self, event_id: &str, name: &str, value: &[u8], reasons: &[&str]) -> Result<()> {
        let count = async || -> Result<u64> {
            let mut count = 0;
            for reason in reasons {
                count += metric(&self.sidecar, &format!("oncegate_cache_refused_total{{reason=\"{reason}\"}}")).await?;
            }
            Ok(count)
        };
        let late = async || -> Result<u64> { Ok(self.look_ups("error").await? + self.look_ups("skipped").await?) };
        // After a run of new events Redis is not asked: duplicates of another event bring it back, once it answers them.
        let warm = format!("warm_{}", uuid::Uuid::new_v4().simple());
        complete(&self.sidecar, &warm).await?;
        let client = self.sidecar.client().await?;
        eventually("redis is asked", async || {
            let before = self.look_ups("hit").await.ok()?;
            ask(&client, claim(&warm, "again")).await.ok()?;
            (self.look_ups("hit").await.ok()? > before).then_some(())
        })
        .await;
        let looked_at = async || -> Result<Option<()>> {
            self.put(name, value).await?;
            let before = (count().await?, self.look_ups("hit").await?, self.look_ups("invalid").await?, late().await?);
            let answer = ask(&client, claim(event_id, "again")).await?;
            assert_eq!(answer.decision(), Decision::AlreadyCompleted);
            assert_eq!(self.look_ups("hit").await?, before.1, "{event_id}: believed");
            let is_late = late().await? > before.3;
            if !is_late {
                assert_eq!(count().await?, before.0 + 1, "{event_id}: counted as {reasons:?}");
                assert_eq!(self.look_ups("invalid").await?, before.2 + 1, "{event_id}");
            }
            // The event's own is written some time after the answer: not over the next one that is put.
            self.nothing_under_way(&self.sidecar).await?;
            Ok((!is_late).then_some(()))
        };
        eventually("redis answers within the budget of a look-up", async || {
            looked_at().await.unwrap_or_else(|error| panic!("{error:#}"))
        })
        .await;
        Ok(())
    }
}

#[tokio::test]
async fn entries_that_are_forged_swapped_cut_or_changed_are_misses_counted_by_reason() -> Result<()> {
    let shared = Foreign::start().await?;
    let (name, value) = shared.entry(&shared.sidecar, "evt_1").await?;
    let (other_name, other) = shared.entry(&shared.sidecar, "evt_2").await?;

    // Another event's, both ways.
    shared.refuses("evt_1", &name, &other, &["unverified"]).await?;
    shared.refuses("evt_2", &other_name, &value, &["unverified"]).await?;
    // Cut at either end, and nothing at all.
    for length in [0, 1, 15, 16, value.len() / 2, value.len() - 1] {
        shared.refuses("evt_1", &name, &value[..length], &["malformed", "unverified"]).await?;
    }
    shared.refuses("evt_1", &name, &value[1..], &["malformed", "unverified"]).await?;
    // Made up: as long as one of ours, and far longer.
    shared.refuses("evt_1", &name, &vec![1; value.len()], &["unverified"]).await?;
    // Of which next to nothing is carried.
    let before = sent(&shared.redis).await?;
    shared.refuses("evt_1", &name, &vec![1; 1024 * 1024], &["malformed"]).await?;
    let carried = sent(&shared.redis).await? - before;
    assert!(carried < 512 * 1024, "{carried} bytes");
    // One bit, in every byte.
    for place in 0..value.len() {
        let mut changed = value.clone();
        changed[place] ^= 1 << (place % 8);
        shared.refuses("evt_1", &name, &changed, &["unverified"]).await?;
    }
    Ok(())
}

/// What Redis has sent since its start.
async fn sent(redis: &Redis) -> Result<u64> {
    let told = String::from_utf8(raw(redis, &[b"INFO", b"stats"]).await?.context("statistics")?)?;
    let sent = told.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:")).context("its bytes")?;
    Ok(sent.trim().parse()?)
}

/// The name that is asked for while Redis is left alone: whatever stands there, it answers.
#[tokio::test]
async fn something_foreign_under_the_probes_name_does_not_keep_redis_away() -> Result<()> {
    let redis = Redis::start().await?;
    assert_eq!(redis.command("LPUSH oncegate:1:probe foreign").await?, ":1");
    let sidecar = sidecar(&redis.url()).await?;
    let shared = Foreign { redis, sidecar };
    // Which is written, and so Redis was found.
    shared.entry(&shared.sidecar, "evt_1").await?;
    assert_eq!(metric(&shared.sidecar, "oncegate_cache_breaker_open").await?, 0);
    Ok(())
}

#[tokio::test]
async fn entries_of_another_database_are_misses_under_either_name() -> Result<()> {
    let shared = Foreign::start().await?;
    let elsewhere = sidecar(&shared.redis.url()).await?;
    let (theirs, their_value) = shared.entry(&elsewhere, "evt_1").await?;
    // Under its own name it is nothing to us: the event is new here.
    let client = shared.sidecar.client().await?;
    let answer = ask(&client, claim("evt_1", "first")).await?;
    let lock = answer.lock.context("an entry of another database suppressed an event")?;
    let before = shared.names().await?;
    client.clone().mark_completed(completion("evt_1", lock.fencing_token)).await?;
    let ours = eventually("the entry is written", async || {
        ask(&client, claim("evt_1", "again")).await.ok()?;
        shared.names().await.ok()?.into_iter().find(|name| !before.contains(name))
    })
    .await;
    assert_ne!(ours, theirs);
    shared.nothing_under_way(&shared.sidecar).await?;
    // Under ours it does not verify.
    shared.refuses("evt_1", &ours, &their_value, &["unverified"]).await
}

/// A copy of a database has its original's key; what tells them apart is its identity.
#[tokio::test]
async fn entries_of_a_copy_with_the_same_key_do_not_verify() -> Result<()> {
    let shared = Foreign::start().await?;
    let copy = Database::create().await?;
    let key = shared.sidecar.outside("select value from oncegate_meta where key = 'cache_key'").await?;
    let mut admin = copy.connect().await?;
    sqlx::query("update oncegate_meta set value = $1 where key = 'cache_key'").bind(key).execute(&mut admin).await?;
    let url = shared.redis.url();
    let elsewhere =
        Sidecar::start_with(Ledger::Postgres(copy), |command| command.env("REDIS_URL", url).env("CACHE_SIZE", "0B"))
            .await?;
    let (_, their_value) = shared.entry(&elsewhere, "evt_1").await?;
    let (ours, _) = shared.entry(&shared.sidecar, "evt_1").await?;
    shared.refuses("evt_1", &ours, &their_value, &["unverified"]).await
}

/// Stale: what an operator has decided on since. The tombstone is found, counted, and written over by nobody slower.
#[tokio::test]
async fn a_stale_entry_is_void_and_counted() -> Result<()> {
    let shared = Foreign::start().await?;
    let client = shared.sidecar.client().await?;
    complete(&shared.sidecar, "evt_1").await?;
    let (name, entry) = shared.entry(&shared.sidecar, "evt_2").await?;
    client.clone().resolve(replay("evt_2")).await?;
    // With the answer it stands there, for whoever has not heard of the replay: a tombstone, and no deletion (C2).
    let tombstone = raw(&shared.redis, &[b"GET", name.as_bytes()]).await?.context("a tombstone, and no deletion")?;
    assert!(entry[9] & 1 == 0 && tombstone[9] & 1 == 1 && tombstone[1..9] > entry[1..9], "{tombstone:?}");
    let void = "oncegate_cache_refused_total{reason=\"void\"}";
    assert_eq!(metric(&shared.sidecar, void).await?, 0);
    let lock = ask(&client, claim("evt_2", "replay")).await?.lock.context("granted anew")?;
    assert_eq!(metric(&shared.sidecar, void).await?, 1);
    assert_eq!(lock.attempt, 2);
    Ok(())
}
