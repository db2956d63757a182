//! The harness itself: what the other tests lean on does what it says.

use std::time::{Duration, Instant};

use anyhow::Result;
use oncegate_e2e::{
    eventually, http_client,
    postgres::{Cluster, Database, Options},
    redis::Redis,
    upstream::{Answer, Upstream, refused_url},
};
use sqlx::Connection as _;

#[tokio::test]
async fn databases_are_migrated_and_separate() -> Result<()> {
    let first = Database::create().await?;
    let second = Database::create().await?;
    assert_ne!(first.name(), second.name());
    for database in [&first, &second] {
        assert_eq!(database.query("SELECT count(*) FROM payment_webhook_events").await?, "0");
    }
    let empty = Database::create_empty().await?;
    assert_eq!(empty.query("to_regclass('payment_webhook_events')").await?, "");

    let name = first.name().to_owned();
    drop(first);
    let left = second.query(&format!("SELECT count(*) FROM pg_database WHERE datname = '{name}'")).await?;
    assert_eq!(left, "0");
    Ok(())
}

#[tokio::test]
async fn a_cluster_survives_being_killed_and_stopped() -> Result<()> {
    let settings = vec![("work_mem".to_owned(), "5MB".to_owned())];
    let mut cluster = Cluster::start(Options { fsync: true, settings, ..Options::default() }).await?;
    let url = cluster.url("postgres");
    let mut connection = sqlx::PgConnection::connect(&url).await?;
    let settings: Vec<String> =
        sqlx::query_scalar("SELECT setting FROM pg_settings WHERE name IN ('fsync', 'work_mem') ORDER BY name")
            .fetch_all(&mut connection)
            .await?;
    assert_eq!(settings, ["on", "5120"]);
    sqlx::query("CREATE TABLE kept (n int)").execute(&mut connection).await?;

    cluster.kill()?;
    eventually("the connection ends", async || {
        sqlx::query("SELECT 1").execute(&mut connection).await.is_err().then_some(())
    })
    .await;
    assert!(sqlx::PgConnection::connect(&url).await.is_err());
    cluster.restart().await?;
    assert_eq!(cluster.url("postgres"), url);
    let mut connection = sqlx::PgConnection::connect(&url).await?;
    sqlx::query("INSERT INTO kept VALUES (1)").execute(&mut connection).await?;

    cluster.stop()?;
    assert!(sqlx::query("SELECT 1").execute(&mut connection).await.is_err());
    cluster.restart().await?;
    let mut connection = sqlx::PgConnection::connect(&url).await?;
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM kept").fetch_one(&mut connection).await?;
    assert_eq!(kept, 1);
    Ok(())
}

#[tokio::test]
async fn redis_starts_freezes_and_stops() -> Result<()> {
    assert!(Redis::shared().await?.starts_with("redis"));

    let mut redis = Redis::start().await?;
    assert_eq!(redis.command("SET a 1").await?, "+OK");
    redis.freeze()?;
    let frozen = tokio::time::timeout(Duration::from_millis(200), redis.command("PING")).await;
    assert!(frozen.is_err(), "a frozen server says nothing");
    redis.thaw()?;
    assert_eq!(redis.command("PING").await?, "+PONG");

    redis.kill()?;
    assert!(redis.command("PING").await.is_err());
    redis.restart().await?;
    assert_eq!(redis.command("EXISTS a").await?, ":0");
    redis.stop()?;
    assert!(redis.command("PING").await.is_err());
    Ok(())
}

#[tokio::test]
async fn the_application_records_and_answers_as_told() -> Result<()> {
    let upstream = Upstream::start().await?;
    let address = upstream.address();
    upstream.answer_next([
        Answer::status(503).header("retry-after", "7").body("busy"),
        Answer::ok().after(Duration::from_millis(100)),
        Answer::reset(),
        Answer::ok().reset_in_body(),
    ]);

    let answer = http_client::post(address, "/payments?a=b", &[("x-one", "1")], "body").await?;
    assert_eq!((answer.status.as_u16(), answer.header("retry-after"), &answer.body[..]), (503, "7", &b"busy"[..]));
    let began = Instant::now();
    assert_eq!(http_client::post(address, "/", &[], "2").await?.status, 200);
    assert!(began.elapsed() >= Duration::from_millis(100));
    assert!(http_client::post(address, "/", &[], "3").await.is_err(), "reset before the answer");
    assert!(http_client::post(address, "/", &[], "4").await.is_err(), "reset in the body");
    assert_eq!(http_client::get(address, "/").await?.status, 200, "what is not scripted is answered as usual");

    upstream.answer_otherwise(Answer::ok().hang_in_body());
    let hung = tokio::time::timeout(Duration::from_millis(200), http_client::post(address, "/", &[], "6")).await;
    assert!(hung.is_err(), "the rest of the body never comes");

    let requests = upstream.wait_for(6).await;
    assert_eq!(requests.len(), 6);
    assert_eq!((requests[0].header("x-one"), requests[0].uri.to_string().as_str()), ("1", "/payments?a=b"));
    assert_eq!(&requests[3].body[..], b"4");
    assert!(requests.is_sorted_by_key(|request| request.at));

    let refused = refused_url()?;
    let refused = refused.strip_prefix("http://").and_then(|url| url.split('/').next()).unwrap_or_default();
    assert!(http_client::get(refused.parse()?, "/").await.is_err());
    Ok(())
}
