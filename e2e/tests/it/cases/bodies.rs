//! What a webhook says is for the application and for nobody else: no store, cache or log has it afterwards.

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    eventually,
    postgres::Database,
    program::{LOG_EVERYTHING, Oncegate},
    redis::Redis,
    secrets::Secrets,
    stripe,
    upstream::Answer,
};
use sqlx::{AssertSqlSafe, Connection as _};

use super::cache::{names, raw};
use crate::setup::{Everything, Ledger, SECRET, on_each_ledger, send_signed, word};

on_each_ledger!(a_webhooks_body_is_in_no_table_no_cache_and_no_log);

/// What bodies say, and headers, and the application's answers.
const BODY: &str = "4111-1111-1111-1111 of somebody";
const ANSWER: &str = "the application has booked this for somebody";

fn body(event_id: &str) -> Vec<u8> {
    let event = serde_json::json!({
        "id": event_id,
        "type": "charge.succeeded",
        "data": { "object": { "card": BODY, "amount": 4200 } },
    });
    event.to_string().into_bytes()
}

/// Every row of every table.
async fn rows(database: &Database) -> Result<String> {
    let mut connection = database.connect().await?;
    let tables: Vec<String> =
        sqlx::query_scalar("select tablename::text from pg_tables where schemaname = 'public' order by 1")
            .fetch_all(&mut connection)
            .await?;
    let mut text = String::new();
    for table in tables {
        let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!("select t::text from {table} t")))
            .fetch_all(&mut connection)
            .await?;
        text.push_str(&format!("{table}: {}\n", rows.join("\n")));
    }
    connection.close().await?;
    Ok(text)
}

async fn a_webhooks_body_is_in_no_table_no_cache_and_no_log(ledger: Ledger) -> Result<()> {
    let redis = Redis::start().await?;
    let cached = matches!(ledger, Ledger::Postgres(_));
    let mut everything = Everything::start_as(ledger, |command: Oncegate| {
        let command = command.env("ONCEGATE_LOG", LOG_EVERYTHING);
        // Without a memory of its own, so that duplicates lead to Redis.
        if cached { command.env("REDIS_URL", redis.url()).env("CACHE_SIZE", "0B") } else { command }
    })
    .await?;
    everything.upstream.answer_otherwise(Answer::ok().body(ANSWER));

    // Done, and again; failed; not an object; forged; with a signature that has it.
    let (done, failed) = (stripe::event_id(), stripe::event_id());
    assert_eq!(word(&everything.send(&body(&done)).await?), "200 processed");
    assert_eq!(word(&everything.send(&body(&done)).await?), "200 already_processed");
    everything.upstream.answer_next([Answer::status(500).body(ANSWER)]);
    assert_eq!(word(&everything.send(&body(&failed)).await?), "500 failed");
    let array = format!("[\"{BODY}\"]").into_bytes();
    assert_eq!(everything.send(&array).await?.status, 400);
    let forged = stripe::sign("whsec_of_somebody_else", &body(&failed));
    for signature in [forged, format!("t=1,v1={}", hex::encode(BODY)), stripe::sign(SECRET, b"another")] {
        assert_eq!(send_signed(everything.gateway, &signature, &body(&failed)).await?.status, 401);
    }
    let delivered = everything.upstream.requests();
    assert!(
        delivered.iter().all(|request| String::from_utf8_lossy(&request.body).contains(BODY)),
        "the application has it"
    );

    let mut told = String::new();
    if cached {
        let names = eventually("redis has the completion", async || {
            // Written again after each duplicate that the ledger had to answer.
            everything.send(&body(&done)).await.ok()?;
            names(&redis).await.ok().filter(|names| !names.is_empty())
        })
        .await;
        for name in names {
            let value = raw(&redis, &[b"GET", name.as_bytes()]).await?.unwrap_or_default();
            told.push_str(&format!("{name}: {} {}\n", String::from_utf8_lossy(&value), hex::encode(&value)));
        }
    }
    let ended = everything.program.stop().await?;
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(
        ended.stderr.contains("\"TRACE\"") && ended.stderr.contains("charge.succeeded"),
        "it has logged everything"
    );
    match everything.ledger() {
        Ledger::Postgres(database) => told.push_str(&rows(database).await?),
        Ledger::Sqlite => {
            for entry in std::fs::read_dir(everything.directory.path())? {
                let path = entry?.path();
                let content = std::fs::read(&path).with_context(|| path.display().to_string())?;
                told.push_str(&format!("{}: {}\n", path.display(), String::from_utf8_lossy(&content)));
            }
        }
    }
    for event in [done, failed] {
        assert!(told.contains(&event), "the store is where this test looks: {told}");
    }

    let mut secrets = Secrets::default();
    secrets.add(BODY);
    secrets.add(ANSWER);
    assert_eq!(secrets.told_in(&told), None);
    assert_eq!(secrets.told_in(&ended.to_string()), None);
    Ok(())
}
