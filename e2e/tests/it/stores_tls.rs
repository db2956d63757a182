//! TLS to Postgres and to Redis, with real servers: who is believed to be the store, and what becomes of it otherwise.

use std::path::Path;

use anyhow::{Context as _, Result};
use oncegate_api::v1::Decision;
use oncegate_e2e::{
    certificates::{Authority, beginning_of},
    eventually,
    postgres::{Cluster, Database, Options},
    program::Oncegate,
    redis::Redis,
};
use sqlx::Connection as _;

use crate::{
    cases::{Sidecar, ask, claim, completion, metric},
    gateway_tls::end,
    setup::Ledger,
};

fn write(path: &Path, authority: &Authority) -> Result<String> {
    std::fs::write(path, authority.pem())?;
    Ok(path.to_string_lossy().into_owned())
}

/// Claims and completes an event.
async fn complete(sidecar: &Sidecar, event_id: &str) -> Result<()> {
    let client = sidecar.client().await?;
    let token = ask(&client, claim(event_id, "first")).await?.lock.context("the lock")?.fencing_token;
    client.clone().mark_completed(completion(event_id, token)).await?;
    Ok(())
}

async fn is_completed(sidecar: &Sidecar, event_id: &str) -> Result<()> {
    let answer = ask(&sidecar.client().await?, claim(event_id, "again")).await?;
    assert_eq!(answer.decision(), Decision::AlreadyCompleted);
    Ok(())
}

#[tokio::test]
async fn a_database_is_believed_only_with_a_certificate_of_its_authority() -> Result<()> {
    let (authority, stranger, directory) = (Authority::new()?, Authority::new()?, tempfile::tempdir()?);
    let ca = write(&directory.path().join("ca.pem"), &authority)?;
    let other = write(&directory.path().join("other.pem"), &stranger)?;
    let cluster = Cluster::start(Options { tls: Some(authority.server_until(2045)?), ..Options::default() }).await?;
    let database = cluster.database().await?;
    let verified = |ca: &str| format!("{}?sslmode=verify-full&sslrootcert={ca}", database.url());

    let sidecar = Sidecar::start_with(Ledger::Sqlite, |command| command.env("DATABASE_URL", verified(&ca))).await?;
    complete(&sidecar, "evt_1").await?;
    is_completed(&sidecar, "evt_1").await?;
    assert_eq!(database.query(&over_tls("NOT ssl")).await?, "0");
    assert_ne!(database.query(&over_tls("ssl")).await?, "0");
    // The authority's own, whose end nobody chose.
    assert!(end(sidecar.admin, "DATABASE_URL sslrootcert").await? > Some(beginning_of(2045)));

    refused(directory.path(), &verified(&other), "another authority's").await?;
    // With a certificate of the authority, for somebody else.
    cluster.replace_certificate(&authority.server_elsewhere()?).await?;
    eventually("the server shows the other certificate", async || {
        sqlx::PgConnection::connect(&verified(&ca)).await.err()
    })
    .await;
    refused(directory.path(), &verified(&ca), "another server's").await
}

/// How many connections of the program's there are.
fn over_tls(which: &str) -> String {
    format!(
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name LIKE 'oncegate%' AND {which}"
    )
}

/// Neither the service nor the migration uses it.
async fn refused(directory: &Path, url: &str, what: &str) -> Result<()> {
    for command in ["sidecar", "migrate"] {
        let finished = Oncegate::new(directory, [command])?
            .env("DATABASE_URL", url)
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .run()
            .await?;
        assert!(finished.code.is_some_and(|code| code != 0), "{what}: {finished}");
        assert!(finished.stderr.contains("certificate"), "{what}: {finished}");
    }
    Ok(())
}

#[tokio::test]
async fn redis_by_tls_is_used_and_one_of_another_authority_is_left_alone() -> Result<()> {
    let (authority, stranger, directory) = (Authority::new()?, Authority::new()?, tempfile::tempdir()?);
    let ca = write(&directory.path().join("ca.pem"), &authority)?;
    let other = write(&directory.path().join("other.pem"), &stranger)?;
    let own = authority.client("spiffe://test/sidecar", false)?.write(directory.path(), "own")?;
    let redis = Redis::start_with_tls(&authority.server()?, &authority).await?;
    let url = redis.tls_url().context("a server with TLS")?;
    let (certificate, key) = (own.certificate.to_string_lossy(), own.key.to_string_lossy());
    // Without a memory of its own: what is not in Redis is asked of the ledger.
    let sidecar = async |ca: &str, with_own: bool| {
        let ledger = Ledger::Postgres(Database::create().await?);
        Sidecar::start_with(ledger, |command| {
            let command = command.env("CACHE_SIZE", "0B").env("REDIS_URL", &url).env("REDIS_CA_FILE", ca);
            let command = command.env("ONCEGATE_LOG", "info,fred=debug");
            if !with_own {
                return command;
            }
            command.env("REDIS_CLIENT_CERT_FILE", &certificate).env("REDIS_CLIENT_KEY_FILE", &key)
        })
        .await
    };
    let hits = "oncegate_cache_lookups_total{layer=\"redis\",result=\"hit\"}";
    let skipped = "oncegate_cache_lookups_total{layer=\"redis\",result=\"skipped\"}";

    let trusting = sidecar(&ca, true).await?;
    complete(&trusting, "evt_1").await?;
    eventually("a duplicate is answered by Redis", async || {
        // Written again after each duplicate that the ledger had to answer.
        is_completed(&trusting, "evt_1").await.ok()?;
        (metric(&trusting, hits).await.ok()? > 0).then_some(())
    })
    .await;
    for setting in ["REDIS_CA_FILE", "REDIS_CLIENT_CERT_FILE"] {
        assert!(end(trusting.admin, setting).await? > Some(beginning_of(2045)), "{setting}");
    }
    let written = redis.command("DBSIZE").await?;

    // Redis that cannot be believed, or that does not believe the sidecar: the ledger decides, and nothing waits.
    for (what, ca, with_own) in [("another authority's", &other, true), ("no certificate of its own", &ca, false)] {
        let mut alone = sidecar(ca, with_own).await?;
        let refused = |line: &str| line.contains("fred") && line.to_lowercase().contains("certificate");
        alone.program.line_where("the handshake fails", refused).await?;
        complete(&alone, "evt_1").await?;
        eventually("Redis is left alone", async || {
            is_completed(&alone, "evt_1").await.ok()?;
            (metric(&alone, skipped).await.ok()? > 0).then_some(())
        })
        .await;
        assert_eq!(metric(&alone, hits).await?, 0, "{what}");
        assert_eq!(redis.command("DBSIZE").await?, written, "{what}");
        assert_eq!(alone.program.stop().await?.code, Some(0), "{what}");
    }
    Ok(())
}

#[tokio::test]
async fn certificates_for_a_redis_in_the_clear_are_a_problem() -> Result<()> {
    let (authority, directory) = (Authority::new()?, tempfile::tempdir()?);
    let ca = write(&directory.path().join("ca.pem"), &authority)?;
    let own = authority.client("spiffe://test/sidecar", false)?.write(directory.path(), "own")?;
    let (certificate, key) = (own.certificate.to_string_lossy(), own.key.to_string_lossy());
    let (plain, by_tls) = (("REDIS_URL", "redis://127.0.0.1:1"), ("REDIS_URL", "rediss://127.0.0.1:1"));
    for (settings, wanted) in [
        (vec![plain, ("REDIS_CA_FILE", &*ca)], "REDIS_CA_FILE: given, and Redis is not called by TLS"),
        (
            vec![("REDIS_HOST", "127.0.0.1"), ("REDIS_CA_FILE", &ca)],
            "REDIS_CA_FILE: given, and Redis is not called by TLS",
        ),
        (
            vec![plain, ("REDIS_CLIENT_CERT_FILE", &certificate), ("REDIS_CLIENT_KEY_FILE", &key)],
            "REDIS_CLIENT_CERT_FILE: given, and Redis is not called by TLS",
        ),
        (vec![by_tls, ("REDIS_CLIENT_CERT_FILE", &certificate)], "REDIS_CLIENT_KEY_FILE: missing"),
        (vec![by_tls, ("REDIS_CLIENT_KEY_FILE", &key)], "REDIS_CLIENT_CERT_FILE: missing"),
        (vec![by_tls, ("REDIS_CA_FILE", &key)], "there is no certificate in the file"),
        (vec![by_tls, ("REDIS_CA_FILE", "/nonexistent")], "cannot read /nonexistent"),
    ] {
        let mut command = Oncegate::new(directory.path(), ["sidecar"])?.env("DATABASE_URL", "postgres://127.0.0.1:1/x");
        for (name, value) in settings {
            command = command.env(name, value);
        }
        let finished = command.run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.stderr.contains(wanted), "{wanted}: {finished}");
    }
    Ok(())
}
