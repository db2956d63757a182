//! Redis as Cluster and under Sentinels (C5): used, failed over under load, and used again, with no answer wrong.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use futures::future::join_all;
use oncegate_api::v1::{
    CheckAndLockRequest, CheckAndLockResponse, Decision, EventKey, MarkCompletedRequest,
    idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::{
    eventually::within,
    http_client,
    postgres::Database,
    program::{Oncegate, Running},
    redis_many::{RedisCluster, RedisSentinel},
};
use tempfile::TempDir;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Status, transport::Channel};

type Client = IdempotencyServiceClient<Channel>;

/// A failed-over Redis is found again by the client's own attempts, the breaker's probes among them.
const FOUND_AGAIN: Duration = Duration::from_secs(60);

/// Two sidecars that have no cache of their own: what they know without Postgres, they know from Redis.
struct Sidecars {
    clients: [Client; 2],
    admins: [SocketAddr; 2],
    programs: [Running; 2],
    _database: Database,
    _directory: TempDir,
}

impl Sidecars {
    async fn start(redis: &str) -> Result<Self> {
        let database = Database::create().await?;
        let directory = tempfile::tempdir()?;
        let start = async || -> Result<(Running, Client, SocketAddr)> {
            let mut program = Oncegate::new(directory.path(), ["sidecar"])?
                .env("SIDECAR_LISTEN", "127.0.0.1:0")
                .env("ADMIN_LISTEN", "127.0.0.1:0")
                .env("CACHE_SIZE", "0B")
                .env("DATABASE_URL", database.url())
                .env("REDIS_URL", redis)
                .start()?;
            let admin = program.address("admin").await?;
            let address = program.address("sidecar").await?;
            let client = IdempotencyServiceClient::connect(format!("http://{address}")).await?;
            Ok((program, client, admin))
        };
        let (first, client, admin) = start().await?;
        let (second, other, other_admin) = start().await?;
        Ok(Self {
            clients: [client, other],
            admins: [admin, other_admin],
            programs: [first, second],
            _database: database,
            _directory: directory,
        })
    }

    /// Look-ups that Redis answered, over both.
    async fn hits(&self) -> Result<u64> {
        self.look_ups("hit").await
    }

    /// Look-ups in Redis that ended like this, over both.
    async fn look_ups(&self, result: &str) -> Result<u64> {
        let mut count = 0;
        for admin in self.admins {
            let page = String::from_utf8(http_client::get(admin, "/metrics").await?.body.to_vec())?;
            let line = format!("oncegate_cache_lookups_total{{layer=\"redis\",result=\"{result}\"}} ");
            let value = page.lines().find_map(|found| found.strip_prefix(&line)).context("a count of look-ups")?;
            count += value.parse::<u64>()?;
        }
        Ok(count)
    }

    /// Waits until a duplicate of each event is answered by Redis: what was lost is asked of Postgres once, and
    /// written again.
    async fn until_all_hit(&self, events: &[String]) -> Result<()> {
        self.until_hit(events, events.len()).await
    }

    /// The same, until so many of them are.
    async fn until_hit(&self, events: &[String], wanted: usize) -> Result<()> {
        within(FOUND_AGAIN, async || {
            let before = self.hits().await.ok()?;
            // All at once: they are looked up together.
            for answer in join_all(events.iter().map(|event| ask(&self.clients[1], event))).await {
                assert_eq!(answer.ok()?.decision(), Decision::AlreadyCompleted);
            }
            let hits = self.hits().await.ok()? - before;
            (hits == u64::try_from(wanted).ok()?).then_some(())
        })
        .await
        .with_context(|| format!("Redis does not answer for {wanted} events"))
    }
}

fn key(event: &str) -> Option<EventKey> {
    Some(EventKey { provider: "stripe".into(), event_id: event.into(), ..Default::default() })
}

async fn ask(client: &Client, event: &str) -> Result<CheckAndLockResponse, Status> {
    let request = CheckAndLockRequest { key: key(event), event_type: "charge.succeeded".into(), ..Default::default() };
    Ok(client.clone().check_and_lock(request).await?.into_inner())
}

/// Claims, completes, and asks again at the other sidecar: exactly one grant, and a completion that is known at once.
async fn once(clients: &[Client; 2], event: &str) -> Result<(), Status> {
    let answer = ask(&clients[0], event).await?;
    assert_eq!(answer.decision(), Decision::Acquired, "{event}");
    let fencing_token = answer.lock.map(|lock| lock.fencing_token).unwrap_or_default();
    let request = MarkCompletedRequest { key: key(event), fencing_token, ..Default::default() };
    clients[0].clone().mark_completed(request).await?;
    let again = ask(&clients[1], event).await?;
    assert_eq!(again.decision(), Decision::AlreadyCompleted, "{event}");
    Ok(())
}

/// Events are taken through their lives until `stop`, from several callers at once.
fn load(clients: &[Client; 2], stop: &CancellationToken) -> Vec<AbortOnDropHandle<Result<usize, Status>>> {
    (0..8)
        .map(|worker| {
            let (clients, stop) = (clients.clone(), stop.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                let mut round = 0;
                while !stop.is_cancelled() {
                    once(&clients, &format!("evt_{worker}_{round}")).await?;
                    // And one that is long done.
                    let earlier = ask(&clients[round % 2], &format!("evt_{worker}_{}", round / 2)).await?;
                    assert_eq!(earlier.decision(), Decision::AlreadyCompleted);
                    round += 1;
                }
                Ok(round)
            }))
        })
        .collect()
}

async fn finish(stop: CancellationToken, load: Vec<AbortOnDropHandle<Result<usize, Status>>>) -> Result<()> {
    stop.cancel();
    for worker in load {
        let rounds = worker.await??;
        assert!(rounds > 10, "the load went on: {rounds}");
    }
    Ok(())
}

fn events() -> Vec<String> {
    // Enough that each of three primaries has some.
    (0..30).map(|number| format!("evt_before_{number}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_loses_a_primary_under_load_makes_no_answer_wrong_and_is_used_again() -> Result<()> {
    let mut redis = RedisCluster::start().await?;
    let sidecars = Sidecars::start(&redis.url()).await?;
    let events = events();
    for event in &events {
        once(&sidecars.clients, event).await?;
    }
    sidecars.until_all_hit(&events).await?;
    assert!(redis.keys().await? >= events.len(), "the entries are spread over the cluster");

    let stop = CancellationToken::new();
    let workers = load(&sidecars.clients, &stop);
    redis.fail_over(1).await?;
    finish(stop, workers).await?;
    sidecars.until_all_hit(&events).await
}

/// ASK, as it happens: whoever is not told where a key is now has it from Postgres, and Redis is in use all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_on_its_way_to_another_node_costs_the_look_ups_of_what_it_holds_and_no_others() -> Result<()> {
    let redis = RedisCluster::start().await?;
    let mut sidecars = Sidecars::start(&redis.url()).await?;
    let events = events();
    for event in &events {
        once(&sidecars.clients, event).await?;
    }
    sidecars.until_all_hit(&events).await?;

    let slot = redis.begin_to_move_a_slot().await?;
    // More than once: what is found away must not take the connection with it.
    for _ in 0..3 {
        sidecars.until_hit(&events, events.len() - 1).await?;
    }
    // Nor does a crowd that asks for it have Redis left alone.
    let skipped = sidecars.look_ups("skipped").await?;
    for event in &events {
        for _ in 0..10 {
            assert_eq!(ask(&sidecars.clients[1], event).await?.decision(), Decision::AlreadyCompleted, "{event}");
        }
    }
    assert_eq!(sidecars.look_ups("skipped").await?, skipped);
    redis.end_the_move(slot).await?;
    sidecars.until_all_hit(&events).await?;
    for program in &mut sidecars.programs {
        let log = program.stop().await?.stderr;
        assert!(!log.contains("was given up"), "{log}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_by_sentinels_under_load_makes_no_answer_wrong_and_the_new_primary_is_used() -> Result<()> {
    let mut redis = RedisSentinel::start().await?;
    let sidecars = Sidecars::start(&redis.url()).await?;
    let events = events();
    for event in &events {
        once(&sidecars.clients, event).await?;
    }
    sidecars.until_all_hit(&events).await?;

    let stop = CancellationToken::new();
    let workers = load(&sidecars.clients, &stop);
    redis.fail_over().await?;
    finish(stop, workers).await?;
    sidecars.until_all_hit(&events).await?;
    let before = redis.keys().await?;
    once(&sidecars.clients, "evt_after").await?;
    let written = within(FOUND_AGAIN, async || (redis.keys().await.ok()? > before).then_some(())).await;
    written.context("the new primary is not written to")?;
    sidecars.until_all_hit(&["evt_after".to_owned()]).await
}
