//! Two sidecars on one Postgres and one Redis, as processes: one winner of each storm whichever it goes to, waiters woken
//! across, and a Redis in trouble that makes nothing wrong.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{
    CheckAndLockRequest, CheckAndLockResponse, Decision, EventKey, HistoryRequest, MarkCompletedRequest, Outcome,
    idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::{
    eventually, http_client,
    postgres::Database,
    program::{Oncegate, Running},
    redis::Redis,
};
use tempfile::TempDir;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, transport::Channel};

type Client = IdempotencyServiceClient<Channel>;

/// See the module.
struct Pair {
    clients: [Client; 2],
    admins: [SocketAddr; 2],
    redis: Redis,
    _programs: [Running; 2],
    _database: Database,
    _directory: TempDir,
}

impl Pair {
    async fn start() -> Result<Self> {
        let database = Database::create().await?;
        let redis = Redis::start().await?;
        let directory = tempfile::tempdir()?;
        let start = async || -> Result<(Running, Client, SocketAddr)> {
            let mut program = Oncegate::new(directory.path(), ["sidecar"])?
                .env("SIDECAR_LISTEN", "127.0.0.1:0")
                .env("ADMIN_LISTEN", "127.0.0.1:0")
                .env("DATABASE_URL", database.url())
                .env("REDIS_URL", redis.url())
                .start()?;
            let admin = program.address("admin").await?;
            let address = program.address("sidecar").await?;
            let client = IdempotencyServiceClient::connect(format!("http://{address}")).await?;
            Ok((program, client, admin))
        };
        let (first, client, admin) = start().await?;
        let (second, other, others) = start().await?;
        Ok(Self {
            clients: [client, other],
            admins: [admin, others],
            redis,
            _programs: [first, second],
            _database: database,
            _directory: directory,
        })
    }

    fn client(&self, number: usize) -> Client {
        self.clients[number % 2].clone()
    }
}

fn key(event_id: &str) -> Option<EventKey> {
    Some(EventKey { provider: "stripe".into(), event_id: event_id.into(), ..Default::default() })
}

fn claim(event_id: &str) -> CheckAndLockRequest {
    CheckAndLockRequest { key: key(event_id), event_type: "charge.succeeded".into(), ..Default::default() }
}

async fn ask(mut client: Client, request: CheckAndLockRequest) -> Result<CheckAndLockResponse, Status> {
    Ok(client.check_and_lock(request).await?.into_inner())
}

async fn complete(mut client: Client, event_id: &str, fencing_token: i64) -> Result<(), Status> {
    let request = MarkCompletedRequest { key: key(event_id), fencing_token, ..Default::default() };
    client.mark_completed(request).await.map(drop)
}

// T02
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_over_both_has_one_winner() -> Result<()> {
    let pair = Pair::start().await?;
    for round in 0..20 {
        let event_id = format!("evt_{round}");
        let storm = (0..100).map(|number| ask(pair.client(number), claim(&event_id)));
        let mut winners = Vec::new();
        for answer in futures::future::try_join_all(storm).await? {
            match answer.decision() {
                Decision::Acquired => winners.push(answer.lock.context("a lock")?.fencing_token),
                other => assert_eq!(other, Decision::InProgress),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}");
        complete(pair.client(round), &event_id, winners[0]).await?;
        let storm = (0..100).map(|number| ask(pair.client(number), claim(&event_id)));
        for answer in futures::future::try_join_all(storm).await? {
            assert_eq!(answer.decision(), Decision::AlreadyCompleted);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_on_the_other_sidecar_is_woken_by_the_outcome() -> Result<()> {
    let pair = Pair::start().await?;
    // The median of some: the net alone would take 100 ms on average, and this machine may be busy.
    let mut woken_after = Vec::new();
    // Until each has seen that it is not alone.
    let mut round = 0;
    while woken_after.len() < 15 {
        round += 1;
        let event_id = format!("evt_{round}");
        let lock = ask(pair.client(0), claim(&event_id)).await?.lock.context("a lock")?;
        let wait = Some(prost_types::Duration { seconds: 20, nanos: 0 });
        let waiting = ask(pair.client(1), CheckAndLockRequest { wait_duration: wait, ..claim(&event_id) });
        let waiting = AbortOnDropHandle::new(tokio::spawn(async move { (waiting.await, Instant::now()) }));
        eventually("it waits", async || {
            let page = http_client::get(pair.admins[1], "/metrics").await.ok()?;
            String::from_utf8_lossy(&page.body).contains("\noncegate_calls_waiting 1\n").then_some(())
        })
        .await;
        complete(pair.client(0), &event_id, lock.fencing_token).await?;
        let completed = Instant::now();
        let (answer, woken) = waiting.await?;
        assert_eq!(answer?.decision(), Decision::AlreadyCompleted);
        if round > 5 {
            woken_after.push(woken.saturating_duration_since(completed));
        }
    }
    woken_after.sort();
    let median = woken_after[woken_after.len() / 2];
    assert!(median < Duration::from_millis(100), "{woken_after:?}");
    Ok(())
}

// T21
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_killed_frozen_flushed_and_restarted_under_load_makes_no_answer_wrong() -> Result<()> {
    let mut pair = Pair::start().await?;
    let clients = pair.clients.clone();
    let ended = tokio_util::sync::CancellationToken::new();
    let workers: Vec<_> = (0..16)
        .map(|worker: usize| {
            let (clients, ended) = (clients.clone(), ended.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                let mut grants: BTreeMap<String, Vec<i64>> = BTreeMap::new();
                let mut round = 0_usize;
                while !ended.is_cancelled() {
                    // Four workers at one event, over both sidecars, and again at events that are done.
                    let event_id = format!("evt_{}_{round}", worker / 4);
                    let answer = ask(clients[(worker + round) % 2].clone(), claim(&event_id)).await?;
                    if let Some(lock) = &answer.lock {
                        grants.entry(event_id.clone()).or_default().push(lock.fencing_token);
                        complete(clients[round % 2].clone(), &event_id, lock.fencing_token).await?;
                        let again = ask(clients[(round + 1) % 2].clone(), claim(&event_id)).await?;
                        assert_eq!(again.decision(), Decision::AlreadyCompleted, "{event_id}");
                    }
                    let earlier = format!("evt_{}_{}", worker / 4, round / 2);
                    let answer = ask(clients[worker % 2].clone(), claim(&earlier)).await?;
                    assert!(answer.lock.is_none() || round / 2 == round, "{earlier} was granted again");
                    round += 1;
                }
                Ok::<_, Status>((grants, round))
            }))
        })
        .collect();
    // What happens to Redis meanwhile, each long enough for the breaker to notice.
    let pause = Duration::from_millis(700);
    for trouble in 0..6 {
        match trouble % 3 {
            0 => {
                pair.redis.kill()?;
                tokio::time::sleep(pause).await;
                pair.redis.restart().await?;
            }
            1 => {
                pair.redis.freeze()?;
                tokio::time::sleep(pause).await;
                pair.redis.thaw()?;
            }
            _ => drop(pair.redis.command("FLUSHALL").await?),
        }
        tokio::time::sleep(pause).await;
    }
    ended.cancel();
    let mut grants: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for worker in workers {
        let (granted, rounds) = worker.await??;
        assert!(rounds > 10, "the load went on: {rounds}");
        for (event_id, tokens) in granted {
            grants.entry(event_id).or_default().extend(tokens);
        }
    }
    assert!(grants.len() > 40, "{}", grants.len());
    for (event_id, tokens) in &grants {
        assert_eq!(tokens.len(), 1, "{event_id} was granted once");
    }
    // And the ledger agrees, for a sample.
    for (event_id, tokens) in grants.iter().step_by(7) {
        let request = HistoryRequest { key: key(event_id), ..Default::default() };
        let history = pair.client(0).history(request).await?.into_inner().events.remove(0);
        assert_eq!(history.attempts.len(), 1);
        assert_eq!(history.attempts[0].fencing_token, tokens[0]);
        assert_eq!(history.attempts[0].outcome, i32::from(Outcome::Completed));
    }
    // Redis is used again without a restart.
    let event_id = grants.keys().next().context("an event")?.clone();
    eventually("redis holds entries again", async || {
        ask(pair.client(0), claim(&event_id)).await.ok()?;
        ask(pair.client(1), claim(&event_id)).await.ok()?;
        (pair.redis.command("DBSIZE").await.ok()? != ":0").then_some(())
    })
    .await;
    Ok(())
}
