//! Every process killed, again and again, under load: what was acknowledged is there (I5).

use std::{
    collections::BTreeMap,
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
    application::{Guard, Temper},
    check,
    client::{Caller, webhook},
    history::{Ending, Reply},
    rows,
    seed::{Dice, Seed},
    world::World,
};
use crate::eventually::within;

/// What a run comes to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Kills, by the process.
    pub kills: BTreeMap<&'static str, u64>,
    /// Completions that were acknowledged, and found.
    pub acknowledged: u64,
    /// Webhooks answered 200, and found completed.
    pub answered: u64,
    /// Operations recorded.
    pub operations: usize,
}

impl Report {
    /// All kills.
    pub fn total(&self) -> u64 {
        self.kills.values().sum()
    }
}

/// Something must have been acknowledged between two kills, or they would prove nothing.
const PROGRESS_DEADLINE: Duration = Duration::from_secs(60);

/// Kills so many processes of a world under load, and checks what is left of it.
///
/// # Errors
/// Whatever was violated, with the history of the event.
pub async fn run(seed: Seed, kills: u64) -> Result<Report> {
    let mut world = World::start(2, Guard::EventId, Temper::Reliable).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(AtomicU64::new(0));
    let load = load(&world, seed, &stop, &acknowledged)?;
    let mut dice = seed.dice("kills");
    let mut report = Report::default();
    for _ in 0..kills {
        // Whatever it is that dies, it dies at work.
        let before = acknowledged.load(Relaxed);
        within(PROGRESS_DEADLINE, async || (acknowledged.load(Relaxed) >= before + 20).then_some(()))
            .await
            .with_context(|| format!("seed {}: nothing is acknowledged any more after {report:?}", seed.0))?;
        sleep(dice.millis(0, 60)).await;
        let victim = kill_one(&mut world, &mut dice).await.with_context(|| format!("seed {}", seed.0))?;
        *report.kills.entry(victim).or_default() += 1;
    }
    let before = acknowledged.load(Relaxed);
    within(PROGRESS_DEADLINE, async || (acknowledged.load(Relaxed) >= before + 20).then_some(()))
        .await
        .context("the load goes on after the last kill")?;
    stop.store(true, Relaxed);
    for worker in load {
        worker.await?;
    }
    let operations = world.recorder.operations();
    let rows = rows::of_postgres(&world.database_url()).await?;
    let deliveries = world.recorder.deliveries();
    let violations = check::safety(&check::Run {
        operations: &operations,
        deliveries: &deliveries,
        rows: &rows,
        effects: &world.application.effects(),
        guard: Guard::EventId,
    });
    ensure!(violations.is_empty(), "seed {}, {report:?}\n{}", seed.0, check::explain(&violations, &operations, &rows));
    let replies = || operations.iter().filter_map(|operation| operation.reply());
    report.acknowledged = count(replies().filter(|reply| matches!(reply, Reply::Marked { .. })));
    report.answered = count(replies().filter(|reply| matches!(reply, Reply::Answered { status: 200, .. })));
    report.operations = operations.len();
    Ok(report)
}

fn count(items: impl Iterator) -> u64 {
    items.map(|_| 1).sum()
}

fn load(
    world: &World,
    seed: Seed,
    stop: &Arc<AtomicBool>,
    acknowledged: &Arc<AtomicU64>,
) -> Result<Vec<AbortOnDropHandle<()>>> {
    let mut workers = Vec::new();
    let urls = world.sidecar_urls();
    for number in 0..6_usize {
        let mut callers =
            urls.iter().map(|url| Caller::new(url, world.recorder.clone())).collect::<Result<Vec<_>>>()?;
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
                // A reply that was lost is asked for again, as the contract has it.
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
    let gateways = world.gateway_addresses();
    for number in 0..3_usize {
        let (stop, acknowledged) = (Arc::clone(stop), Arc::clone(acknowledged));
        let (gateways, recorder) = (gateways.clone(), world.recorder.clone());
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

async fn kill_one(world: &mut World, dice: &mut Dice) -> Result<&'static str> {
    let number = dice.index(world.sidecars.len());
    Ok(match dice.between(0, 5) {
        0 | 1 => {
            let mut program = world.sidecars[number].program.take().context("a sidecar that runs")?;
            program.kill().await?;
            world.start_sidecar(number).await?;
            "sidecar"
        }
        2 | 3 => {
            let mut program = world.gateways[number].program.take().context("a gateway that runs")?;
            program.kill().await?;
            world.start_gateway(number).await?;
            "gateway"
        }
        4 => {
            world.cluster.kill()?;
            world.cluster.restart().await?;
            "postgres"
        }
        _ => {
            world.redis.kill()?;
            world.redis.restart().await?;
            "redis"
        }
    })
}
