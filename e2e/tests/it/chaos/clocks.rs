//! Pods whose clocks are ten minutes wrong, either way: the database's decides (S5, T11).

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use oncegate_e2e::chaos::{
    application::{Guard, Temper},
    client::Caller,
    history::Reply,
    world::World,
};

const SKEW: i64 = 600;

fn now_micros() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?)
}

#[tokio::test]
async fn clocks_of_pods_that_are_wrong_change_no_grant_and_no_expiry() -> Result<()> {
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
    }
    Ok(())
}
