//! Every process killed under load, and nothing acknowledged lost (I5).

#![allow(clippy::print_stdout, reason = "a run says its seed and what it came to")]

use std::env;

use anyhow::{Context as _, Result};
use oncegate_e2e::chaos::{
    kill::{self, KILLS_OF_EACH, Report},
    seed::Seed,
};

/// Kills in one world: a new one begins with small histories again.
const KILLS_IN_A_ROUND: u64 = 50;

async fn kills(short: u64, kill: impl AsyncFn(Seed, u64) -> Result<Report>) -> Result<()> {
    let kills = match env::var("KILLS") {
        Ok(given) => given.parse().context("KILLS is no number")?,
        Err(_) => short,
    };
    let mut seed = Seed::from_environment();
    let mut left: u64 = kills;
    while left > 0 {
        let round = left.min(KILLS_IN_A_ROUND);
        println!("seed {}: {round} kills", seed.0);
        let report = kill(seed, round).await?;
        println!("seed {}: {report:?}", seed.0);
        assert_eq!(report.total(), round);
        assert!(report.linearizable > 10 && report.undecided * 50 <= report.linearizable, "{report:?}");
        assert!(report.answered > 0, "{report:?}");
        left -= round;
        seed = seed.next();
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_whatever_is_killed() -> Result<()> {
    kills(u64::try_from(KILLS_OF_EACH)?, async |seed, round| {
        let report = kill::run(seed, round).await?;
        // Each as often as the others, and none never.
        let (fewest, most) = (report.kills.values().min(), report.kills.values().max());
        let each = usize::try_from(round)? < KILLS_OF_EACH || report.kills.len() == KILLS_OF_EACH;
        assert!(each && most.zip(fewest).is_some_and(|(most, fewest)| most - fewest <= 1), "{report:?}");
        Ok(report)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_the_process_with_the_embedded_store_is_killed() -> Result<()> {
    kills(3, async |seed, round| kill::run_single(seed, round).await).await
}
