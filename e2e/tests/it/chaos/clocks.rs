//! Pods whose clocks are ten minutes wrong, either way: the database's decides (S5, T11).

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{CleanupRequest, idempotency_service_client::IdempotencyServiceClient};
use oncegate_e2e::{
    chaos::{
        application::{Guard, Temper},
        client::Caller,
        history::{Ending, Recorder, Reply},
        world::World,
    },
    clock,
    postgres::Database,
    program::Oncegate,
};

const SKEW: i64 = 600;

fn now_micros() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?)
}

#[tokio::test]
async fn clocks_of_pods_that_are_wrong_change_no_grant_no_expiry_and_no_pause() -> Result<()> {
    let mut world = World::start(2, Guard::EventId, Temper::Reliable).await?;
    for (number, skew) in [(0, SKEW), (1, -SKEW)] {
        world.sidecars[number].skew = skew;
        world.start_sidecar(number).await?;
        // Their clocks are wrong indeed.
        let program = world.sidecars[number].program.as_mut().context("a sidecar")?;
        let line = program.line_where("a line with a time", |line| line.contains("sidecar listening")).await?;
        let line: serde_json::Value = serde_json::from_str(&line)?;
        let logged: prost_types::Timestamp = line["timestamp"].as_str().context("a timestamp")?.parse()?;
        let off = logged.seconds - now_micros()? / 1_000_000;
        assert!((off - skew).abs() < 60, "{off} s");
    }
    let mut callers = Vec::new();
    for url in world.sidecar_urls() {
        callers.push(Caller::new(&url, world.recorder.clone())?);
    }
    let lock = Duration::from_secs(2);
    for (holder, other) in [(0, 1), (1, 0)] {
        let event = format!("evt_{holder}");
        let asked = Instant::now();
        let before = now_micros()?;
        let Some(Reply::Acquired { token, expires, .. }) =
            callers[holder].claim(&event, "first", Some(lock), Duration::ZERO).await
        else {
            anyhow::bail!("the first claim is granted");
        };
        let granted = expires - i64::try_from(lock.as_micros())?;
        assert!((before..=now_micros()?).contains(&granted), "granted in the database's time");
        assert_eq!(callers[other].claim(&event, "second", Some(lock), Duration::ZERO).await, Some(Reply::InProgress));
        // Waits for the end of the lock, and not for ten minutes more or less.
        let taken = callers[other].claim(&event, "second", Some(lock), Duration::from_secs(15)).await;
        let Some(Reply::Acquired { token: later, .. }) = taken else {
            anyhow::bail!("not taken over: {taken:?}");
        };
        assert!(asked.elapsed() >= lock, "not before it had expired");
        assert!(later > token);

        // ExtendLock: from the database's now.
        let before = now_micros()?;
        let longer = Duration::from_secs(7);
        let Some(Reply::Extended { expires }) = callers[other].extend(&event, "second", later, longer).await else {
            anyhow::bail!("the lock is extended");
        };
        let extended = expires - i64::try_from(longer.as_micros())?;
        assert!((before..=now_micros()?).contains(&extended), "extended in the database's time");

        // retry_after: the pause is waited for, and not ten minutes more or less.
        let (failed, pause) = (Instant::now(), Duration::from_secs(2));
        let marked = callers[other].mark(&event, "second", later, Ending::Retryable, pause).await;
        assert_eq!(marked, Some(Reply::Marked { repeated: false }));
        let early = callers[holder].claim(&event, "third", Some(lock), Duration::ZERO).await;
        assert_eq!(early, Some(Reply::InProgress));
        let again = callers[holder].claim(&event, "third", Some(lock), Duration::from_secs(15)).await;
        assert!(matches!(again, Some(Reply::Acquired { .. })), "{again:?}");
        assert!(failed.elapsed() >= pause, "not before the pause had passed");
    }
    Ok(())
}

/// Cleanup's cut-off is the database's now, less the age that was asked for: a pod ahead of it deletes nothing that is
/// younger, and one behind it deletes what is that old.
#[tokio::test]
async fn clocks_of_pods_that_are_wrong_make_nothing_older_or_younger() -> Result<()> {
    let database = Database::create().await?;
    let directory = tempfile::tempdir()?;
    // Twice as far as the youngest that a Cleanup may be asked to delete is old.
    const HOUR: prost_types::Duration = prost_types::Duration { seconds: 3_600, nanos: 0 };
    for skew in [2 * HOUR.seconds, -2 * HOUR.seconds] {
        let command = Oncegate::new(directory.path(), ["sidecar"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("RETENTION_MIN", "1h")
            .env("DATABASE_URL", database.url());
        let mut program = clock::skewed(command, skew)?.start()?;
        let url = format!("http://{}", program.address("sidecar").await?);
        let event = format!("evt_{}", skew > 0);
        let mut caller = Caller::new(&url, Recorder::default())?;
        let claimed = caller.claim(&event, "claim", None, Duration::ZERO).await;
        let Some(Reply::Acquired { token, .. }) = claimed else { anyhow::bail!("{claimed:?}") };
        let marked = caller.mark(&event, "claim", token, Ending::Completed, Duration::ZERO).await;
        assert_eq!(marked, Some(Reply::Marked { repeated: false }));
        let mut client = IdempotencyServiceClient::connect(url).await?;
        // It has just ended, and then an hour and a half ago.
        for deleted in [0, 1] {
            let request = CleanupRequest { older_than: Some(HOUR), ..Default::default() };
            let mut stream = client.cleanup(request).await?.into_inner();
            let mut last = None;
            while let Some(totals) = stream.message().await? {
                last = Some(totals);
            }
            let totals = last.context("totals")?;
            assert!(totals.done && totals.deleted_count == deleted, "{skew} s: {totals:?}");
            let mut admin = database.connect().await?;
            let older = "update payment_webhook_events set create_time = create_time - interval '90 minutes',
                update_time = update_time - interval '90 minutes', end_time = end_time - interval '90 minutes',
                start_time = start_time - interval '90 minutes'";
            sqlx::raw_sql(older).execute(&mut admin).await?;
        }
    }
    Ok(())
}
