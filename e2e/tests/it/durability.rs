//! What an acknowledged completion survives is told by the store's settings (I5): in readiness and in the log, and it
//! never makes the service unready.

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    DEADLINE, eventually,
    eventually::within,
    http_client,
    postgres::{Cluster, Options},
    stripe,
};
use sqlx::{AssertSqlSafe, PgConnection};

use crate::setup::{Everything, Ledger, word};

async fn ready(everything: &Everything) -> String {
    eventually("it is ready", async || {
        let answer = http_client::get(everything.admin, "/readyz").await.ok()?;
        (answer.status == 200).then(|| String::from_utf8_lossy(&answer.body).into_owned())
    })
    .await
}

async fn run(connection: &mut PgConnection, sql: String) -> Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
    Ok(())
}

#[tokio::test]
async fn the_embedded_store_says_that_it_syncs_every_commit() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let body = ready(&everything).await;
    assert_eq!(
        body,
        "ready\njournal_mode: wal\nsynchronous: full\nan acknowledged completion survives: a crash of a process, a crash of \
         the store's machine\n"
    );
    Ok(())
}

#[tokio::test]
async fn settings_that_lose_completions_are_told_and_do_not_make_it_unready() -> Result<()> {
    let settings = [("synchronous_commit", "off"), ("full_page_writes", "off")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let cluster = Cluster::start(Options { fsync: false, settings, ..Options::default() }).await?;
    let mut everything = Everything::start(Ledger::Postgres(cluster.database().await?)).await?;
    let body = ready(&everything).await;
    for line in [
        "ready",
        "synchronous_commit: on (raised from off for the ledger's connection)",
        "fsync: off",
        "full_page_writes: off",
        "synchronous_standby_names: none",
        "standbys: none",
        "an acknowledged completion survives: a crash of a process",
    ] {
        assert!(body.lines().any(|found| found == line), "{line}\n{body}");
    }
    for warning in ["fsync is off", "full_page_writes is off", "synchronous_commit is off"] {
        assert!(body.lines().any(|line| line.starts_with(&format!("warning: {warning}"))), "{warning}\n{body}");
        let is_warning = |line: &str| line.contains("\"WARN\"") && line.contains(warning);
        everything.program.line_where(&format!("the log warns that {warning}"), is_warning).await?;
    }
    let event = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&everything.send(&event).await?), "200 processed");
    Ok(())
}

#[tokio::test]
async fn a_store_that_is_away_is_said_to_be_and_a_standby_that_is_missed_is_named() -> Result<()> {
    let mut cluster = Cluster::start(Options { fsync: true, ..Options::default() }).await?;
    let everything = Everything::start(Ledger::Postgres(cluster.database().await?)).await?;
    let body = ready(&everything).await;
    assert!(body.ends_with("survives: a crash of a process, a crash of the store's machine\n"), "{body}");

    // Nothing is asked of the ledger meanwhile but by the watch behind health, which is what notices.
    cluster.kill()?;
    eventually("the page says that the store is away, and is there", async || {
        let body = ready(&everything).await;
        // What notices is the next statement.
        let _ = everything.events().await;
        let event = stripe::event(&stripe::event_id(), "charge.succeeded");
        assert_eq!(everything.send(&event).await.ok()?.status, 503);
        (body == "ready\nthe store is not connected\n").then_some(())
    })
    .await;
    cluster.restart().await?;
    eventually("the store is used again", async || {
        let event = stripe::event(&stripe::event_id(), "charge.succeeded");
        (everything.send(&event).await.ok()?.status == 200).then_some(())
    })
    .await;

    // Nothing here writes what would have to be replicated.
    let mut admin = <PgConnection as sqlx::Connection>::connect(&cluster.url("postgres")).await?;
    run(&mut admin, "alter system set synchronous_standby_names = 'elsewhere'".into()).await?;
    run(&mut admin, "select pg_reload_conf()".into()).await?;
    run(
        &mut admin,
        "select pg_terminate_backend(pid) from pg_stat_activity where datname like 'oncegate%' and pid <> pg_backend_pid()"
            .into(),
    )
    .await?;
    let told = within(DEADLINE, async || {
        let body = ready(&everything).await;
        body.contains("synchronous_standby_names: elsewhere").then_some(body)
    })
    .await;
    // Waits for the standby in vain.
    let event = stripe::event(&stripe::event_id(), "charge.succeeded");
    let sent = everything.send(&event).await.map(|answer| answer.status.as_u16());
    // A server that has been started anew needs a commit before it is used: it waits in vain, and that is said.
    drop(admin);
    cluster.stop()?;
    cluster.restart().await?;
    let missed = within(DEADLINE, async || {
        let _ = everything.events().await;
        let body = ready(&everything).await;
        body.contains("the store is not connected: synchronous_standby_names names standbys").then_some(())
    })
    .await;
    let mut admin = <PgConnection as sqlx::Connection>::connect(&cluster.url("postgres")).await?;
    // First, so that whatever comes of it the database can be dropped.
    run(&mut admin, "alter system reset synchronous_standby_names".into()).await?;
    run(&mut admin, "select pg_reload_conf()".into()).await?;
    missed.context("what is missed is said")?;
    let body = told.context("what the new connection says")?;
    assert_eq!(sent?, 503, "I5: without the standby nothing is acknowledged");
    assert!(
        body.contains("\nwarning: synchronous_standby_names names standbys and none of them is connected"),
        "{body}"
    );
    assert!(body.contains("a crash of the store's machine, the loss of the store's node\n"), "{body}");
    eventually("the event is processed", async || {
        matches!(word(&everything.send(&event).await.ok()?).as_str(), "200 processed" | "200 already_processed")
            .then_some(())
    })
    .await;
    Ok(())
}
