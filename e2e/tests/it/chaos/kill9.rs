//! Every process killed under load, and nothing acknowledged lost (I5).

#![allow(clippy::print_stdout, reason = "a run says its seed and what it came to")]

use std::env;

use anyhow::{Context as _, Result};
use oncegate_e2e::chaos::{kill, seed::Seed};

/// Kills in one world: a new one begins with small histories again.
const KILLS_IN_A_ROUND: u64 = 50;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_whatever_is_killed() -> Result<()> {
    let kills = match env::var("KILLS") {
        Ok(given) => given.parse().context("KILLS is no number")?,
        Err(_) => 6,
    };
    let mut seed = Seed::from_environment();
    let mut left: u64 = kills;
    while left > 0 {
        let round = left.min(KILLS_IN_A_ROUND);
        println!("seed {}: {round} kills", seed.0);
        let report = kill::run(seed, round).await?;
        println!("seed {}: {report:?}", seed.0);
        assert_eq!(report.total(), round);
        left -= round;
        seed = seed.next();
    }
    Ok(())
}
