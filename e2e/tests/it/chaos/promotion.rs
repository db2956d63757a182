//! Failing over to a synchronous standby: what was acknowledged is there (I5), tokens go on (I1), and what the caches knew
//! of the server before is not believed (C3, C6).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    chaos::{
        application::Guard,
        check,
        client::Caller,
        history::{Ending, Recorder, Reply},
        rows,
    },
    eventually::{eventually, within},
    postgres::{Cluster, Options},
    program::{Oncegate, Running},
    proxy::Proxy,
    redis::Redis,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

async fn execute(url: &str, sql: &str) -> Result<()> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await?;
    connection.close().await?;
    Ok(())
}

async fn process_one(caller: &mut Caller, event: &str) -> Option<i64> {
    let claim_id = format!("claim-{event}");
    let Some(Reply::Acquired { token, .. }) = caller.claim(event, &claim_id, None, Duration::ZERO).await else {
        return None;
    };
    let marked = caller.mark(event, &claim_id, token, Ending::Completed, Duration::ZERO).await;
    matches!(marked, Some(Reply::Marked { .. })).then_some(token)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_standby_has_all_that_was_acknowledged_and_larger_tokens() -> Result<()> {
    let mut primary = Cluster::start(Options::default()).await?;
    let database = primary.database().await?;
    let standby = primary.standby(Options::default()).await?;
    primary.wait_for_standby(false).await?;
    primary.make_standby_synchronous().await?;

    // The name by which applications know the database, which points to whoever is primary.
    let name = Proxy::start(primary.address()).await?;
    let redis = Redis::start().await?;
    let directory = tempfile::tempdir()?;
    let recorder = Recorder::default();
    let (mut programs, mut urls): (Vec<Running>, Vec<String>) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let mut program = Oncegate::new(directory.path(), ["sidecar"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("DATABASE_URL", format!("postgres://postgres@{}/{}", name.address(), database.name()))
            .env("REDIS_URL", redis.url())
            .start()?;
        urls.push(format!("http://{}", program.address("sidecar").await?));
        programs.push(program);
    }
    // What the caches will know, and the ledger will not: see below.
    let mut caller = Caller::new(&urls[0], Recorder::default())?;
    // A sidecar that has just started may not have found Redis yet: the first event whose entry gets there.
    let mut number = 0;
    let (forgotten, before) = eventually("Redis has an event", async || {
        number += 1;
        let event = format!("evt_forgotten_{number}");
        let token = process_one(&mut caller, &event).await?;
        let written =
            within(Duration::from_millis(500), async || (redis.command("DBSIZE").await.ok()? != ":0").then_some(()));
        written.await.map(|()| (event, token))
    })
    .await;
    let forgotten = forgotten.as_str();
    let again = caller.claim(forgotten, "again", None, Duration::ZERO).await;
    assert_eq!(again, Some(Reply::AlreadyCompleted { token: before }));

    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..4_usize)
        .map(|worker| {
            let mut caller = Caller::new(&urls[worker % 2], recorder.clone())?;
            let stop = Arc::clone(&stop);
            anyhow::Ok(tokio::spawn(async move {
                for round in 0.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    if process_one(&mut caller, &format!("evt_{worker}_{round}")).await.is_none() {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }))
        })
        .collect::<Result<_>>()?;
    let completions = || {
        let operations = recorder.operations();
        operations.iter().filter(|operation| matches!(operation.reply(), Some(Reply::Marked { .. }))).count()
    };
    eventually("work is acknowledged", async || (completions() > 100).then_some(())).await;

    // In the middle of it.
    primary.kill()?;
    let promoted_at = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?;
    standby.promote().await?;
    let new = standby.url(database.name());
    // No failover loses a row like this: it shows whose word counts.
    execute(&new, "delete from payment_webhook_events where event_id like 'evt_forgotten%'").await?;
    let acknowledged = completions();
    let last = rows::of_postgres(&new).await?.events.values().map(|event| event.token).max().context("events")?;
    name.set_target(standby.address());
    name.reset();
    eventually("work goes on", async || (completions() > acknowledged + 50).then_some(())).await;
    stop.store(true, Relaxed);
    for worker in workers {
        worker.await?;
    }

    let operations = recorder.operations();
    let mut rows = rows::of_postgres(&new).await?;
    // Taken away by hand.
    rows.counts.clear();
    let effects = Default::default();
    let run =
        check::Run { operations: &operations, deliveries: &[], rows: &rows, effects: &effects, guard: Guard::Nothing };
    let violations = check::safety(&run);
    assert!(violations.is_empty(), "{}", check::explain(&violations, &run));
    let since: Vec<i64> = rows.events.values().map(|event| event.token).filter(|token| *token > last).collect();
    assert!(since.len() > 50);
    assert!(since.iter().all(|token| *token > promoted_at), "moved on to the present: {since:?}");

    for url in &urls {
        let mut caller = Caller::new(url, Recorder::default())?;
        let claim_id = "after";
        match caller.claim(forgotten, claim_id, None, Duration::ZERO).await {
            Some(Reply::Acquired { token, .. }) => assert!(token > promoted_at && token > before),
            other => panic!("the caches of the old primary are believed: {other:?}"),
        }
    }
    drop(programs);
    drop(primary);
    Ok(())
}
