//! Fills tables of several sizes and measures the built `oncegate` on each: rates, latencies, memory, heap-only updates,
//! Cleanup. Run by `scripts/grow`. Prints a line as it goes, and a JSON document at the end.

#![allow(clippy::print_stdout, reason = "it is a program, and these are its results")]

use std::{
    fmt::Display,
    fs,
    io::Write as _,
    ops::RangeInclusive,
    process::ExitCode,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use oncegate_api::v1::{
    CheckAndLockRequest, CleanupRequest, EventKey, HistoryRequest, MarkCompletedRequest, State, StatsRequest,
    idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::{
    eventually,
    grow::{Growth, fill, key},
    postgres::{Cluster, Options},
    program::{Oncegate, Running},
};
use serde_json::{Map, Value, json};
use tonic::transport::Channel;

type Client = IdempotencyServiceClient<Channel>;

/// Callers at once.
const CALLERS: u64 = 64;

const USAGE: &str = "usage: grow [--rows 1000,1000000,10000000] [--seconds 4] [--no-check]";
const ROWS: RangeInclusive<i64> = 1..=1_000_000_000;
const SECONDS: RangeInclusive<u64> = 1..=600;

/// What is asked for on the command line.
#[derive(Debug, PartialEq)]
struct Asked {
    sizes: Vec<i64>,
    seconds: u64,
    check: bool,
}

impl Asked {
    /// What the arguments ask for; or what is wrong with them, in words.
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut asked = Self { sizes: vec![1_000, 1_000_000], seconds: 4, check: true };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument}: no value given"));
            match argument.as_str() {
                "--rows" => {
                    asked.sizes =
                        value()?.split(',').map(|rows| number("--rows", rows, &ROWS)).collect::<Result<_, _>>()?
                }
                "--seconds" => asked.seconds = number("--seconds", &value()?, &SECONDS)?,
                "--no-check" => asked.check = false,
                _ => return Err(format!("{argument}: there is no such option; {USAGE}")),
            }
        }
        Ok(asked)
    }
}

/// A number within its limits. Underscores may part its digits.
fn number<N: FromStr + PartialOrd + Display>(flag: &str, given: &str, limits: &RangeInclusive<N>) -> Result<N, String> {
    let number = given.replace('_', "").parse().ok().filter(|number| limits.contains(number));
    number.ok_or_else(|| {
        format!("{flag}: {given:?} given, has to be a whole number from {} to {}", limits.start(), limits.end())
    })
}

fn main() -> Result<ExitCode> {
    let Asked { sizes, seconds, check } = match Asked::parse(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(problem) => {
            let _ = writeln!(std::io::stderr(), "grow: {problem}");
            return Ok(ExitCode::from(2));
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let settings = [("shared_buffers", "1GB"), ("max_wal_size", "4GB"), ("work_mem", "64MB")];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let cluster = Cluster::start(Options { fsync: true, settings, ..Options::default() }).await?;
        let mut found: Vec<(i64, Map<String, Value>)> = Vec::new();
        for rows in sizes {
            let mut figures = measure(&cluster, rows, Duration::from_secs(seconds), check).await?;
            // P11: relative to the first table, which should be the smallest.
            let first = found.first().map_or_else(|| figures.clone(), |(_, first)| first.clone());
            for name in ["insert", "cycle", "lookup"] {
                let ratio = figures[name].as_f64().zip(first[name].as_f64()).map(|(one, other)| one / other);
                figures.insert(format!("{name}_ratio"), json!(ratio));
            }
            found.push((rows, figures));
        }
        let found: Map<String, Value> =
            found.into_iter().map(|(rows, figures)| (rows.to_string(), Value::Object(figures))).collect();
        println!("{}", serde_json::to_string_pretty(&found)?);
        Ok(ExitCode::SUCCESS)
    })
}

async fn measure(cluster: &Cluster, rows: i64, time: Duration, check: bool) -> Result<Map<String, Value>> {
    let mut figures = Map::new();
    let mut note = |name: &str, value: Value| {
        println!("{rows} {name}: {value}");
        figures.insert(name.to_owned(), value);
    };
    let database = cluster.database().await?;
    let mut connection = database.connect().await?;
    let begun = Instant::now();
    fill(&mut connection, Growth::of(rows)).await?;
    for sql in ["vacuum (analyze)", "checkpoint"] {
        sqlx::raw_sql(sql).execute(&mut connection).await?;
    }
    note("fill_seconds", json!(begun.elapsed().as_secs()));
    let directory = tempfile::tempdir()?;
    if check {
        let begun = Instant::now();
        let command = Oncegate::new(directory.path(), ["check", "--json"])?.env("DATABASE_URL", database.url());
        let checked = command.run_for(600).await?;
        ensure!(checked.code == Some(0), "{checked}");
        note("check_seconds", json!(begun.elapsed().as_secs_f64()));
    }
    let mut sidecar = Oncegate::new(directory.path(), ["sidecar"])?
        .env("DATABASE_URL", database.url())
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        // The table is to be measured, not the cache.
        .env("CACHE_SIZE", "0B")
        .env("RETENTION_MIN", "1h")
        .env("ONCEGATE_IDLE_POLL", "1ms")
        .start()?;
    let address = sidecar.address("sidecar").await?;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
        clients.push(IdempotencyServiceClient::new(channel).max_decoding_message_size(usize::MAX));
    }
    note("memory_idle_mib", json!(memory(&sidecar)?));
    latencies(&mut clients[0].clone(), rows, &mut note).await?;
    rate(&clients, time / 4, Work::Cycle, "warm", rows).await?;
    for (name, work) in [("insert", Work::Insert), ("cycle", Work::Cycle), ("lookup", Work::LookUp)] {
        let mut rates = Vec::new();
        for round in 0..3 {
            rates.push(rate(&clients, time / 3, work, &format!("{name}-{round}"), rows).await?);
        }
        rates.sort_by(f64::total_cmp);
        note(name, json!(rates[1].round()));
    }
    // Events granted but not completed are examined one by one: this stands for an outage that leaves that many behind.
    note("stats_after_so_many_grants", stats(&mut clients[0].clone(), StatsRequest::default()).await?);
    note("memory_mib", json!(memory(&sidecar)?));
    // A session reports its statistics a second after its last statement, or when it ends: every grant is one insert.
    let (heap_only, updates): (i64, i64) = eventually("the sidecar's sessions have reported", async || {
        let (heap_only, updates, inserts): (i64, i64, i64) = sqlx::query_as(
            "select n_tup_hot_upd, n_tup_upd, n_tup_ins from pg_stat_user_tables where relname = 'payment_webhook_events'",
        )
        .fetch_one(&mut connection)
        .await
        .ok()?;
        let rows: i64 =
            sqlx::query_scalar("select count(*) from payment_webhook_events").fetch_one(&mut connection).await.ok()?;
        (inserts >= rows).then_some((heap_only, updates))
    })
    .await;
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    note("heap_only_share", json!(heap_only as f64 / updates.max(1) as f64));
    cleanup(&clients, rows, time, &mut note).await?;
    sidecar.stop().await?;
    Ok(figures)
}

/// Resident memory in MiB.
fn memory(sidecar: &Running) -> Result<u64> {
    let pid = sidecar.pid()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? / 1_024)
}

#[derive(Clone, Copy)]
enum Work {
    /// A new event is granted.
    Insert,
    /// And completed.
    Cycle,
    /// A known event, anywhere in the table.
    LookUp,
}

/// Calls a second, in a closed loop.
async fn rate(clients: &[Client], time: Duration, work: Work, run: &str, rows: i64) -> Result<f64> {
    let done = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for caller in 0..CALLERS {
        let mut client = clients[usize::try_from(caller)? % clients.len()].clone();
        let (done, run) = (done.clone(), run.to_owned());
        tasks.push(tokio::spawn(async move {
            let mut random = (caller + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut number = 0_u64;
            while begun.elapsed() < time {
                number += 1;
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let event = match work {
                    Work::LookUp => {
                        let (tenant, provider, event_id) = key(1 + i64::try_from(random >> 1)? % rows);
                        EventKey { tenant: tenant.into(), provider: provider.into(), event_id }
                    }
                    Work::Insert | Work::Cycle => EventKey {
                        tenant: "default".into(),
                        provider: "stripe".into(),
                        event_id: format!("{run}-{caller}-{number}"),
                    },
                };
                let request = CheckAndLockRequest {
                    key: Some(event.clone()),
                    event_type: "payment_intent.succeeded".into(),
                    ..Default::default()
                };
                let answer = client.check_and_lock(request).await?.into_inner();
                if let (Work::Cycle, Some(lock)) = (work, answer.lock) {
                    let fencing_token = lock.fencing_token;
                    let request = MarkCompletedRequest { key: Some(event), fencing_token, ..Default::default() };
                    client.mark_completed(request).await?;
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    let (count, elapsed) = (done.load(Ordering::Relaxed), begun.elapsed());
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    Ok(count as f64 / elapsed.as_secs_f64())
}

/// Stats and History, each filter by itself: p50 and p99 in milliseconds, and what was found.
async fn latencies(client: &mut Client, rows: i64, note: &mut impl FnMut(&str, Value)) -> Result<()> {
    let ago = |days: u64| Some(prost_types::Timestamp::from(SystemTime::now() - Duration::from_secs(days * 86_400)));
    let day = prost_types::Duration { seconds: 86_400, nanos: 0 };
    let all = StatsRequest::default();
    for (name, request) in [
        ("stats_all", all.clone()),
        ("stats_provider", StatsRequest { provider: "stripe".into(), ..all.clone() }),
        ("stats_tenant", StatsRequest { tenant: "acme".into(), ..all.clone() }),
        ("stats_day", StatsRequest { start_time: ago(1), ..all.clone() }),
        ("stats_buckets", StatsRequest { bucket_duration: Some(day), ..all }),
    ] {
        note(name, stats(client, request).await?);
    }
    let (tenant, provider, event_id) = key(rows / 2);
    let one = EventKey { tenant: tenant.into(), provider: provider.into(), event_id };
    let page = HistoryRequest { page_size: 50, ..Default::default() };
    let dead = HistoryRequest { states: vec![State::Dead.into()], ..page.clone() };
    for (name, request) in [
        ("history_newest", page.clone()),
        ("history_event", HistoryRequest { key: Some(one), ..Default::default() }),
        ("history_tenant", HistoryRequest { tenant: "acme".into(), ..page.clone() }),
        ("history_no_such_tenant", HistoryRequest { tenant: "nobody".into(), ..page.clone() }),
        ("history_provider", HistoryRequest { provider: "paystack".into(), ..page.clone() }),
        ("history_pending", HistoryRequest { states: vec![State::Pending.into()], ..page.clone() }),
        ("history_dead", dead.clone()),
        ("history_dead_of_tenant", HistoryRequest { tenant: "acme".into(), ..dead }),
        ("history_rare_type", HistoryRequest { event_type: "dispute.created".into(), ..page.clone() }),
        ("history_no_such_type", HistoryRequest { event_type: "none".into(), ..page.clone() }),
        ("history_a_week_ago", HistoryRequest { start_time: ago(8), end_time: ago(7), ..page }),
    ] {
        let (mut times, mut found) = (Vec::new(), 0);
        for _ in 0..20 {
            let begun = Instant::now();
            let answer = client.history(request.clone()).await?.into_inner();
            times.push(begun.elapsed());
            found = i64::try_from(answer.events.len())?;
        }
        note(name, spread(times, found));
    }
    Ok(())
}

async fn stats(client: &mut Client, request: StatsRequest) -> Result<Value> {
    let (mut times, mut found) = (Vec::new(), 0);
    for _ in 0..100 {
        let begun = Instant::now();
        let answer = client.stats(request.clone()).await?.into_inner();
        times.push(begun.elapsed());
        found = answer.total.map_or(0, |total| total.total);
    }
    Ok(spread(times, found))
}

fn spread(mut times: Vec<Duration>, found: i64) -> Value {
    times.sort_unstable();
    let at = |share: usize| {
        let place = (times.len() * share).div_ceil(100).max(1) - 1;
        (times[place].as_secs_f64() * 1e5).round() / 100.0
    };
    json!({ "p50_ms": at(50), "p99_ms": at(99), "found": found })
}

/// P12: the rate of a Cleanup while nobody calls, and what calls lose while another runs.
async fn cleanup(clients: &[Client], rows: i64, time: Duration, note: &mut impl FnMut(&str, Value)) -> Result<()> {
    // While idle, the oldest tenth of the table. Then, beside calls, as much as the time permits.
    let begun = Instant::now();
    let deleted = delete(clients[0].clone(), 27, None).await?;
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    note("cleanup_idle_rows_per_second", json!((deleted as f64 / begun.elapsed().as_secs_f64()).round()));
    note("cleanup_idle_rows", json!(deleted));
    let (mut without, mut beside, mut deleted) = (Vec::new(), Vec::new(), 0);
    for round in 0..3 {
        without.push(rate(clients, time / 2, Work::Cycle, &format!("alone-{round}"), rows).await?);
        let stop = Arc::new(AtomicBool::new(false));
        let running = tokio::spawn(delete(clients[3].clone(), 10, Some(stop.clone())));
        // It has to find its pace first, as a long-running one has.
        rate(clients, time / 4, Work::Cycle, &format!("finding-{round}"), rows).await?;
        beside.push(rate(clients, time / 2, Work::Cycle, &format!("beside-{round}"), rows).await?);
        stop.store(true, Ordering::Relaxed);
        deleted += running.await??;
    }
    for rates in [&mut without, &mut beside] {
        rates.sort_by(f64::total_cmp);
    }
    note("cleanup_beside_calls_rows", json!(deleted));
    note("cleanup_loss", json!(1.0 - beside[1] / without[1]));
    Ok(())
}

/// Runs a Cleanup of older events, to its end or until `stop`; returns how many it deleted.
async fn delete(mut client: Client, days: i64, stop: Option<Arc<AtomicBool>>) -> Result<i64> {
    let request = CleanupRequest {
        older_than: Some(prost_types::Duration { seconds: days * 86_400, nanos: 0 }),
        batch_size: if stop.is_some() { 1_000 } else { 10_000 },
        ..Default::default()
    };
    let mut progress = client.cleanup(request).await?.into_inner();
    let mut deleted = 0;
    while let Some(totals) = progress.message().await? {
        deleted = totals.deleted_count;
        if stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            break;
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Asked, String> {
        Asked::parse(arguments.iter().map(|argument| (*argument).to_owned()))
    }

    #[test]
    fn what_cannot_be_asked_for_is_named_with_what_can() {
        let asked = parse(&["--rows", "1_000,5", "--seconds", "1", "--no-check"]);
        assert_eq!(asked, Ok(Asked { sizes: vec![1_000, 5], seconds: 1, check: false }));
        for (arguments, said) in [
            (&["--rows", "0,abc"][..], r#"--rows: "0" given, has to be a whole number from 1 to 1000000000"#),
            (&["--rows", "1,abc"], r#"--rows: "abc" given, has to be a whole number from 1 to 1000000000"#),
            (&["--seconds", "601"], r#"--seconds: "601" given, has to be a whole number from 1 to 600"#),
            (&["--rows"], "--rows: no value given"),
        ] {
            assert_eq!(parse(arguments), Err(said.to_owned()));
        }
        assert!(parse(&["--row"]).unwrap_err().starts_with("--row: there is no such option; usage: "));
    }
}
