//! What the sidecar does over gRPC: cycles, duplicates, storms, and the plans that Postgres might choose.

use anyhow::Result;

use super::{Bench, count};
use crate::world::{EMBEDDED, Loaded};

/// Settings under which no duplicate is answered from the process itself.
const NO_OWN_CACHE: (&str, &str) = ("CACHE_SIZE", "0B");

/// Two applications with a channel each, as at c=64. The cost of having more is in docs/performance.md.
const TWO_CONNECTIONS: [&str; 2] = ["--connections", "2"];

impl Bench<'_> {
    /// P1, P2, P3, E1.
    pub(super) fn cycles(&mut self) -> Result<()> {
        let world = self.world;
        world.prepare_pgbench()?;
        world.postgres.create("cycles")?;
        let sidecar = world.sidecar("cycles", &[])?;
        let cycle = |concurrency| world.rate(&sidecar, "cycle", concurrency, &[]);
        // Both sides get tables that have been written to for a while.
        cycle(64)?;
        world.pgbench(64)?;
        if self.wants("P1") || self.wants("P2") {
            let values = self.alternate(&mut [
                ("cycle c=64", Box::new(|| cycle(64))),
                ("pgbench c=64", Box::new(|| Ok(world.pgbench(64)?.0))),
                ("cycle c=256", Box::new(|| world.rate(&sidecar, "cycle", 256, &TWO_CONNECTIONS))),
            ])?;
            self.ratio("P1", values[0], values[1], "/s");
            self.ratio("P2", values[2], values[1], "/s");
        }
        if self.wants("E1") {
            let embedded = world.sidecar("", &EMBEDDED)?;
            let embedded_cycle = || world.rate(&embedded, "cycle", 64, &[]);
            embedded_cycle()?;
            let values = self.alternate(&mut [
                ("embedded store c=64", Box::new(embedded_cycle)),
                ("cycle c=64", Box::new(|| cycle(64))),
            ])?;
            self.ratio("E1", values[0], values[1], "/s");
        }
        if self.wants("P3") {
            let values = self.alternate(&mut [
                ("cycle c=16", Box::new(|| cycle(16))),
                ("pgbench c=16", Box::new(|| Ok(world.pgbench(16)?.0))),
                ("cycle c=1, p50 ms", Box::new(|| Ok(world.load(&sidecar, "cycle", 1, &[])?.main.p50_ms))),
                ("pgbench c=1, mean ms", Box::new(|| Ok(world.pgbench(1)?.1))),
            ])?;
            self.ratio("P3a", values[0], values[1], "/s");
            self.ratio("P3b", values[2], values[3], "ms");
        }
        Ok(())
    }

    /// P4, P5, P6.
    pub(super) fn duplicates(&mut self) -> Result<()> {
        let world = self.world;
        world.postgres.create("duplicates")?;
        let bare = world.bare("bare-tonic")?;
        let nobody = format!("redis://{}", crate::process::free_address()?);
        let cached = world.sidecar("duplicates", &[])?;
        let redis = world.sidecar("duplicates", &[NO_OWN_CACHE])?;
        let alone = world.sidecar("duplicates", &[NO_OWN_CACHE, ("REDIS_URL", &nobody)])?;
        let duplicates = |server| world.rate(server, "duplicates", 64, &[]);
        let values = self.alternate(&mut [
            ("own cache c=64", Box::new(|| duplicates(&cached))),
            ("bare tonic c=64", Box::new(|| world.bare_rate(&bare, 64, "grpc"))),
            ("redis GET c=64", Box::new(|| world.redis_get(64))),
            ("from Redis c=64", Box::new(|| duplicates(&redis))),
            ("Redis down c=64", Box::new(|| duplicates(&alone))),
        ])?;
        self.ratio("P4a", values[0], values[1], "/s");
        self.ratio("P4b", values[0], values[2], "/s");
        self.ratio("P5", values[3], values[1], "/s");
        self.ratio("P6", values[4], values[1], "/s");
        Ok(())
    }

    /// P13.
    pub(super) fn storms(&mut self) -> Result<()> {
        self.world.postgres.create("storms")?;
        let sidecar = self.world.sidecar("storms", &[])?;
        let runs: Vec<Loaded> = (0..self.world.options.runs)
            .map(|_| self.world.load(&sidecar, "storm", 100, &[]))
            .collect::<Result<_>>()?;
        let wrong: u64 = runs.iter().map(|run| run.storms.1).sum();
        let p99: Vec<f64> = runs.iter().map(|run| run.main.p99_ms).collect();
        self.keep("P13a", wrong as f64, None, "", count(&p99));
        self.keep_median("P13b", &p99);
        Ok(())
    }

    /// P14: the plans that Postgres makes before it has statistics of the table, and when these are out
    /// of date.
    pub(super) fn plans(&mut self) -> Result<()> {
        let world = self.world;
        world.postgres.create("warm")?;
        let warm = world.sidecar("warm", &[])?;
        world.rate(&warm, "cycle", 64, &[])?;
        world.postgres.sql("warm", "vacuum analyze")?;
        let fresh = || {
            world.postgres.create("fresh")?;
            let sidecar = world.sidecar("fresh", &[])?;
            world.rate(&sidecar, "cycle", 64, &[])
        };
        let backlog = || {
            world.postgres.create("backlog")?;
            let sidecar = world.sidecar("backlog", &[])?;
            world.rate(&sidecar, "cycle", 64, &[])?;
            world.postgres.sql("backlog", "vacuum analyze")?;
            // Its statements are prepared by now. Autovacuum must not make up for what is measured.
            world.postgres.sql("backlog", "alter table payment_webhook_events set (autovacuum_enabled = false)")?;
            let mut open = 0;
            while open < 100_000 {
                open += world.load(&sidecar, "claims", 256, &[])?.main.count;
            }
            world.rate(&sidecar, "cycle", 64, &[])
        };
        let values = self.alternate(&mut [
            ("warm c=64", Box::new(|| world.rate(&warm, "cycle", 64, &[]))),
            ("fresh c=64", Box::new(fresh)),
            ("100,000 open c=64", Box::new(backlog)),
        ])?;
        self.ratio("P14a", values[1], values[0], "/s");
        self.ratio("P14b", values[2], values[0], "/s");
        Ok(())
    }
}
