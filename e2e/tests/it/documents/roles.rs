//! The roles of the stores, as docs/operations.md makes them: the one that takes payments can do all that a sidecar does with
//! the database, and can change no table; the one for Redis can do what a cache does.

use anyhow::{Context as _, Result};
use oncegate_api::v1::{
    CheckAndLockRequest, Decision, EventKey, HistoryRequest, MarkCompletedRequest, MarkFailedRequest, StatsRequest,
    idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::{
    eventually, http_client,
    postgres::{Cluster, Database, Options},
    program::{Finished, Oncegate, Running},
    redis::Redis,
};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use tonic::transport::Channel;

use super::{code_blocks, root};
use crate::{
    cases::{self, Sidecar, ask, completion, metric, replay},
    setup::Ledger,
};

struct Blocks {
    roles: String,
    schema: String,
    before: String,
    afterwards: String,
}

fn blocks() -> Result<Blocks> {
    let text = std::fs::read_to_string(root().join("docs/operations.md"))?;
    // In a list, so that it is indented.
    let [roles, schema, before, afterwards] = code_blocks(&text, "sql")[..] else {
        anyhow::bail!("docs/operations.md has other blocks than this test knows");
    };
    let [roles, schema, before, afterwards] = [roles, schema, before, afterwards].map(str::to_owned);
    Ok(Blocks { roles, schema, before, afterwards })
}

async fn run(url: &str, sql: &str) -> Result<()> {
    let mut connection = PgConnection::connect(url).await?;
    // One by one: a database is not made within a transaction.
    for statement in sql.split(';').filter(|statement| !statement.trim().is_empty()) {
        connection.execute(AssertSqlSafe(statement.to_owned())).await.with_context(|| statement.to_owned())?;
    }
    Ok(connection.close().await?)
}

struct World {
    cluster: Cluster,
    directory: tempfile::TempDir,
}

impl World {
    fn url(&self, role: &str) -> String {
        self.cluster.url("payments").replacen("postgres@", &format!("{role}@"), 1)
    }

    async fn oncegate(&self, role: &str, arguments: &[&str]) -> Result<Finished> {
        let command = Oncegate::new(self.directory.path(), arguments.iter().copied())?;
        let finished = command.env("DATABASE_URL", self.url(role)).run().await?;
        anyhow::ensure!(finished.code == Some(0), "{finished}");
        Ok(finished)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_payments_needs_no_more_than_it_is_granted_before_the_tables_are_made() -> Result<()> {
    let blocks = blocks()?;
    let world = World { cluster: Cluster::start(Options::default()).await?, directory: tempfile::tempdir()? };
    run(&world.cluster.url("postgres"), &blocks.roles).await?;
    run(&world.url("oncegate_owner"), &blocks.before).await?;
    world.oncegate("oncegate_owner", &["migrate"]).await?;
    the_role_is_enough(&world).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_payments_needs_no_more_than_it_is_granted_in_the_applications_database() -> Result<()> {
    let blocks = blocks()?;
    let world = World { cluster: Cluster::start(Options::default()).await?, directory: tempfile::tempdir()? };
    let (roles, database) = blocks.roles.rsplit_once("create database").context("a database is made last")?;
    assert_eq!(database.trim(), "payments owner oncegate_owner;");
    run(&world.cluster.url("postgres"), roles).await?;
    run(&world.cluster.url("postgres"), "create role shop login; create database payments owner shop").await?;
    // As where nobody else is let in.
    run(&world.url("shop"), "revoke all on schema public from public").await?;
    run(&world.url("shop"), &blocks.schema).await?;
    run(&world.url("oncegate_owner"), &blocks.before).await?;
    world.oncegate("oncegate_owner", &["migrate"]).await?;
    the_role_is_enough(&world).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_payments_needs_no_more_than_it_is_granted_on_tables_that_are_there() -> Result<()> {
    let blocks = blocks()?;
    let world = World { cluster: Cluster::start(Options::default()).await?, directory: tempfile::tempdir()? };
    run(&world.cluster.url("postgres"), &blocks.roles).await?;
    world.oncegate("oncegate_owner", &["migrate"]).await?;
    run(&world.url("oncegate_owner"), &blocks.afterwards).await?;
    the_role_is_enough(&world).await
}

fn claim(event_id: &str) -> CheckAndLockRequest {
    let key = EventKey { provider: "stripe".into(), event_id: event_id.into(), ..Default::default() };
    CheckAndLockRequest { key: Some(key), event_type: "charge.succeeded".into(), ..Default::default() }
}

/// Claims an event, which is granted.
async fn acquire(
    client: &mut IdempotencyServiceClient<Channel>,
    request: CheckAndLockRequest,
) -> Result<(i64, String)> {
    let granted = client.check_and_lock(request).await?.into_inner();
    assert_eq!(granted.decision(), Decision::Acquired);
    let lock = granted.lock.context("a lock")?;
    Ok((lock.fencing_token, lock.claim_id))
}

/// Everything that a sidecar does to its tables, once.
async fn the_role_is_enough(world: &World) -> Result<()> {
    // The first connection to a database moves the sequence, too.
    let start = || -> Result<Running> {
        let command = Oncegate::new(world.directory.path(), ["sidecar"])?.env("DATABASE_URL", world.url("oncegate"));
        command.env("SIDECAR_LISTEN", "127.0.0.1:0").env("ADMIN_LISTEN", "127.0.0.1:0").start()
    };
    let mut sidecar = start()?;
    let url = format!("http://{}", sidecar.address("sidecar").await?);
    let mut client = IdempotencyServiceClient::connect(url.clone()).await?;

    // One attempt; duplicates, one of them with a delivery id; a failed attempt and a second one; an operator's decision.
    let (fencing_token, claim_id) = acquire(&mut client, claim("evt_1")).await?;
    let key = claim("evt_1").key;
    client.mark_completed(MarkCompletedRequest { key, fencing_token, claim_id, ..Default::default() }).await?;
    for delivery_id in ["", "delivery_1"] {
        let again = CheckAndLockRequest {
            delivery_id: delivery_id.into(),
            payload_digest: vec![1; 32].into(),
            ..claim("evt_1")
        };
        let known = client.check_and_lock(again).await?.into_inner();
        assert_eq!(known.decision(), Decision::AlreadyCompleted);
    }
    let (fencing_token, claim_id) = acquire(&mut client, claim("evt_2")).await?;
    let key = claim("evt_2").key;
    client.mark_failed(MarkFailedRequest { key, fencing_token, claim_id, ..Default::default() }).await?;
    let (fencing_token, claim_id) = acquire(&mut client, claim("evt_2")).await?;
    let key = claim("evt_2").key;
    client.mark_completed(MarkCompletedRequest { key, fencing_token, claim_id, ..Default::default() }).await?;
    let replay =
        ["resolve", "stripe", "evt_2", "--to", "pending", "--force", "--yes", "--reason", "a test", "--sidecar", &url];
    world.oncegate("oncegate", &replay).await?;
    acquire(&mut client, claim("evt_3")).await?;
    client.history(HistoryRequest::default()).await?;
    client.stats(StatsRequest::default()).await?;

    // What is written later, and in the background.
    let mut observer = PgConnection::connect(&world.cluster.url("payments")).await?;
    for sql in [
        "select duplicate_count > 0 from payment_webhook_events where event_id = 'evt_1'",
        "select count(*) > 0 from payment_webhook_timings",
        "select count(*) > 0 from payment_webhook_deliveries",
        "select count(*) > 0 from payment_webhook_resolutions",
        // What has been processing for some seconds.
        "select count(*) > 0 from payment_webhook_open o join payment_webhook_events e on e.id = o.event_row \
         where e.event_id = 'evt_3'",
    ] {
        eventually(sql, async || {
            let held: bool = sqlx::query_scalar(sql).fetch_one(&mut observer).await.ok()?;
            held.then_some(())
        })
        .await;
    }
    no_statement_failed(&mut sidecar).await?;
    world.oncegate("oncegate", &["check"]).await?;

    // An old event goes, with all that belongs to it.
    let mut sidecar = start()?;
    let url = format!("http://{}", sidecar.address("sidecar").await?);
    sqlx::query(
        "update payment_webhook_events set create_time = create_time - interval '40 days', \
         end_time = end_time - interval '40 days' where event_id = 'evt_1'",
    )
    .execute(&mut observer)
    .await?;
    let cleaned = world.oncegate("oncegate", &["cleanup", "--days", "30", "--json", "--sidecar", &url]).await?;
    let cleaned: serde_json::Value = serde_json::from_str(&cleaned.stdout)?;
    assert_eq!(cleaned["deleted"], 1, "{cleaned}");
    no_statement_failed(&mut sidecar).await?;

    // And nothing else.
    let mut connection = PgConnection::connect(&world.url("oncegate")).await?;
    for sql in [
        "create table mine ()",
        "drop table payment_webhook_events",
        "alter table payment_webhook_events add column mine integer",
        "truncate payment_webhook_events",
        "alter sequence oncegate_fencing_token restart with 1",
        "create index on payment_webhook_events (state)",
    ] {
        let refused = connection.execute(sql).await.err().with_context(|| sql.to_owned())?;
        let code = refused.as_database_error().and_then(|error| error.code().map(|code| code.into_owned()));
        assert_eq!(code.as_deref(), Some("42501"), "{sql}: {refused}");
    }
    Ok(())
}

/// Ends a sidecar, to which the database has refused nothing.
async fn no_statement_failed(sidecar: &mut Running) -> Result<()> {
    let admin = sidecar.address("admin").await?;
    let page = String::from_utf8(http_client::get(admin, "/metrics").await?.body.to_vec())?;
    for kind in ["defect", "bad_item", "refusing"] {
        let row = format!("oncegate_ledger_failures_total{{kind=\"{kind}\"}} 0");
        assert!(page.lines().any(|line| line == row), "{row}\n{}", sidecar.output());
    }
    let finished = sidecar.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(!finished.stderr.contains("permission denied"), "{finished}");
    Ok(())
}

#[tokio::test]
async fn a_cache_needs_no_more_of_redis_than_it_is_granted() -> Result<()> {
    let text = std::fs::read_to_string(root().join("docs/operations.md"))?;
    let [grant] = code_blocks(&text, "redis")[..] else { anyhow::bail!("one user is made") };
    let password = grant.split('>').nth(1).and_then(|rest| rest.split(' ').next()).context("a password")?;
    let redis = Redis::start().await?;
    assert_eq!(redis.command(grant.trim()).await?, "+OK");
    let url = redis.url().replacen("redis://", &format!("redis://oncegate:{password}@"), 1);
    let ledger = Ledger::Postgres(Database::create().await?);
    let sidecar = Sidecar::start_with(ledger, |command| command.env("CACHE_SIZE", "0B").env("REDIS_URL", url)).await?;
    let client = sidecar.client().await?;
    let token = ask(&client, cases::claim("evt_1", "first")).await?.lock.context("the lock")?.fencing_token;
    client.clone().mark_completed(completion("evt_1", token)).await?;
    let hits = async || metric(&sidecar, "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}").await;
    let asked_again = async || {
        ask(&client, cases::claim("evt_1", "again")).await.ok()?;
        hits().await.ok().filter(|hits| *hits > 0)
    };
    eventually("a duplicate is answered by Redis", asked_again).await;
    client.clone().resolve(replay("evt_1")).await?;
    assert_eq!(ask(&client, cases::claim("evt_1", "after")).await?.decision(), Decision::Acquired);
    // Nothing that it tried was refused.
    assert_eq!(redis.command("ACL LOG").await?, "*0");
    Ok(())
}
