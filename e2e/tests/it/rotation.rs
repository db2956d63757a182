//! Another role, or another password, for the database: what `DATABASE_URL_FILE` leads to is read again for new connections.

use std::fs;

use anyhow::{Context as _, Result};
use oncegate_e2e::{eventually, http_client::get, postgres::Database, stripe};
use sqlx::AssertSqlSafe;

use crate::setup::{Everything, Ledger, word};

/// The metric's row, as the admin listener has it.
async fn has(everything: &Everything, row: &str) -> Result<bool> {
    let page = get(everything.admin, "/metrics").await?.body;
    Ok(String::from_utf8_lossy(&page).lines().any(|line| line == row))
}

#[tokio::test]
async fn the_database_is_asked_as_another_role_once_the_file_names_it() -> Result<()> {
    let database = Database::create().await?;
    let (first, second) = (format!("{}_first", database.name()), format!("{}_second", database.name()));
    // Roles are the whole server's, and go with it.
    let mut operator = database.connect().await?;
    let both = format!("create role {first} login superuser; create role {second} login superuser");
    sqlx::raw_sql(AssertSqlSafe(both)).execute(&mut operator).await?;
    let url = |role: &str| database.url().replacen("postgres://postgres@", &format!("postgres://{role}@"), 1);
    assert_ne!(url(&first), database.url());
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), url(&first))?;
    let path = file.path().to_str().expect("a temporary directory's name is text").to_owned();
    let everything = Everything::start_as(Ledger::Sqlite, |command| {
        command.env("DATABASE_URL_FILE", path).env("ONCEGATE_MIGRATE", "true").env("SIDECAR_ACCESS_RELOAD", "50ms")
    })
    .await?;
    assert_eq!(word(&everything.send(&stripe::event("evt_before", "charge.succeeded")).await?), "200 processed");
    let sessions = async |role: &str| {
        database.query(&format!("select count(*) from pg_stat_activity where usename = '{role}'")).await
    };
    assert_ne!(sessions(&first).await?, "0");

    // What leads to another database is not taken up: nobody has looked at that one.
    let another = url(&second).strip_suffix(database.name()).map(|server| format!("{server}postgres"));
    fs::write(file.path(), another.context("the database's name ends its URL")?)?;
    eventually("the file is refused", async || {
        has(&everything, "oncegate_sidecar_reload_failing{files=\"database\"} 1").await.ok()?.then_some(())
    })
    .await;
    fs::write(file.path(), url(&second))?;
    eventually("the file is taken up", async || {
        let replaced = "oncegate_sidecar_reloads_total{files=\"database\",result=\"replaced\"} 1";
        let failing = "oncegate_sidecar_reload_failing{files=\"database\"} 0";
        (has(&everything, replaced).await.ok()? && has(&everything, failing).await.ok()?).then_some(())
    })
    .await;
    // As if its password had been changed: open connections end some time, and no new one is made.
    let revoked = format!(
        "alter role {first} nologin;
        select pg_terminate_backend(pid) from pg_stat_activity where usename = '{first}'"
    );
    sqlx::raw_sql(AssertSqlSafe(revoked)).execute(&mut operator).await?;

    let after = stripe::event("evt_after", "charge.succeeded");
    eventually("webhooks are processed again", async || {
        let answer = everything.send(&after).await.ok()?;
        matches!(word(&answer).as_str(), "200 processed" | "200 already_processed").then_some(())
    })
    .await;
    // What is only read, too.
    eventually("events can be listed", async || everything.history("evt_after").await.ok().flatten()).await;
    assert_eq!(sessions(&first).await?, "0");
    assert_ne!(sessions(&second).await?, "0");
    Ok(())
}
