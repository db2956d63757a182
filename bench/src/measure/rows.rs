//! Growing tables, and what makes them small again.

use std::{
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Result, ensure};

use super::{Bench, count};
use crate::{
    figures::median,
    process::{note, run},
    world::World,
};

/// Inserts completed events of this age, named like the keys of `oncegate bench --run filled --keys N`
/// (cli/src/bench/message.rs).
fn fill(world: &World, database: &str, run: &str, rows: u64, age: &str) -> Result<()> {
    note(&format!("    filling {database} with {rows} rows"));
    let sql = format!(
        "insert into payment_webhook_events (
             fencing_token, create_time, update_time, end_time, start_time, lock_expire_time, attempt_count, result_code,
             state, outcome, tenant, provider, event_id, event_type, claim_id, holder, payload_digest,
             result_content_type, result_body, metadata
         )
         select
             nextval('oncegate_fencing_token'), time, time, time, time, time + interval '5 minutes', 1, 200,
             'completed', 'completed', 'bench', 'bench',
             'bench-{run}-' || lpad(((900000000000 + n) * 4782969 % 1000000000000)::text, 12, '0'),
             'payment_intent.succeeded', lpad(n::text, 17, '0'), 'oncegate-bench', decode(repeat('07', 32), 'hex'),
             'application/json', '{{\"booked\":true}}', '{{\"amount\": \"4200\", \"currency\": \"eur\"}}'
         from generate_series(0, {rows} - 1) n,
             lateral (select now() - interval '{age}' + n * interval '1 millisecond' as time) t"
    );
    world.postgres.sql(database, &sql)?;
    world.postgres.sql(database, "vacuum analyze payment_webhook_events")?;
    world.postgres.sql(database, "checkpoint")?;
    Ok(())
}

impl Bench<'_> {
    /// P11.
    pub(super) fn growth(&mut self) -> Result<()> {
        const SMALL: u64 = 1_000;
        let world = self.world;
        let large = world.options.rows;
        // Without caches, since the tables are to be compared.
        let settings = [("CACHE_SIZE", "0B"), ("REDIS_URL", "redis://127.0.0.1:1")];
        let mut sidecars = Vec::new();
        for (database, rows) in [("small", SMALL), ("large", large)] {
            world.postgres.create(database)?;
            let sidecar = world.sidecar(database, &settings)?;
            fill(world, database, "filled", rows, "1 hour")?;
            sidecars.push(sidecar);
        }
        let look_up = |index: usize, rows: u64| {
            let keys = rows.to_string();
            let more = ["--run", "filled", "--prepared", "--keys", &keys];
            world.rate(&sidecars[index], "duplicates", 64, &more)
        };
        let rate = |index: usize, workload: &str| world.rate(&sidecars[index], workload, 64, &[]);
        let values = self.alternate(&mut [
            ("look-up, small", Box::new(|| look_up(0, SMALL))),
            ("look-up, large", Box::new(|| look_up(1, large))),
        ])?;
        self.ratio("P11c", values[1], values[0], "/s");
        // The small table is shrunk again each time: a run leaves a hundred thousand rows in it.
        let shrink = || {
            world
                .postgres
                .sql("small", "delete from payment_webhook_events where event_id not like 'bench-filled-%'")?;
            // On its own: it cannot run within a transaction.
            world.postgres.sql("small", "vacuum full analyze payment_webhook_events")
        };
        for (id, workload) in [("P11a", "claims"), ("P11b", "cycle")] {
            let values = self.alternate(&mut [
                (&format!("{workload}, small"), {
                    Box::new(|| {
                        shrink()?;
                        rate(0, workload)
                    })
                }),
                (&format!("{workload}, large"), Box::new(|| rate(1, workload))),
            ])?;
            self.ratio(id, values[1], values[0], "/s");
        }
        Ok(())
    }

    /// P12.
    pub(super) fn cleanup(&mut self) -> Result<()> {
        let world = self.world;
        let rows = world.options.cleanup_rows;
        world.postgres.create("cleanup")?;
        let sidecar = world.sidecar("cleanup", &[])?;
        let command = || {
            let mut command = Command::new(&world.options.oncegate);
            command
                .args(["cleanup", "--json", "--days", "30", "--batch-size", "10000", "--sidecar", &sidecar.url()])
                .current_dir(world.directory());
            command
        };
        let mut idle = Vec::new();
        for round in 0..world.options.runs.min(3) {
            fill(world, "cleanup", &format!("idle{round}"), rows, "60 days")?;
            let began = Instant::now();
            run(&mut command())?;
            idle.push(rows as f64 / began.elapsed().as_secs_f64());
            note(&format!("    cleanup alone: {:.0} rows/s", idle[idle.len() - 1]));
            let left = world.postgres.sql(
                "cleanup",
                "select count(*) from payment_webhook_events where end_time < now() - interval '30 days'",
            )?;
            ensure!(left == "0", "cleanup left {left} rows");
        }
        self.keep_median("P12a", &idle);

        let rate = || world.rate(&sidecar, "cycle", 64, &[]);
        let rate_beside = || {
            let mut cleanup = command().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            thread::sleep(std::time::Duration::from_millis(300));
            let measured = rate();
            if cleanup.try_wait()?.is_some() {
                note("    cleanup ended before the measurement: its rows were too few for --seconds");
            }
            let _ = cleanup.kill();
            cleanup.wait()?;
            measured
        };
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        // Whichever side comes first finds a freshly vacuumed table, worth a tenth of the rate, so each goes first
        // equally often.
        for round in 0..world.options.runs.next_multiple_of(2) {
            fill(world, "cleanup", &format!("busy{round}"), rows, "60 days")?;
            if round % 2 == 0 {
                alone.push(rate()?);
                beside.push(rate_beside()?);
            } else {
                beside.push(rate_beside()?);
                alone.push(rate()?);
            }
            note(&format!(
                "    cycle: {:.0}, while cleanup runs: {:.0}",
                alone[alone.len() - 1],
                beside[beside.len() - 1]
            ));
            // The rest that the killed one left.
            run(&mut command())?;
        }
        let runs = count(&alone);
        let (alone, beside) = (median(&alone), median(&beside));
        self.keep("P12b", (1.0 - beside / alone) * 100.0, Some((beside, alone)), "/s", runs);
        Ok(())
    }
}
