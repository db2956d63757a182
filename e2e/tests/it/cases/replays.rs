//! Completed events that an operator replays by force, on several sidecars of one database: nothing from before the replay is
//! answered any more, wherever it stands or comes back from (C7).

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{Decision, Lock};
use oncegate_e2e::{
    eventually,
    postgres::Database,
    program::{Oncegate, Running},
    redis::Redis,
};
use sqlx::AssertSqlSafe;
use tempfile::TempDir;

use super::{
    Client, ask,
    cache::{names, raw},
    claim, client, completion, metric_at, replay,
};
use crate::setup::{Ledger, on_each_ledger};

/// How long a sidecar may be behind a replay that another one has acknowledged. Not a guess: its cache stops to answer.
const BEHIND_MAX: Duration = Duration::from_secs(2);

const MEMORY_HIT: &str = "oncegate_cache_lookups_total{layer=\"memory\",result=\"hit\"}";
const REDIS_HIT: &str = "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}";
const UNSURE: &str = "oncegate_cache_lookups_total{layer=\"memory\",result=\"unsure\"}";
const VOID: &str = "oncegate_cache_refused_total{reason=\"void\"}";

/// A sidecar among several.
struct Sidecar {
    program: Running,
    client: Client,
    admin: SocketAddr,
}

impl Sidecar {
    async fn metric(&self, name: &str) -> Result<u64> {
        metric_at(self.admin, name).await
    }

    async fn decision(&self, event_id: &str, claim_id: &str) -> Result<Decision> {
        Ok(ask(&self.client, claim(event_id, claim_id)).await?.decision())
    }

    async fn complete(&self, event_id: &str) -> Result<()> {
        let token = ask(&self.client, claim(event_id, "first")).await?.lock.context("the lock")?.fencing_token;
        self.client.clone().mark_completed(completion(event_id, token)).await?;
        Ok(())
    }

    async fn replay(&self, event_id: &str) -> Result<Instant> {
        self.client.clone().resolve(replay(event_id)).await?;
        Ok(Instant::now())
    }

    /// Duplicates of a completed event, until one of them is counted under a name.
    async fn asks_until_counted(&self, event_id: &str, name: &str) -> Result<()> {
        let before = self.metric(name).await?;
        eventually(name, async || {
            assert_eq!(self.decision(event_id, "again").await.ok()?, Decision::AlreadyCompleted);
            (self.metric(name).await.ok()? > before).then_some(())
        })
        .await;
        Ok(())
    }

    /// The lock of an event whose replay was acknowledged at a moment by another sidecar: soon.
    async fn granted_soon(&self, event_id: &str, acknowledged: Instant) -> Lock {
        eventually("the replayed event is granted", async || {
            let invoked = Instant::now();
            let answer = ask(&self.client, claim(event_id, "replay")).await.ok()?;
            if answer.decision() == Decision::AlreadyCompleted {
                let behind = invoked.saturating_duration_since(acknowledged);
                assert!(behind < BEHIND_MAX, "called completed {behind:?} after its replay");
            }
            answer.lock
        })
        .await
    }
}

/// What they share.
struct Shared {
    database: Database,
    redis: Redis,
    directory: TempDir,
}

impl Shared {
    async fn start() -> Result<Self> {
        let (database, redis) = (Database::create().await?, Redis::start().await?);
        Ok(Self { database, redis, directory: tempfile::tempdir()? })
    }

    async fn sidecar(&self, settings: impl FnOnce(Oncegate) -> Oncegate) -> Result<Sidecar> {
        let command = Oncegate::new(self.directory.path(), ["sidecar"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("ADMIN_LISTEN", "127.0.0.1:0")
            .env("DATABASE_URL", self.database.url());
        let mut program = settings(command).start()?;
        let client = client(program.address("sidecar").await?).await?;
        let admin = program.address("admin").await?;
        Ok(Sidecar { program, client, admin })
    }

    /// One that has to ask Redis about every duplicate.
    async fn without_memory(&self) -> Result<Sidecar> {
        let redis = self.redis.url();
        self.sidecar(|command| command.env("REDIS_URL", redis).env("CACHE_SIZE", "0B")).await
    }

    async fn execute(&self, sql: impl Into<String>) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(&mut self.database.connect().await?).await?;
        Ok(())
    }
}

/// T21. An entry that was genuine comes back: a failover of Redis that lost the tombstone, a snapshot, somebody's SET.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_genuine_entry_that_comes_back_after_a_replay_is_void_on_every_sidecar() -> Result<()> {
    let shared = Shared::start().await?;
    let (first, mut second) = (shared.without_memory().await?, shared.without_memory().await?);
    first.complete("evt_1").await?;
    for sidecar in [&first, &second] {
        sidecar.asks_until_counted("evt_1", REDIS_HIT).await?;
    }
    let name = names(&shared.redis).await?.pop().context("the entry's name")?;
    let entry = raw(&shared.redis, &[b"GET", name.as_bytes()]).await?.context("the entry")?;
    let bring_back = async || raw(&shared.redis, &[b"SET", name.as_bytes(), &entry]).await;

    let acknowledged = first.replay("evt_1").await?;
    bring_back().await?;
    let lock = second.granted_soon("evt_1", acknowledged).await;
    assert_eq!(lock.attempt, 2);
    assert!(second.metric(VOID).await? > 0);
    // The one that did it never was behind.
    assert_eq!(first.decision("evt_1", "again").await?, Decision::InProgress);
    assert_eq!(first.metric(VOID).await?, 1);

    // Nor is one that starts after it: its first answer, and one that it asks Redis for.
    second.program.kill().await?;
    second = shared.without_memory().await?;
    assert_eq!(second.decision("evt_1", "again").await?, Decision::InProgress);
    first.complete("evt_2").await?;
    second.asks_until_counted("evt_2", REDIS_HIT).await?;
    let before = second.metric(VOID).await?;
    assert_eq!(second.decision("evt_1", "again").await?, Decision::InProgress);
    assert_eq!(second.metric(VOID).await?, before + 1);

    // Completed once more, it is told of that completion, and not of the one before.
    first.client.clone().mark_completed(completion("evt_1", lock.fencing_token)).await?;
    bring_back().await?;
    for sidecar in [&first, &second] {
        let answer = ask(&sidecar.client, claim("evt_1", "again")).await?;
        assert_eq!(answer.decision(), Decision::AlreadyCompleted);
        assert_eq!(answer.event.context("the event")?.fencing_token, lock.fencing_token);
    }
    Ok(())
}

/// Whatever comes back, and however soon: it need not read what it has done itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sidecar_that_did_a_replay_is_never_behind_it() -> Result<()> {
    let shared = Shared::start().await?;
    let sidecar = shared.without_memory().await?;
    for round in 0..10 {
        let (event_id, before) = (format!("evt_{round}"), names(&shared.redis).await?);
        sidecar.complete(&event_id).await?;
        sidecar.asks_until_counted(&event_id, REDIS_HIT).await?;
        let mut added = names(&shared.redis).await?;
        added.retain(|name| !before.contains(name));
        let name = added.pop().context("the entry's name")?;
        let entry = raw(&shared.redis, &[b"GET", name.as_bytes()]).await?.context("the entry")?;
        sidecar.replay(&event_id).await?;
        raw(&shared.redis, &[b"SET", name.as_bytes(), &entry]).await?;
        assert_eq!(sidecar.decision(&event_id, "replay").await?, Decision::Acquired, "{event_id}");
    }
    assert_eq!(sidecar.metric(VOID).await?, 10);
    Ok(())
}

on_each_ledger!(a_replayed_event_is_granted_by_the_process_that_had_it_in_its_memory);

async fn a_replayed_event_is_granted_by_the_process_that_had_it_in_its_memory(ledger: Ledger) -> Result<()> {
    let sidecar = super::Sidecar::start(ledger).await?;
    let client = sidecar.client().await?;
    for round in 0..5 {
        let event_id = format!("evt_{round}");
        let token = ask(&client, claim(&event_id, "first")).await?.lock.context("the lock")?.fencing_token;
        client.clone().mark_completed(completion(&event_id, token)).await?;
        let before = metric_at(sidecar.admin, MEMORY_HIT).await?;
        eventually("the process answers from its memory", async || {
            assert_eq!(ask(&client, claim(&event_id, "again")).await.ok()?.decision(), Decision::AlreadyCompleted);
            (metric_at(sidecar.admin, MEMORY_HIT).await.ok()? > before).then_some(())
        })
        .await;
        client.clone().resolve(replay(&event_id)).await?;
        assert_eq!(ask(&client, claim(&event_id, "replay")).await?.decision(), Decision::Acquired, "{event_id}");
    }
    Ok(())
}

/// An entry that ought to have ended, as one that was set without an end: its event may be gone, and come again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_outlived_the_retention_is_void() -> Result<()> {
    let shared = Shared::start().await?;
    let sidecar = shared.without_memory().await?;
    sidecar.complete("evt_1").await?;
    sidecar.asks_until_counted("evt_1", REDIS_HIT).await?;
    let name = names(&shared.redis).await?.pop().context("the entry's name")?;
    raw(&shared.redis, &[b"PERSIST", name.as_bytes()]).await?;
    drop(sidecar);
    // Where events are kept for an hour at least, no entry is believed: Cleanup may take them as soon as it likes.
    let redis = shared.redis.url();
    let settings =
        |command: Oncegate| command.env("REDIS_URL", redis).env("CACHE_SIZE", "0B").env("RETENTION_MIN", "1h");
    let sidecar = shared.sidecar(settings).await?;
    shared.execute("delete from payment_webhook_events").await?;
    let answer = ask(&sidecar.client, claim("evt_1", "again")).await?;
    assert_eq!((answer.decision(), answer.lock.context("a new event")?.attempt), (Decision::Acquired, 1));
    eventually("it is found in redis, and void", async || {
        assert_eq!(sidecar.decision("evt_1", "and-again").await.ok()?, Decision::InProgress);
        (sidecar.metric(VOID).await.ok()? > 0).then_some(())
    })
    .await;
    Ok(())
}

/// Notifications that reach nobody: `pg_notify` is another function for these sidecars.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_whose_announcement_is_lost_is_known_everywhere_within_two_seconds() -> Result<()> {
    let shared = Shared::start().await?;
    let name = shared.database.name();
    shared
        .execute(format!(
            "create schema shadow;
            create table shadow.swallowed (payload text not null);
            create function shadow.pg_notify(text, text) returns void language sql
                as $$ insert into shadow.swallowed values ($2) $$;
            alter database {name} set search_path = shadow, pg_catalog, public"
        ))
        .await?;
    let (first, second) = (shared.sidecar(|command| command).await?, shared.sidecar(|command| command).await?);
    for round in 0..3 {
        let event_id = format!("evt_{round}");
        first.complete(&event_id).await?;
        // It keeps the event in its own memory, and answers from there.
        second.asks_until_counted(&event_id, MEMORY_HIT).await?;
        let acknowledged = first.replay(&event_id).await?;
        let lock = second.granted_soon(&event_id, acknowledged).await;
        assert_eq!(lock.attempt, 2);
        eventually("the announcement of the replay went nowhere", async || {
            let swallowed = "select count(*) from shadow.swallowed where payload like '%!%'";
            (shared.database.query(swallowed).await.ok()?.parse::<u32>().ok()? > round).then_some(())
        })
        .await;
    }
    Ok(())
}

/// What was replayed cannot be read: better to ask the ledger about each duplicate than to answer what may be wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_cannot_read_what_was_replayed_does_not_answer() -> Result<()> {
    let shared = Shared::start().await?;
    let sidecar = shared.sidecar(|command| command).await?;
    sidecar.complete("evt_1").await?;
    sidecar.asks_until_counted("evt_1", MEMORY_HIT).await?;
    let mut outside = shared.database.connect().await?;
    sqlx::raw_sql("begin; lock table payment_webhook_resolutions").execute(&mut outside).await?;
    sidecar.asks_until_counted("evt_1", UNSURE).await?;
    let hits = sidecar.metric(MEMORY_HIT).await?;
    assert_eq!(sidecar.decision("evt_1", "again").await?, Decision::AlreadyCompleted);
    assert_eq!(sidecar.metric(MEMORY_HIT).await?, hits);
    sqlx::raw_sql("rollback").execute(&mut outside).await?;
    sidecar.asks_until_counted("evt_1", MEMORY_HIT).await?;
    Ok(())
}
