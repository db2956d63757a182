//! Every process is killed again and again under load: what was acknowledged must still be there (I5).

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::{
    application::{Application, Guard, Temper},
    check::{
        self,
        linear::{self, Verdict},
    },
    client::{Caller, webhook},
    history::{Ending, Recorder, Reply},
    rows::{self, Rows},
    seed::Seed,
    single::Single,
    world::World,
};
use crate::eventually::within;

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Kills, by the process.
    pub kills: BTreeMap<String, u64>,
    /// Completions that were acknowledged, and found.
    pub acknowledged: u64,
    /// Webhooks answered 200, and found completed.
    pub answered: u64,
    /// Operations recorded.
    pub operations: usize,
    /// Histories found linearizable.
    pub linearizable: usize,
    /// Histories of direct callers whose check was given up.
    pub undecided: usize,
}

impl Report {
    /// All kills.
    pub fn total(&self) -> u64 {
        self.kills.values().sum()
    }
}

/// What can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Sidecar(usize),
    Gateway(usize),
    Postgres,
    Redis,
}

/// Every process of a world of two sidecars, once: the deck to be shuffled.
const DECK: [Victim; 6] =
    [Victim::Sidecar(0), Victim::Sidecar(1), Victim::Gateway(0), Victim::Gateway(1), Victim::Postgres, Victim::Redis];

/// The number of kills after which each of them has been hit.
pub const KILLS_OF_EACH: usize = DECK.len();

/// Something must have been acknowledged between two kills, or they would prove nothing.
const PROGRESS_DEADLINE: Duration = Duration::from_secs(60);

/// Kills this many processes of a world under load, each as often as the others, and checks what is left.
///
/// # Errors
/// Whatever was violated, with the history of the event.
pub async fn run(seed: Seed, kills: u64) -> Result<Report> {
    let mut world = World::start(2, Guard::EventId, Temper::Reliable).await?;
    let load = Load::start(&world.recorder, &world.sidecar_urls(), &world.gateway_addresses(), seed)?;
    let mut dice = seed.dice("kills");
    let mut report = Report::default();
    let mut deck = Vec::new();
    for _ in 0..kills {
        load.goes_on().await.with_context(|| format!("seed {}: after {report:?}", seed.0))?;
        sleep(dice.millis(0, 60)).await;
        if deck.is_empty() {
            deck = DECK.to_vec();
        }
        let victim = deck.swap_remove(dice.index(deck.len()));
        kill(&mut world, victim).await.with_context(|| format!("seed {}: {victim:?}", seed.0))?;
        *report.kills.entry(format!("{victim:?}")).or_default() += 1;
    }
    load.goes_on().await.context("the load goes on after the last kill")?;
    load.stop().await?;
    let rows = rows::of_postgres(&world.database_url()).await?;
    conclude(seed, report, &world.recorder, &rows, &world.application)
}

/// Kills the one process with the embedded store this many times under load, and checks what is left.
///
/// # Errors
/// Whatever was violated, with the history of the event.
pub async fn run_single(seed: Seed, kills: u64) -> Result<Report> {
    let mut single = Single::start(Guard::EventId, Temper::Reliable).await?;
    let sidecar = format!("http://{}", single.from_callers.address());
    let load = Load::start(&single.recorder, &[sidecar], &[single.from_providers.address()], seed)?;
    let mut dice = seed.dice("kills");
    let mut report = Report::default();
    for _ in 0..kills {
        load.goes_on().await.with_context(|| format!("seed {}: after {report:?}", seed.0))?;
        sleep(dice.millis(0, 60)).await;
        single.kill().await?;
        single.restart().await?;
        *report.kills.entry("process".to_owned()).or_default() += 1;
    }
    load.goes_on().await.context("the load goes on after the last kill")?;
    load.stop().await?;
    single.program.as_mut().context("a process that runs")?.stop().await?;
    let rows = rows::of_sqlite(&single.store())?;
    conclude(seed, report, &single.recorder, &rows, &single.application)
}

async fn kill(world: &mut World, victim: Victim) -> Result<()> {
    match victim {
        Victim::Sidecar(number) => {
            world.sidecars[number].program.take().context("a sidecar that runs")?.kill().await?;
            world.start_sidecar(number).await
        }
        Victim::Gateway(number) => {
            world.gateways[number].program.take().context("a gateway that runs")?.kill().await?;
            world.start_gateway(number).await
        }
        Victim::Postgres => {
            world.cluster.kill()?;
            world.cluster.restart().await
        }
        Victim::Redis => {
            world.redis.kill()?;
            world.redis.restart().await
        }
    }
}

fn conclude(
    seed: Seed,
    mut report: Report,
    recorder: &Recorder,
    rows: &Rows,
    application: &Application,
) -> Result<Report> {
    let (operations, deliveries) = (recorder.operations(), recorder.deliveries());
    let effects = application.effects();
    let guard = application.guard();
    let run = check::Run { operations: &operations, deliveries: &deliveries, rows, effects: &effects, guard };
    let mut violations = check::safety(&run);
    for one in check::by_event(&run).iter().filter(|one| !one.through_gateways()) {
        match linear::check(one) {
            Verdict::Linearizable => report.linearizable += 1,
            Verdict::Undecided => report.undecided += 1,
            Verdict::Broken(violation) => violations.push(violation),
        }
    }
    ensure!(violations.is_empty(), "seed {}, {report:?}\n{}", seed.0, check::explain(&violations, &run));
    let replies = || operations.iter().filter_map(|operation| operation.reply());
    report.acknowledged = count(replies().filter(|reply| matches!(reply, Reply::Marked { .. })));
    report.answered = count(replies().filter(|reply| matches!(reply, Reply::Answered { status: 200, .. })));
    report.operations = operations.len();
    Ok(report)
}

fn count(items: impl Iterator) -> u64 {
    items.map(|_| 1).sum()
}

/// Callers and providers that work until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    workers: Vec<AbortOnDropHandle<()>>,
}

impl Load {
    fn start(recorder: &Recorder, urls: &[String], gateways: &[SocketAddr], seed: Seed) -> Result<Self> {
        let (stop, acknowledged) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let workers = workers(recorder, urls, gateways, seed, &stop, &acknowledged)?;
        Ok(Self { stop, acknowledged, workers })
    }

    /// Waits for more to be acknowledged, so that whatever dies next dies while working.
    async fn goes_on(&self) -> Result<()> {
        let before = self.acknowledged.load(Relaxed);
        within(PROGRESS_DEADLINE, async || (self.acknowledged.load(Relaxed) >= before + 20).then_some(()))
            .await
            .context("nothing is acknowledged any more")
    }

    async fn stop(self) -> Result<()> {
        self.stop.store(true, Relaxed);
        for worker in self.workers {
            worker.await?;
        }
        Ok(())
    }
}

fn workers(
    recorder: &Recorder,
    urls: &[String],
    gateways: &[SocketAddr],
    seed: Seed,
    stop: &Arc<AtomicBool>,
    acknowledged: &Arc<AtomicU64>,
) -> Result<Vec<AbortOnDropHandle<()>>> {
    let mut workers = Vec::new();
    for number in 0..6_usize {
        let mut callers = urls.iter().map(|url| Caller::new(url, recorder.clone())).collect::<Result<Vec<_>>>()?;
        let (stop, acknowledged) = (Arc::clone(stop), Arc::clone(acknowledged));
        let mut dice = seed.dice(&format!("caller {number}"));
        workers.push(AbortOnDropHandle::new(tokio::spawn(async move {
            for round in 0.. {
                if stop.load(Relaxed) {
                    return;
                }
                let event = format!("evt_direct_{number}_{round}");
                let claim_id = format!("claim_{number}_{round}");
                let place = dice.index(callers.len());
                let caller = &mut callers[place];
                // After a lost reply it asks again, as the contract says.
                let mut reply = None;
                for _ in 0..2 {
                    reply = caller.claim(&event, &claim_id, None, Duration::ZERO).await;
                    match reply {
                        None | Some(Reply::Nothing) => sleep(Duration::from_millis(50)).await,
                        Some(_) => break,
                    }
                }
                let Some(Reply::Acquired { token, .. }) = reply else { continue };
                let marked = caller.mark(&event, &claim_id, token, Ending::Completed, Duration::ZERO).await;
                if matches!(marked, Some(Reply::Marked { .. })) {
                    acknowledged.fetch_add(1, Relaxed);
                }
                sleep(Duration::from_millis(2)).await;
            }
        })));
    }
    for number in 0..3_usize {
        let (stop, acknowledged) = (Arc::clone(stop), Arc::clone(acknowledged));
        let (gateways, recorder) = (gateways.to_vec(), recorder.clone());
        let mut dice = seed.dice(&format!("provider {number}"));
        workers.push(AbortOnDropHandle::new(tokio::spawn(async move {
            for round in 0.. {
                if stop.load(Relaxed) {
                    return;
                }
                let event = format!("evt_webhook_{number}_{round}");
                for _ in 0..3 {
                    let gateway = dice.index(gateways.len());
                    match webhook(&recorder, &gateways, gateway, &event).await {
                        Some(Reply::Answered { status: 200, .. }) => {
                            acknowledged.fetch_add(1, Relaxed);
                            break;
                        }
                        _ => sleep(Duration::from_millis(50)).await,
                    }
                }
                sleep(Duration::from_millis(2)).await;
            }
        })));
    }
    Ok(workers)
}
