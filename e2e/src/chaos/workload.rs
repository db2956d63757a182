//! What callers do: random moves on few events at a time, from a seed, and at the end whatever is needed to finish them.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Result;
use oncegate_api::v1::State;
use tokio::time::{Instant, sleep};

use super::{
    client::{Caller, webhook, with_fingerprint},
    history::{Ending, Recorder, Reply},
    seed::{Dice, Seed},
    world::LOCK,
};

/// Callers at one event at once.
const ACTORS: usize = 3;

/// Moves of each caller: few enough that the search for an order of them all ends.
const MOVES_MAX: u64 = 5;

/// How long after the last fault everything may take to be finished (I8): the lock of a caller that died with it, a
/// gateway's answer that takes all of its time, the next try after it, and the delays of a busy machine.
pub const PROGRESS_MAX: Duration = Duration::from_secs(12);

/// How to reach the world while others interfere with it.
#[derive(Clone, Debug)]
pub struct Ways {
    /// Of the sidecars.
    pub sidecars: Vec<String>,
    /// Of the gateways; if empty, no webhooks are sent.
    pub gateways: Vec<SocketAddr>,
    /// Where everything is recorded.
    pub recorder: Recorder,
    /// When the faults were over.
    pub calm: Arc<OnceLock<Instant>>,
}

impl Ways {
    fn callers(&self) -> Result<Vec<Caller>> {
        self.sidecars.iter().map(|url| Caller::new(url, self.recorder.clone())).collect()
    }

    fn is_calm(&self) -> bool {
        self.calm.get().is_some()
    }

    /// Waits until the faults are over; returns the time by which everything has to be finished.
    async fn wait_for_calm(&self) -> Instant {
        loop {
            if let Some(calm) = self.calm.get() {
                return *calm + PROGRESS_MAX;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// One direct worker: takes one event after the other, and finishes what it began when all is calm. Returns the events
/// that it could not finish.
///
/// # Errors
/// An address that is none.
pub async fn direct(ways: Ways, seed: Seed, worker: usize) -> Result<Vec<String>> {
    let mut begun = Vec::new();
    for round in 0.. {
        if ways.is_calm() {
            break;
        }
        let event = format!("evt_direct_{worker}_{round}");
        let actors = (0..ACTORS).map(|actor| act(ways.clone(), seed.dice(&format!("{event} {actor}")), &event, actor));
        futures::future::try_join_all(actors).await?;
        begun.push(event);
    }
    let end = ways.wait_for_calm().await;
    let callers = ways.callers()?;
    // Each through a different sidecar than the one before: none of them may be stuck.
    let finished = begun.iter().enumerate().map(|(number, event)| {
        let mut caller = callers[number % callers.len()].clone();
        async move { (!finish(&mut caller, event, end).await).then(|| event.clone()) }
    });
    Ok(futures::future::join_all(finished).await.into_iter().flatten().collect())
}

async fn act(ways: Ways, mut dice: Dice, event: &str, actor: usize) -> Result<()> {
    let mut callers = ways.callers()?;
    // What it was last told it holds, whether or not it still does.
    let mut held: Option<(String, i64)> = None;
    let mut claims = 0;
    for _ in 0..dice.between(1, MOVES_MAX) {
        sleep(dice.millis(0, 120)).await;
        let place = dice.index(callers.len());
        let caller = &mut callers[place];
        let ending = match dice.between(0, 99) {
            0..60 => Ending::Completed,
            60..88 => Ending::Retryable,
            88..92 => Ending::Terminal,
            _ => Ending::Unknown,
        };
        let lock = dice.percent(50).then(|| Duration::from_secs(1));
        let wait = if dice.percent(25) { dice.millis(100, 1_500) } else { Duration::ZERO };
        let pause = if dice.percent(30) { dice.millis(100, 800) } else { Duration::ZERO };
        let choice = dice.between(0, 99);
        match (&held, choice) {
            // Mostly it continues with what it holds; now and then it forgets, is late, or repeats itself.
            (Some((claim_id, token)), 0..55) => {
                let reply = caller.mark(event, claim_id, *token, ending, pause).await;
                if matches!(reply, Some(Reply::LockLost { .. } | Reply::OutcomeConflict)) {
                    held = None;
                }
            }
            (Some((claim_id, token)), 55..70) => {
                caller.extend(event, claim_id, *token, Duration::from_secs(1)).await;
            }
            (Some(_), 70..78) => sleep(dice.millis(800, 1_400)).await,
            (Some((claim_id, _)), 78..84) => drop(caller.claim(event, claim_id, lock, wait).await),
            (_, 96..) => {
                let to = *dice.one_of(&[State::Pending, State::Completed, State::Dead]);
                let force = to == State::Pending && dice.percent(70);
                let reason = format!("{event} {actor} {claims}");
                claims += 1;
                caller.resolve(event, to, force, &reason).await;
            }
            _ => {
                claims += 1;
                // Now and then the same id comes with another meaning.
                let meaning = if dice.percent(12) { 2 } else { 1 };
                let claim_id = with_fingerprint(&format!("{event}-{actor}-{claims}"), meaning);
                let mut reply = caller.claim(event, &claim_id, lock, wait).await;
                if reply.is_none() && dice.percent(70) {
                    // The reply was lost: the same claim again.
                    reply = caller.claim(event, &claim_id, lock, wait).await;
                }
                if let Some(Reply::Acquired { token, .. }) = reply {
                    held = Some((claim_id, token));
                }
            }
        }
    }
    Ok(())
}

/// Does whatever is needed to finish an event; false if that takes too long.
async fn finish(caller: &mut Caller, event: &str, end: Instant) -> bool {
    for number in 0.. {
        let claim_id = format!("{event}-finish-{number}");
        // One call that waits, instead of many that poll.
        match caller.claim(event, &claim_id, None, LOCK + Duration::from_secs(1)).await {
            Some(Reply::AlreadyCompleted { .. } | Reply::Refused) => return true,
            Some(Reply::Acquired { token, .. }) => {
                let reply = caller.mark(event, &claim_id, token, Ending::Completed, Duration::ZERO).await;
                if matches!(reply, Some(Reply::Marked { .. })) {
                    return true;
                }
            }
            _ => sleep(Duration::from_millis(300)).await,
        }
        if Instant::now() >= end {
            break;
        }
    }
    false
}

/// One provider: sends each event until it gets 200, twice or more, to any gateway. Returns the events for which it never
/// did.
///
/// # Errors
/// An address that is none.
pub async fn provider(ways: Ways, seed: Seed, worker: usize) -> Result<Vec<String>> {
    let mut open: Vec<String> = Vec::new();
    for round in 0.. {
        if ways.is_calm() {
            break;
        }
        let event = format!("evt_webhook_{worker}_{round}");
        let mut dice = seed.dice(&event);
        let mut done = false;
        for _ in 0..dice.between(1, 4) {
            let first = dice.index(ways.gateways.len());
            let copies = if dice.percent(40) { 2 } else { 1 };
            let sent = (0..copies).map(|copy| {
                let gateway = (first + copy) % ways.gateways.len();
                webhook(&ways.recorder, &ways.gateways, gateway, &event)
            });
            let answers = futures::future::join_all(sent).await;
            done |= answers.iter().any(taken);
            if done && dice.percent(70) {
                break;
            }
            sleep(dice.millis(50, 600)).await;
        }
        if dice.percent(10) {
            // A direct caller of the application interferes with the same event.
            let mut callers = ways.callers()?;
            let place = dice.index(callers.len());
            let claim_id = format!("{event}-meddler");
            let reply = callers[place].claim(&event, &claim_id, None, Duration::ZERO).await;
            if let Some(Reply::Acquired { token, .. }) = reply {
                callers[place].mark(&event, &claim_id, token, Ending::Retryable, Duration::ZERO).await;
            }
        }
        if !done {
            open.push(event);
        }
        // Old ones are retried meanwhile, as providers do.
        if open.len() > 3 {
            let place = dice.index(open.len());
            let gateway = dice.index(ways.gateways.len());
            if taken(&webhook(&ways.recorder, &ways.gateways, gateway, &open[place]).await) {
                open.swap_remove(place);
            }
        }
    }
    let end = ways.wait_for_calm().await;
    let ways = &ways;
    let finished = open.into_iter().enumerate().map(|(number, event)| async move {
        for turn in number.. {
            if taken(&webhook(&ways.recorder, &ways.gateways, turn % ways.gateways.len(), &event).await) {
                return None;
            }
            if Instant::now() >= end {
                break;
            }
            sleep(Duration::from_millis(200)).await;
        }
        Some(event)
    });
    Ok(futures::future::join_all(finished).await.into_iter().flatten().collect())
}

fn taken(answer: &Option<Reply>) -> bool {
    matches!(answer, Some(Reply::Answered { status: 200, .. }))
}
