//! Cleanup under fire, and Cleanup as nobody should ask for it.

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, stream};
use oncegate_api::{
    reason,
    v1::{CleanupRequest, CleanupResponse, State},
};
use oncegate_e2e::program::Oncegate;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::Streaming;
use tonic_types::StatusExt as _;

use super::{Client, Sidecar, ask, claim, completion, history};
use crate::setup::{Ledger, on_each_ledger};

/// Rows of the test, from the environment (`ONCEGATE_CLEANUP_ROWS`); a million in a campaign. The embedded store is quicker.
fn rows(ledger: &Ledger) -> usize {
    let short = if matches!(ledger, Ledger::Sqlite) { 4_000 } else { 1_200 };
    std::env::var("ONCEGATE_CLEANUP_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(short)
}

on_each_ledger!(
    two_cleanups_at_once_whose_process_is_killed_delete_what_was_counted,
    a_cleanup_under_way_ends_with_its_sidecar_and_is_on_record,
);

/// As young as a Cleanup may be asked to delete.
const OLD: prost_types::Duration = prost_types::Duration { seconds: 3_600, nanos: 0 };

fn low_minimum(command: Oncegate) -> Oncegate {
    command.env("RETENTION_MIN", "1h")
}

/// A Cleanup of what has ended more than an hour ago, so many rows at a time.
async fn begin(client: &Client, dry_run: bool, batch_size: i32) -> Result<Streaming<CleanupResponse>> {
    let request = CleanupRequest {
        older_than: Some(OLD),
        states: vec![State::Completed.into(), State::Dead.into()],
        dry_run,
        batch_size,
        ..Default::default()
    };
    Ok(client.clone().cleanup(request).await?.into_inner())
}

/// Grants so many events, and completes some.
async fn fill(client: &Client, rows: usize, completes: impl Fn(usize) -> bool) -> Result<()> {
    let filled: Vec<Result<()>> = stream::iter(0..rows)
        .map(async |number| {
            let event_id = format!("evt_{number}");
            let lock = ask(client, claim(&event_id, "claim")).await?.lock.context("the lock")?;
            if completes(number) {
                client.clone().mark_completed(completion(&event_id, lock.fencing_token)).await?;
            }
            Ok(())
        })
        .buffer_unordered(64)
        .collect()
        .await;
    filled.into_iter().collect()
}

/// Makes every event two hours older than it is.
async fn age(sidecar: &Sidecar) -> Result<()> {
    const TIMES: [&str; 5] = ["create_time", "update_time", "end_time", "start_time", "lock_expire_time"];
    let set = |older: &str| {
        let columns: Vec<String> = TIMES.iter().map(|column| format!("{column} = {column} - {older}")).collect();
        format!("update payment_webhook_events set {}", columns.join(", "))
    };
    match sidecar.database() {
        Some(database) => {
            let mut admin = database.connect().await?;
            sqlx::raw_sql(sqlx::AssertSqlSafe(set("interval '2 hours'"))).execute(&mut admin).await?;
        }
        None => {
            let shell = rusqlite::Connection::open(sidecar.store())?;
            shell.busy_timeout(std::time::Duration::from_secs(5))?;
            shell.execute_batch(&set("7200000000"))?;
        }
    }
    Ok(())
}

/// The totals that it ends with.
async fn end(stream: &mut Streaming<CleanupResponse>) -> Result<CleanupResponse> {
    loop {
        let totals = stream.message().await?.context("an orderly end says that it is done")?;
        if totals.done {
            return Ok(totals);
        }
    }
}

/// T29. The process that a Cleanup runs in is killed after it has begun to delete, while another one is at work, beside live
/// traffic. On Postgres the other one is in another sidecar; the embedded store has one process, and both die.
async fn two_cleanups_at_once_whose_process_is_killed_delete_what_was_counted(ledger: Ledger) -> Result<()> {
    let rows = rows(&ledger);
    let mut sidecar = Sidecar::start_with(ledger, low_minimum).await?;
    let directory = tempfile::tempdir()?;
    let mut other = match sidecar.database() {
        Some(database) => {
            let command = Oncegate::new(directory.path(), ["sidecar"])?
                .env("SIDECAR_LISTEN", "127.0.0.1:0")
                .env("DATABASE_URL", database.url());
            Some(low_minimum(command).start()?)
        }
        None => None,
    };
    let client = sidecar.client().await?;
    // Completed, except every tenth, which is still being processed and may never go.
    let open = rows.div_ceil(10);
    fill(&client, rows, |number| number % 10 != 0).await?;
    age(&sidecar).await?;
    let matched = end(&mut begin(&client, true, 1_000).await?).await?.matched_count;
    assert_eq!(usize::try_from(matched)?, rows - open, "the dry run counts what has ended");
    let left = "select count(*) from payment_webhook_events where event_id like 'evt\\_%' escape '\\'";
    assert_eq!(sidecar.outside(left).await?, rows.to_string());

    // Traffic goes on beside it.
    let beside = match &mut other {
        Some(other) => super::client(other.address("sidecar").await?).await?,
        None => client.clone(),
    };
    let traffic = Traffic::start(beside.clone());
    // A row at a time, so that they take a while. The one that goes on need not take minutes where the machine is busy, and its
    // steps are far between.
    let mut first = begin(&client, false, 1).await?;
    let mut second = begin(&beside, false, if other.is_some() { 10 } else { 1 }).await?;
    // Its first steps may have met only rows that the other one had locked.
    let progress = loop {
        let progress = first.message().await?.context("progress")?;
        assert!(!progress.done, "in the middle of it: {progress:?}");
        if progress.deleted_count > 0 {
            break progress;
        }
    };
    sidecar.program.kill().await?;
    // What it was told before may still have been on its way.
    let mut last = progress;
    let cut_off = loop {
        match first.message().await {
            Ok(Some(totals)) => last = totals,
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(cut_off && !last.done, "it was not done: {last:?}");
    let mut deleted = last.deleted_count;
    if other.is_some() {
        deleted += end(&mut second).await.context("the other one goes on")?.deleted_count;
    } else {
        assert_ne!(sidecar.outside(left).await?, open.to_string(), "it was not done");
    }
    let live = traffic.stop().await?;
    sidecar.restart_with(low_minimum).await?;
    let client = sidecar.client().await?;
    deleted += end(&mut begin(&client, false, 1_000).await?).await?.deleted_count;

    assert_eq!(sidecar.outside(left).await?, open.to_string(), "all that was counted has gone, and nothing else");
    // No row was counted twice; those of the killed ones are in no total, or not all of them.
    assert!(deleted <= matched, "{deleted} of {matched}");
    let gone = "select count(*) from payment_webhook_events where event_id like 'evt\\_%' escape '\\' \
        and state = 'processing'";
    assert_eq!(sidecar.outside(gone).await?, open.to_string(), "only what has ended goes");
    assert!(!live.is_empty(), "traffic stood still");
    for event_id in live {
        assert!(history(&client, &event_id).await?.is_some(), "{event_id} is young");
    }
    Ok(())
}

/// A caller that completes new events, and what it completed.
struct Traffic {
    ended: CancellationToken,
    task: AbortOnDropHandle<Vec<String>>,
}

impl Traffic {
    fn start(client: Client) -> Self {
        let ended = CancellationToken::new();
        let stop = ended.clone();
        let task = tokio::spawn(async move {
            let mut live = Vec::new();
            for number in 0.. {
                let event_id = format!("live_{number}");
                let lock = match ask(&client, claim(&event_id, "claim")).await {
                    Ok(answer) => answer.lock,
                    // Its sidecar is the one that is killed.
                    Err(_) => break,
                };
                let Some(lock) = lock else { break };
                if client.clone().mark_completed(completion(&event_id, lock.fencing_token)).await.is_err() {
                    break;
                }
                live.push(event_id);
                if stop.is_cancelled() {
                    break;
                }
            }
            live
        });
        Self { ended, task: AbortOnDropHandle::new(task) }
    }

    async fn stop(self) -> Result<Vec<String>> {
        self.ended.cancel();
        Ok(self.task.await?)
    }
}

on_each_ledger!(a_cleanup_that_nobody_can_mean_is_refused_and_deletes_nothing);

/// T30
async fn a_cleanup_that_nobody_can_mean_is_refused_and_deletes_nothing(ledger: Ledger) -> Result<()> {
    let mut sidecar = Sidecar::start(ledger).await?;
    let client = sidecar.client().await?;
    let token = ask(&client, claim("evt_1", "")).await?.lock.context("the lock")?.fencing_token;
    client.clone().mark_completed(completion("evt_1", token)).await?;
    let lasting = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    for (what, older_than) in [
        ("zero", lasting(0, 0)),
        ("negative", lasting(-1, 0)),
        ("negative by a nanosecond", lasting(0, -1)),
        ("the smallest", lasting(i64::MIN, i32::MIN)),
        ("a nanosecond", lasting(0, 1)),
        ("below the floor", lasting(6 * 86_400 - 1, 0)),
        ("absurd", lasting(i64::MAX, 0)),
        ("no duration", lasting(7 * 86_400, i32::MAX)),
        ("mixed signs", lasting(7 * 86_400, -1)),
    ] {
        for dry_run in [true, false] {
            let request = CleanupRequest { older_than, dry_run, ..Default::default() };
            let status = match client.clone().cleanup(request).await {
                Err(status) => status,
                Ok(mut stream) => match stream.get_mut().message().await {
                    Err(status) => status,
                    Ok(message) => panic!("{what}: {message:?}"),
                },
            };
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{what}: {status:?}");
            let info = status.get_details_error_info().context("ErrorInfo")?;
            assert_eq!(info.reason, reason::INVALID_FIELD, "{what}");
        }
    }
    for state in [State::Processing, State::Pending, State::Unspecified] {
        let request =
            CleanupRequest { older_than: lasting(7 * 86_400, 0), states: vec![state.into()], ..Default::default() };
        let status = client.clone().cleanup(request).await.expect_err("open events never go");
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{state:?}");
    }
    let line = sidecar.program.line_where("it is logged", |line| line.contains("cleanup was refused")).await?;
    assert!(line.contains("\"WARN\""), "{line}");
    assert_eq!(sidecar.outside("select count(*) from payment_webhook_events").await?, "1");
    Ok(())
}

/// Nobody waits for its pauses, and what it has deleted is told.
async fn a_cleanup_under_way_ends_with_its_sidecar_and_is_on_record(ledger: Ledger) -> Result<()> {
    const ROWS: usize = 2_000;
    let mut sidecar = Sidecar::start_with(ledger, low_minimum).await?;
    let client = sidecar.client().await?;
    fill(&client, ROWS, |_| true).await?;
    age(&sidecar).await?;
    let mut cleanup = begin(&client, false, 1).await?;
    let first = cleanup.message().await?.context("progress")?;
    anyhow::ensure!(!first.done, "{ROWS} rows are too few for this machine");
    sidecar.program.signal("TERM")?;
    let told = loop {
        match cleanup.message().await {
            Ok(Some(progress)) => anyhow::ensure!(!progress.done, "it went on to its end"),
            Ok(None) => anyhow::bail!("an orderly end, and not done"),
            Err(status) => break status,
        }
    };
    assert_eq!(told.code(), tonic::Code::Unavailable, "{told:?}");
    // Within the default drain of the connections it would end as well: cut off, and without a word.
    let line = sidecar.program.line_where("the record of the Cleanup", |line| line.contains("a cleanup ended")).await?;
    assert!(line.contains("stopping"), "{line}");
    let finished = sidecar.program.finish(oncegate_e2e::DEADLINE).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    Ok(())
}
