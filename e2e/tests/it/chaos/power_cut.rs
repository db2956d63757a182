//! The power fails under the embedded store: every completion that was acknowledged is there (I5, L7).
//! What the model of the disk covers is said in `oncegate_e2e::chaos::disk`.

#![allow(clippy::print_stdout, reason = "a run says its seed and what it came to")]

use std::{
    env, fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use oncegate_e2e::{
    DEADLINE,
    chaos::{
        client::Caller,
        disk::{Files, Trace},
        history::{Call, Ending, Operation, Recorder, Reply},
        rows::{self, Rows},
        seed::Seed,
    },
    eventually,
    program::Oncegate,
};
use oncegate_sidecar::ledger::{
    Ledger as _,
    sqlite::{SqliteLedger, SqliteSettings},
};

const STORE: &str = "oncegate.db";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_at_any_moment_loses_nothing_acknowledged() -> Result<()> {
    let cuts: usize =
        env::var("POWER_CUTS").map_or(Ok(60), |given| given.parse()).context("POWER_CUTS is no number")?;
    let seed = Seed::from_environment();
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("strace.log");
    let mut program = Oncegate::new(directory.path(), ["sidecar"])?
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .traced(&log)
        .start()
        .context("strace is needed: run scripts/test, which installs it")?;
    let url = format!("http://{}", program.address("sidecar").await?);
    let recorder = Recorder::default();
    // A little later than the record's beginning: an answer counts as received a little later than it was.
    let base = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let end = Instant::now() + Duration::from_millis(1_500);
    // However long it takes: until the log has been brought into the database, and is written from its beginning again.
    let (enough, marked) = (1_200, AtomicUsize::new(0));
    let marked = &marked;
    let workers = (0..6_usize).map(|worker| {
        let caller = Caller::new(&url, recorder.clone());
        async move {
            let mut caller = caller?;
            for round in 0.. {
                let now = Instant::now();
                if now >= end && (marked.load(Relaxed) >= enough || now >= end + DEADLINE) {
                    break;
                }
                let (event, claim_id) = (format!("evt_{worker}_{round}"), format!("claim_{worker}_{round}"));
                let reply = caller.claim(&event, &claim_id, None, Duration::ZERO).await;
                if let Some(Reply::Acquired { token, .. }) = reply {
                    caller.mark(&event, &claim_id, token, Ending::Completed, Duration::ZERO).await;
                    marked.fetch_add(1, Relaxed);
                }
            }
            anyhow::Ok(())
        }
    });
    futures::future::try_join_all(workers).await?;
    // An orderly end brings the log into the database, which has to be as safe.
    let finished = program.stop().await?;
    ensure!(finished.code == Some(0), "{finished}");
    eventually("the trace is complete", async || {
        fs::read_to_string(&log).ok()?.contains("+++ exited with 0 +++").then_some(())
    })
    .await;

    let trace = Trace::read(&log, directory.path(), STORE)?;
    assert!(
        trace.syncs(&format!("{STORE}-wal")) > 10 && trace.syncs(STORE) > 3,
        "the database made, commits, and two checkpoints at least were traced"
    );
    let operations = recorder.operations();
    let completed: Vec<(f64, &Operation, i64)> = operations
        .iter()
        .filter_map(|operation| match (&operation.call, operation.returned.as_ref()?) {
            (Call::Mark { token, .. }, (_, at, Reply::Marked { .. })) => {
                Some(((base + *at).as_secs_f64(), operation, *token))
            }
            _ => None,
        })
        .collect();
    assert!(completed.len() > 50, "{}", completed.len());

    let mut dice = seed.dice("cuts");
    let (mut checked, mut lost_by_a_liar) = (0, 0);
    for number in 0..cuts {
        // The last cuts are within the checkpoint.
        let moment = if number % 4 == 0 {
            trace.len() - 1 - dice.index(40.min(trace.len() - 1))
        } else {
            dice.index(trace.len())
        };
        let acknowledged: Vec<_> = completed.iter().filter(|(at, ..)| *at < trace.time(moment)).collect();
        let found = recovered(&trace.cut(moment, &mut dice, true), acknowledged.is_empty()).await;
        let rows = found.with_context(|| format!("ONCEGATE_SEED={}: cut {number} at {moment}", seed.0))?;
        for (_, operation, token) in &acknowledged {
            assert!(
                is_completed(&rows, &operation.event, *token),
                "ONCEGATE_SEED={}: cut {number} at {moment} lost {operation}",
                seed.0
            );
            checked += 1;
        }
        // The same on a disk that does nothing when it is told to sync.
        let liar = recovered(&trace.cut(moment, &mut dice, false), true).await.unwrap_or_default();
        lost_by_a_liar +=
            acknowledged.iter().filter(|(_, operation, token)| !is_completed(&liar, &operation.event, *token)).count();
    }
    println!(
        "{cuts} cuts, {} completions, {checked} found again, {lost_by_a_liar} lost by a disk that lies",
        completed.len()
    );
    assert!(checked > completed.len(), "cuts after completions");
    assert!(lost_by_a_liar > 0, "the model is able to lose something");
    Ok(())
}

fn is_completed(rows: &Rows, event: &str, token: i64) -> bool {
    rows.events
        .get(event)
        .is_some_and(|row| row.state == "completed" && row.attempts.iter().any(|attempt| attempt.token == token))
}

/// What the store holds when the power is back. The service itself opens it first.
async fn recovered(files: &Files, may_be_new: bool) -> Result<Rows> {
    let directory = tempfile::tempdir()?;
    // What is mapped into memory is made anew.
    for (name, bytes) in files.iter().filter(|(name, _)| !name.ends_with("-shm") && !name.ends_with("lock")) {
        fs::write(directory.path().join(name), bytes)?;
    }
    let path = directory.path().join(STORE);
    let ledger = SqliteLedger::open(&path, &SqliteSettings { migrate: may_be_new, ..SqliteSettings::default() })?;
    ledger.close().await;
    drop(ledger);
    check_integrity(&path)?;
    rows::of_sqlite(&path)
}

fn check_integrity(path: &Path) -> Result<()> {
    let connection = rusqlite::Connection::open(path)?;
    let verdict: String = connection.query_row("pragma integrity_check", [], |row| row.get(0))?;
    ensure!(verdict == "ok", "the database is damaged: {verdict}");
    Ok(())
}
