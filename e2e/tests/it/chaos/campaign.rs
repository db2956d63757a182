//! A random load under random faults, from a seed: short here, long by `scripts/chaos`.

#![allow(clippy::print_stdout, reason = "a run says its seed and what it came to")]

use std::{env, str::FromStr, time::Duration};

use anyhow::Result;
use oncegate_e2e::chaos::{
    campaign::{self, Report},
    seed::Seed,
};

/// From so many runs without a guard on, and so many forgeries.
const LONG_RUNS: usize = 5;
const LONG_FORGERIES: u64 = 20;

fn given<T: FromStr>(name: &str, otherwise: T) -> T {
    match env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => otherwise,
    }
}

async fn runs(what: &str, run: impl AsyncFn(Seed, Duration) -> Result<Report>) -> Result<()> {
    let lasts = Duration::from_secs(given("CHAOS_SECONDS", 6));
    let mut seed = Seed::from_environment();
    let mut total = Report::default();
    for number in 1..=given("CHAOS_RUNS", 1_u64) {
        println!("{what}, run {number}: ONCEGATE_SEED={}", seed.0);
        let report = run(seed, lasts).await?;
        println!("{what}, run {number}: {report:?}");
        total.add(&report);
        seed = seed.next();
    }
    println!("{what}, in all: {total:#?}");
    // A run without faults, unknown outcomes or histories to check would show nothing.
    assert!(!total.faults.is_empty() && total.unknown > 0 && total.deliveries > 0, "{total:?}");
    assert!(total.linearizable > 10 && total.undecided * 50 <= total.linearizable, "{total:?}");
    // Over long campaigns, what only sometimes happens has happened: an application without a guard has had a second effect,
    // Redis has answered, and what was forged there was found.
    if total.unguarded >= LONG_RUNS {
        assert!(total.doubled > 0, "{total:?}");
    }
    if what == "postgres" && total.faults.get("redis forged").is_some_and(|count| *count >= LONG_FORGERIES) {
        assert!(total.redis_hits > 0 && total.redis_refused > 0, "{total:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_invariant_holds_on_postgres_under_random_faults() -> Result<()> {
    runs("postgres", campaign::on_postgres).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_invariant_holds_on_sqlite_while_its_process_is_killed() -> Result<()> {
    runs("sqlite", campaign::on_sqlite).await
}
