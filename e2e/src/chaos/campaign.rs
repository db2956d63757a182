//! A random load under random faults, and everything checked when it is over.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use sqlx::{Connection as _, PgConnection};
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::{
    application::{Application, Guard, Temper},
    check::{
        self, Violation, effects,
        linear::{self, Verdict},
    },
    faults::{Counts, Fault},
    history::{Operation, Recorder},
    rows::{self, Rows},
    seed::{Dice, Seed},
    workload::{self, Ways},
    world::{LOCK, World},
};
use crate::{
    eventually::within,
    program::{Oncegate, Running},
    proxy::Proxy,
};

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Faults by kind.
    pub faults: Counts,
    /// Operations recorded.
    pub operations: usize,
    /// Of these, those of which nobody knows how they ended.
    pub unknown: usize,
    /// Events.
    pub events: usize,
    /// Histories found linearizable.
    pub linearizable: usize,
    /// Histories of direct callers whose check was given up.
    pub undecided: usize,
    /// Deliveries that reached the application.
    pub deliveries: usize,
    /// Answers of caches that had not heard of a replay yet.
    pub stale: usize,
    /// The latest of these, after somebody knew of the replay.
    pub stale_max: Duration,
    /// Events with more than one effect, where nothing guards them.
    pub doubled: usize,
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
    }
}

/// Two sidecars, each with a gateway, Postgres and Redis, for so long under faults.
///
/// # Errors
/// Whatever was violated, with the histories of the events concerned.
pub async fn on_postgres(seed: Seed, lasts: Duration) -> Result<Report> {
    let mut dice = seed.dice("run");
    let guard = *dice.one_of(&[Guard::Token, Guard::EventId, Guard::EventId, Guard::Nothing]);
    let mut world = World::start(2, guard, Temper::Moody(seed)).await?;
    let calm = Arc::new(AtomicBool::new(false));
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
    while Instant::now() < end {
        let planned = Fault::random(&mut dice, world.sidecars.len());
        sleep(planned.after).await;
        let kind = planned.fault.kind();
        planned
            .fault
            .strike(&mut world, planned.lasts)
            .await
            .with_context(|| format!("seed {}: {planned:?} after {:?}", seed.0, report.faults))?;
        *report.faults.entry(kind).or_default() += 1;
    }
    calm.store(true, Relaxed);
    let mut violations = finish(workers).await?;
    let residue = residue(&world).await?;
    let rows = rows::of_postgres(&world.database_url()).await?;
    violations.extend(residue);
    conclude(seed, report, violations, &world.recorder, &rows, &world.application)
}

/// One process with the embedded store, killed again and again.
///
/// # Errors
/// Whatever was violated, with the histories of the events concerned.
pub async fn on_sqlite(seed: Seed, lasts: Duration) -> Result<Report> {
    let guard = *seed.dice("run").one_of(&[Guard::Token, Guard::EventId]);
    let recorder = Recorder::default();
    let application = Application::start(guard, Temper::Moody(seed), recorder.clone()).await?;
    let directory = tempfile::tempdir()?;
    let (callers, providers) = (Proxy::start(application.address()).await?, Proxy::start(application.address()).await?);
    let to_application = Proxy::start(application.address()).await?;
    let start_all = async || -> Result<Running> {
        let mut program = Oncegate::new(directory.path(), ["all"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("GATEWAY_LISTEN", "127.0.0.1:0")
            .env("UPSTREAM_URL", format!("http://{}/payments", to_application.address()))
            .env("STRIPE_WEBHOOK_SECRET", super::world::SECRET)
            .env("LOCK_DURATION", format!("{}s", LOCK.as_secs()))
            .env("ATTEMPTS_MAX", "0")
            .env("UPSTREAM_TIMEOUT", "1s")
            .env("UPSTREAM_CONNECT_TIMEOUT", "500ms")
            .env("GATEWAY_LOCK_DURATION", format!("{}s", LOCK.as_secs()))
            .env("GATEWAY_LOCK_MARGIN", "1s")
            .env("GATEWAY_WAIT_DURATION", "1s")
            .env("GATEWAY_ANSWER_TIMEOUT", "5s")
            .start()?;
        callers.set_target(program.address("sidecar").await?);
        providers.set_target(program.address("gateway").await?);
        Ok(program)
    };
    let mut program = start_all().await?;
    let calm = Arc::new(AtomicBool::new(false));
    let ways = Ways {
        sidecars: vec![format!("http://{}", callers.address())],
        gateways: vec![providers.address()],
        recorder: recorder.clone(),
        calm: Arc::clone(&calm),
    };
    let workers = start(&ways, seed, 4, 3);
    let mut report = Report::default();
    let mut dice = seed.dice("faults");
    let end = Instant::now() + lasts;
    while Instant::now() < end {
        sleep(dice.millis(100, 900)).await;
        let kind = strike_single(&mut dice, &mut program, &[&callers, &providers, &to_application], &start_all).await?;
        *report.faults.entry(kind.to_owned()).or_default() += 1;
    }
    calm.store(true, Relaxed);
    let violations = finish(workers).await?;
    program.stop().await?;
    let rows = rows::of_sqlite(&directory.path().join("oncegate.db"))?;
    conclude(seed, report, violations, &recorder, &rows, &application)
}

async fn strike_single(
    dice: &mut Dice,
    program: &mut Running,
    ways: &[&Proxy],
    start: &impl AsyncFn() -> Result<Running>,
) -> Result<&'static str> {
    Ok(match dice.between(0, 9) {
        0..5 => {
            program.kill().await?;
            *program = start().await?;
            "process killed"
        }
        5..7 => {
            program.freeze()?;
            sleep(dice.millis(100, 3_500)).await;
            program.thaw()?;
            "process frozen"
        }
        _ => {
            dice.one_of(ways).reset();
            "connections reset"
        }
    })
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
            // A statement of the product's ends within its time-out; what waits for a lock longer than that hangs.
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
    ensure!(
        violations.is_empty(),
        "seed {}, guard {:?}, {} violations, {report:#?}\n{}",
        seed.0,
        application.guard(),
        violations.len(),
        check::explain(&violations, &operations, rows)
    );
    Ok(report)
}
