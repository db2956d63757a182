//! A random load under random faults, and everything checked when it is over.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use futures::future::join_all;
use sqlx::{Connection as _, PgConnection};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::{
    application::{Application, Guard, Temper},
    check::{
        self, Violation,
        conservation::samples,
        effects,
        linear::{self, Verdict},
    },
    faults::{Begun, Counts, Fault, Planned, link_name},
    history::{Operation, Recorder},
    residue::{self, Holding, Process},
    rows::{self, Rows},
    seed::{Dice, Seed},
    single::Single,
    workload::{self, Ways},
    world::{LOCK, World},
};
use crate::{eventually::within, http_client, proxy::Link};

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Faults by kind.
    pub faults: Counts,
    /// Operations recorded.
    pub operations: usize,
    /// Of these, the ones whose end is unknown.
    pub unknown: usize,
    /// Events.
    pub events: usize,
    /// Histories found linearizable.
    pub linearizable: usize,
    /// Histories of direct callers whose check was given up.
    pub undecided: usize,
    /// Deliveries that reached the application.
    pub deliveries: usize,
    /// Answers from caches that had not yet heard of a replay.
    pub stale: usize,
    /// The longest time after somebody knew of the replay that one of these was given.
    pub stale_max: Duration,
    /// Events with more than one effect, in runs without a guard.
    pub doubled: usize,
    /// Runs without a guard.
    pub unguarded: usize,
    /// Duplicates answered from Redis, since the sidecars' last start.
    pub redis_hits: u64,
    /// Values in Redis that were rejected, likewise.
    pub redis_refused: u64,
}

impl Report {
    /// Adds another run's.
    pub fn add(&mut self, other: &Report) {
        for (kind, count) in &other.faults {
            *self.faults.entry(kind.clone()).or_default() += count;
        }
        self.operations += other.operations;
        self.unknown += other.unknown;
        self.events += other.events;
        self.linearizable += other.linearizable;
        self.undecided += other.undecided;
        self.deliveries += other.deliveries;
        self.stale += other.stale;
        self.stale_max = self.stale_max.max(other.stale_max);
        self.doubled += other.doubled;
        self.unguarded += other.unguarded;
        self.redis_hits += other.redis_hits;
        self.redis_refused += other.redis_refused;
    }
}

/// The most faults that strike at once.
const AT_ONCE_MAX: u64 = 3;

/// How much longer than requested a run continues when its faults have affected nobody. The report shows if even that did not
/// help.
const LONGER_MAX: Duration = Duration::from_secs(60);

/// Whether a run is over: its time is up, and its faults have affected somebody.
fn is_over(end: Instant, recorder: &Recorder) -> bool {
    let now = Instant::now();
    now >= end && (recorder.has_met_faults() || now >= end + LONGER_MAX)
}

/// Two sidecars, each with a gateway, Postgres and Redis, under faults for this long, and until these have affected somebody.
///
/// # Errors
/// Whatever was violated, with the histories of the events concerned.
pub async fn on_postgres(seed: Seed, lasts: Duration) -> Result<Report> {
    let mut dice = seed.dice("run");
    let guard = *dice.one_of(&[Guard::Token, Guard::EventId, Guard::EventId, Guard::Nothing]);
    let mut world = World::start(2, guard, Temper::Moody(seed)).await?;
    let before = holdings(&residue::processes(&world)?)?;
    let calm = Arc::new(OnceLock::new());
    let ways = Ways {
        sidecars: world.sidecar_urls(),
        gateways: world.gateway_addresses(),
        recorder: world.recorder.clone(),
        calm: Arc::clone(&calm),
    };
    let workers = start(&ways, seed, 5, 4);
    let mut report = Report::default();
    let mut dice = seed.dice("faults");
    let end = Instant::now() + lasts;
    while !is_over(end, &world.recorder) {
        let mut planned: Vec<Planned> = Vec::new();
        for _ in 0..dice.between(1, AT_ONCE_MAX) {
            let one = Fault::random(&mut dice, world.sidecars.len());
            if planned.iter().all(|other| other.fault.target() != one.fault.target()) {
                planned.push(one);
            }
        }
        let struck = strike(&planned, &mut world).await;
        struck.with_context(|| format!("seed {}: {planned:?} after {:?}", seed.0, report.faults))?;
        for one in planned {
            *report.faults.entry(one.fault.kind()).or_default() += 1;
        }
    }
    world.application.behave();
    calm.get_or_init(Instant::now);
    let mut violations = finish(workers).await?;
    violations.extend(residue(&world).await?);
    let processes = residue::processes(&world)?;
    violations.extend(left(&processes, &before).await);
    for process in &processes {
        let page = http_client::get(process.admin, "/metrics").await?;
        let page = String::from_utf8_lossy(&page.body).into_owned();
        let lookups = samples(&page, "oncegate_cache_lookups_total");
        report.redis_hits += lookups.get("layer=\"redis\",result=\"hit\"").copied().unwrap_or_default();
        report.redis_refused += samples(&page, "oncegate_cache_refused_total").values().sum::<u64>();
    }
    let rows = rows::of_postgres(&world.database_url()).await?;
    conclude(seed, report, violations, &world.recorder, &rows, &world.application)
}

/// Begins several faults at once, each for its time, and undoes them again.
async fn strike(planned: &[Planned], world: &mut World) -> Result<()> {
    let mut begun: Vec<(Instant, Planned, Begun)> = Vec::new();
    for one in planned {
        sleep(one.after).await;
        let struck = one.fault.begin(world).await?;
        begun.push((Instant::now() + one.lasts, one.clone(), struck));
    }
    begun.sort_by_key(|(end, one, _)| (one.fault.ends_last(), *end));
    for (end, one, struck) in begun {
        sleep_until(end).await;
        one.fault.end(world, struck).await?;
    }
    Ok(())
}

/// One process with the embedded store, with faults of its own and on each path to it, for as long as the other.
///
/// # Errors
/// Whatever was violated, with the histories of the events concerned.
pub async fn on_sqlite(seed: Seed, lasts: Duration) -> Result<Report> {
    let guard = *seed.dice("run").one_of(&[Guard::Token, Guard::EventId, Guard::Nothing]);
    let mut single = Single::start(guard, Temper::Moody(seed)).await?;
    let before = holdings(&[single.process()?])?;
    let calm = Arc::new(OnceLock::new());
    let ways = Ways {
        sidecars: vec![format!("http://{}", single.from_callers.address())],
        gateways: vec![single.from_providers.address()],
        recorder: single.recorder.clone(),
        calm: Arc::clone(&calm),
    };
    let workers = start(&ways, seed, 4, 3);
    let mut report = Report::default();
    let mut dice = seed.dice("faults");
    let end = Instant::now() + lasts;
    while !is_over(end, &single.recorder) {
        sleep(dice.millis(100, 900)).await;
        for kind in strike_single(&mut dice, &mut single).await? {
            *report.faults.entry(kind).or_default() += 1;
        }
    }
    single.application.behave();
    calm.get_or_init(Instant::now);
    let mut violations = finish(workers).await?;
    violations.extend(left(&[single.process()?], &before).await);
    single.program.as_mut().context("a process that runs")?.stop().await?;
    let rows = rows::of_sqlite(&single.store())?;
    conclude(seed, report, violations, &single.recorder, &rows, &single.application)
}

/// Mostly trouble on a path, and often something happens to the process in the meantime.
async fn strike_single(dice: &mut Dice, single: &mut Single) -> Result<Vec<String>> {
    let mut kinds = Vec::new();
    let way = dice.index(single.ways().len());
    let on_a_way = dice.percent(70);
    if on_a_way {
        let (name, proxy) = single.ways()[way];
        if dice.percent(20) {
            proxy.reset();
            kinds.push(format!("{name} reset"));
        } else {
            let link = Link::random(dice);
            proxy.set(link);
            kinds.push(format!("{name} {}", link_name(link)));
        }
    }
    match dice.between(0, 9) {
        0..4 => {
            single.kill().await?;
            sleep(dice.millis(0, 300)).await;
            // The store uses the process's own clock. The skew stays within a signature's tolerance.
            single.skew = i64::try_from(dice.between(0, 480)).unwrap_or(0) - 240;
            single.restart().await?;
            kinds.push("process killed".to_owned());
        }
        4..6 => {
            let program = single.program.as_ref().context("a process that runs")?;
            program.freeze()?;
            sleep(dice.millis(100, 3_500)).await;
            program.thaw()?;
            kinds.push("process frozen".to_owned());
        }
        _ => sleep(dice.millis(100, 1_500)).await,
    }
    let (_, proxy) = single.ways()[way];
    proxy.set(Link::Up);
    Ok(kinds)
}

fn holdings(processes: &[Process]) -> Result<Vec<Holding>> {
    processes.iter().map(Process::holding).collect()
}

/// I12: nothing is left behind in the processes.
async fn left(processes: &[Process], before: &[Holding]) -> Vec<Violation> {
    let left = processes.iter().zip(before).map(|(process, before)| process.left(*before));
    let left = join_all(left).await.into_iter().flatten();
    left.map(|what| Violation { invariant: "I12", event: String::new(), what }).collect()
}

type Worker = AbortOnDropHandle<Result<Vec<String>>>;

fn start(ways: &Ways, seed: Seed, direct: usize, providers: usize) -> Vec<Worker> {
    let direct = (0..direct).map(|worker| tokio::spawn(workload::direct(ways.clone(), seed, worker)));
    let providers = (0..providers).map(|worker| tokio::spawn(workload::provider(ways.clone(), seed, worker)));
    direct
        .map(AbortOnDropHandle::new)
        .collect::<Vec<_>>()
        .into_iter()
        .chain(providers.map(AbortOnDropHandle::new))
        .collect()
}

/// Waits until the callers have finished what they began (I8).
async fn finish(workers: Vec<Worker>) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for worker in workers {
        violations.extend(worker.await??.into_iter().map(|event| Violation {
            invariant: "I8",
            event,
            what: "it was not finished when the faults were over".to_owned(),
        }));
    }
    Ok(violations)
}

/// I12: nothing is left behind in the database.
async fn residue(world: &World) -> Result<Vec<Violation>> {
    let mut connection = PgConnection::connect(&world.database_url()).await?;
    let mut left = Vec::new();
    let settled = within(LOCK * 4, async || {
        left.clear();
        for (what, sql) in [
            ("sessions idle in transaction", "select count(*) from pg_stat_activity where state like 'idle in transaction%'"),
            // The product's statements end within their time-out; one that waits longer for a lock hangs.
            (
                "statements that hang",
                "select count(*) from pg_stat_activity where state = 'active' and pid <> pg_backend_pid() \
                 and backend_type = 'client backend' and query_start < now() - interval '10 seconds'",
            ),
            (
                "locks past their time",
                "select count(*) from payment_webhook_events where state = 'processing' and lock_expire_time < now() - interval '10 seconds'",
            ),
        ] {
            let count: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut connection).await.ok()?;
            if count > 0 {
                left.push(format!("{count} {what}"));
            }
        }
        left.is_empty().then_some(())
    })
    .await;
    connection.close().await?;
    Ok(match settled {
        Some(()) => Vec::new(),
        None => vec![Violation { invariant: "I12", event: String::new(), what: left.join(", ") }],
    })
}

fn conclude(
    seed: Seed,
    mut report: Report,
    mut violations: Vec<Violation>,
    recorder: &Recorder,
    rows: &Rows,
    application: &Application,
) -> Result<Report> {
    let operations: Vec<Operation> = recorder.operations();
    let deliveries = recorder.deliveries();
    let effects: BTreeMap<String, Vec<i64>> = application.effects();
    let run = check::Run {
        operations: &operations,
        deliveries: &deliveries,
        rows,
        effects: &effects,
        guard: application.guard(),
    };
    violations.extend(check::safety(&run));
    violations.extend(effects::settled(&run));
    for one in check::by_event(&run).iter().filter(|one| !one.through_gateways()) {
        for late in linear::stale(one) {
            report.stale += 1;
            report.stale_max = report.stale_max.max(late);
        }
        match linear::check(one) {
            Verdict::Linearizable => report.linearizable += 1,
            Verdict::Undecided => report.undecided += 1,
            Verdict::Broken(violation) => violations.push(violation),
        }
    }
    report.operations = operations.len();
    report.unknown = operations.iter().filter(|operation| operation.returned.is_none()).count();
    report.events = rows.events.len();
    report.deliveries = deliveries.len();
    report.doubled = effects::doubled(&run).len();
    report.unguarded = usize::from(application.guard() == Guard::Nothing);
    ensure!(
        violations.is_empty(),
        "seed {}, guard {:?}, {} violations, {report:#?}\n{}",
        seed.0,
        application.guard(),
        violations.len(),
        check::explain(&violations, &run)
    );
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_that_panics_fails_the_run() {
        let worker = |told: bool| {
            AbortOnDropHandle::new(tokio::spawn(async move {
                assert!(!told, "somebody has told a secret");
                Ok(Vec::new())
            }))
        };
        assert!(finish(vec![worker(false)]).await.is_ok());
        let error = format!("{:#}", finish(vec![worker(false), worker(true)]).await.unwrap_err());
        assert!(error.contains("somebody has told a secret"), "{error}");
    }
}
