//! The closed loop: every caller asks, waits for the answer, and asks again.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::sync::Barrier;
use tokio_util::sync::CancellationToken;

use super::{
    sample::Sample,
    tally::{Correctness, Operation, SharedTally, Tally},
    target::{Answer, Caller, Fault, Verdict},
};
use crate::failure::Failure;

/// The number of the first event that is sent repeatedly: far from the new ones.
pub(super) const KEYS_FROM: u64 = 900_000_000_000;
/// Claims of duplicates and of the final check use other claim ids than the claims that completed the events.
const DUPLICATE: u32 = 20_000;
const CHECK: u32 = 40_000;
/// The first call's claim ids are its own too, and differ from run to run.
const FIRST: std::ops::Range<u32> = 60_000..100_000;
/// The most callers, so that the kinds of claims stay distinct.
pub(super) const CALLERS_MAX: u32 = 20_000;
/// The pause after a failed call: a server in trouble is asked no more often than this.
const PAUSE: Duration = Duration::from_millis(10);
/// How often a step that has to succeed before or after the load is tried.
const TRIES: u32 = 10;

/// How long the first call is repeated when it fails.
const FIRST_MAX: Duration = Duration::from_secs(1);

/// The events of the first call, far from all others: whether there is one says whether a run of that name has been before.
mod first {
    /// Of a run with new events.
    pub(super) const NEW: u64 = 990_000_000_000;
    /// Of a run that completes the events to send duplicates of.
    pub(super) const PREPARES: u64 = NEW + 1;
    /// Of a run that finds them completed; it may be there.
    pub(super) const PREPARED: u64 = NEW + 2;
}

/// What the callers do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Workload {
    /// New events.
    Cycle,
    /// New events that are locked, but not completed during the measurement.
    Claims,
    /// Duplicates of completed events.
    Duplicates,
    /// All callers at once for one new event, again and again.
    Storm,
    /// New events, and this share of duplicates.
    Mixed(f64),
}

impl Workload {
    /// Its name in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cycle => "cycle",
            Self::Claims => "claims",
            Self::Duplicates => "duplicates",
            Self::Storm => "storm",
            Self::Mixed(_) => "mixed",
        }
    }
}

/// What all threads of a run have in common.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) workload: Workload,
    pub(super) concurrency: u32,
    pub(super) keys: u64,
    /// Whether events locked by the claims workload stay locked.
    leave_locked: bool,
    /// Whether an earlier run has completed the events to send duplicates of.
    prepared: bool,
    /// Of those, the ones that were not completed, and whether this run has been granted them.
    unprepared: Mutex<HashMap<u64, bool>>,
    warm_up: Duration,
    duration: Duration,
    /// How many completions one caller remembers for the check, at most.
    pub(super) check_max: usize,
    /// Set to end early; what was measured so far counts.
    pub(super) stop: AtomicBool,
    /// Cancelled when a thread cannot begin, since the others wait for it.
    pub(super) failed: CancellationToken,
    window: OnceLock<Window>,
    start: Barrier,
    round: Barrier,
    storm: Storm,
}

/// When the measured time begins and ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) from: Instant,
    pub(super) until: Instant,
}

/// The storm under way.
#[derive(Debug, Default)]
struct Storm {
    winners: AtomicU32,
    faults: AtomicU32,
    over: AtomicBool,
}

/// What the progress line reads.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Operations that were answered.
    pub(super) done: AtomicU64,
    /// Calls that failed.
    pub(super) failed: AtomicU64,
    /// Completions checked at the end, and events completed then.
    pub(super) checked: AtomicU64,
}

/// Why a thread has measured nothing.
#[derive(Debug)]
pub(super) enum NotMeasured {
    /// Another thread could not begin, and reports why.
    AnotherFailed,
    /// Nobody answers at the target, or nobody who speaks its protocol.
    Unreachable(anyhow::Error),
    /// The target refuses, or something is wrong here.
    Failed(anyhow::Error),
}

impl NotMeasured {
    /// A call failed that has to succeed before there is anything to measure.
    fn by(fault: Fault, what: &'static str) -> Self {
        let error = anyhow::anyhow!("{}", fault.code).context(what);
        if fault.answered { Self::Failed(error) } else { Self::Unreachable(error) }
    }
}

impl From<anyhow::Error> for NotMeasured {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<NotMeasured> for Failure {
    fn from(error: NotMeasured) -> Self {
        match error {
            NotMeasured::AnotherFailed => Self::Failed(anyhow::anyhow!("another thread of the load could not begin")),
            NotMeasured::Unreachable(error) => Self::Unreachable(error),
            NotMeasured::Failed(error) => Self::Failed(error),
        }
    }
}

/// The limits of a run.
pub(super) struct Limits {
    pub(super) concurrency: u32,
    pub(super) threads: u32,
    pub(super) keys: u64,
    pub(super) prepared: bool,
    pub(super) leave_locked: bool,
    pub(super) warm_up: Duration,
    pub(super) duration: Duration,
    pub(super) check_max: usize,
}

impl Run {
    pub(super) fn new(workload: Workload, limits: Limits) -> Self {
        Self {
            workload,
            concurrency: limits.concurrency,
            keys: limits.keys,
            prepared: limits.prepared,
            unprepared: Mutex::default(),
            leave_locked: limits.leave_locked,
            warm_up: limits.warm_up,
            duration: limits.duration,
            check_max: limits.check_max,
            stop: AtomicBool::new(false),
            failed: CancellationToken::new(),
            window: OnceLock::new(),
            start: Barrier::new(limits.threads as usize),
            round: Barrier::new(limits.concurrency as usize),
            storm: Storm::default(),
        }
    }

    /// The measured time, once its beginning is known.
    pub(super) fn window(&self) -> Option<Window> {
        self.window.get().copied()
    }

    fn has_duplicates(&self) -> bool {
        matches!(self.workload, Workload::Duplicates | Workload::Mixed(_))
    }

    /// What it means that an event which duplicates are sent of is not completed, by whether it was granted. If an earlier run
    /// was to complete it, that run may not have done so; a second grant is one too many all the same.
    fn not_completed(&self, event: u64, granted: bool, correctness: &mut Correctness) {
        if !self.prepared {
            let wrong = if granted { &mut correctness.double_grants } else { &mut correctness.unexpected };
            *wrong += 1;
            return;
        }
        match self.unprepared.lock().unwrap_or_else(PoisonError::into_inner).entry(event) {
            Entry::Vacant(entry) => {
                entry.insert(granted);
                correctness.unprepared += 1;
            }
            Entry::Occupied(entry) if *entry.get() => correctness.double_grants += u64::from(granted),
            Entry::Occupied(mut entry) => *entry.get_mut() = granted,
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn is_over(&self, window: Window) -> bool {
        self.is_stopped() || Instant::now() >= window.until
    }
}

/// Runs the callers of one thread, in that thread's own runtime, and checks at the end what they were told.
///
/// # Errors
/// When the first call fails, or the events to send duplicates of cannot be completed first.
pub(super) async fn run(
    run: &Arc<Run>,
    callers: Vec<(u32, Caller)>,
    progress: &Arc<Progress>,
) -> Result<(Tally, Duration), NotMeasured> {
    let tally = Arc::new(SharedTally::default());
    let mut workers: Vec<Worker> = callers
        .into_iter()
        .map(|(number, caller)| Worker {
            run: Arc::clone(run),
            tally: Arc::clone(&tally),
            progress: Arc::clone(progress),
            caller,
            number,
            next: u64::from(number),
            acknowledged: Sample::of(run.check_max),
            locked: Vec::new(),
        })
        .collect();
    workers = each(workers, Step::Begin).await?;
    if run.has_duplicates() && !run.prepared {
        workers = each(workers, Step::Prepare).await?;
    }
    tokio::select! {
        _ = run.start.wait() => {}
        () = run.failed.cancelled() => return Err(NotMeasured::AnotherFailed),
    }
    let window = *run.window.get_or_init(|| {
        let from = Instant::now() + run.warm_up;
        Window { from, until: from + run.duration }
    });
    workers = each(workers, Step::Load(window)).await?;
    let measured = Instant::now().min(window.until).saturating_duration_since(window.from);
    workers = each(workers, Step::Complete).await?;
    each(workers, Step::Check).await?;
    Ok((std::mem::take(&mut *tally.lock()), measured))
}

/// One part of a run, for every worker at once.
async fn each(workers: Vec<Worker>, step: Step) -> Result<Vec<Worker>, NotMeasured> {
    let tasks: Vec<_> = workers.into_iter().map(|worker| tokio::spawn(worker.take(step))).collect();
    let mut workers = Vec::with_capacity(tasks.len());
    for task in tasks {
        workers.push(task.await.context("a caller panicked")??);
    }
    Ok(workers)
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Begin,
    Prepare,
    Load(Window),
    Complete,
    Check,
}

/// One caller, what it does, and what it was told.
struct Worker {
    run: Arc<Run>,
    tally: Arc<SharedTally>,
    progress: Arc<Progress>,
    caller: Caller,
    /// Among all callers of the run.
    number: u32,
    /// Its next new event. Callers count in steps of the number of callers, so that no two ask for the same event.
    next: u64,
    /// Of the events whose completion was acknowledged to it, those that it will ask for again.
    acknowledged: Sample,
    /// Events that it has locked and not completed, with their fencing tokens.
    locked: Vec<(u64, i64)>,
}

impl Worker {
    async fn take(mut self, step: Step) -> Result<Self, NotMeasured> {
        match step {
            // Once for all.
            Step::Begin if self.number == 0 => self.begin().await?,
            Step::Begin => {}
            Step::Prepare => self.prepare().await?,
            Step::Load(window) if self.run.workload == Workload::Storm => self.storms(window).await,
            Step::Load(window) => self.load(window).await,
            Step::Complete => self.complete().await,
            Step::Check => self.check().await,
        }
        Ok(self)
    }

    /// Finds out with the first calls whether the load can be made at all: the wrong protocol, port, secret or token, or a
    /// name that was used before, would otherwise be found at the end, as nothing but failed calls.
    async fn begin(&mut self) -> Result<(), NotMeasured> {
        let prepares = self.run.has_duplicates() && !self.run.prepared;
        if self.run.workload != Workload::Duplicates {
            self.begin_with(first::NEW).await?;
        }
        if prepares {
            self.begin_with(first::PREPARES).await?;
        }
        if self.run.workload == Workload::Duplicates && !prepares {
            self.begin_with(first::PREPARED).await?;
        }
        Ok(())
    }

    async fn begin_with(&mut self, event: u64) -> Result<(), NotMeasured> {
        let began = Instant::now();
        let caller = rand::random_range(FIRST);
        let mut tries = 0;
        let verdict = loop {
            match self.caller.process(event, caller).await {
                Ok(answer) => break answer.verdict,
                Err(fault) if began.elapsed() >= FIRST_MAX || self.run.is_stopped() => {
                    return Err(NotMeasured::by(fault, "the first call failed, and nothing was measured"));
                }
                Err(_) => tokio::time::sleep(PAUSE * (1 << tries)).await,
            }
            tries += 1;
        };
        match verdict {
            Verdict::Granted => self.acknowledge(event),
            // Or completed by an earlier try, whose answer was lost.
            Verdict::Completed if event == first::PREPARED || tries > 0 => {}
            Verdict::Completed | Verdict::InProgress => {
                return Err(NotMeasured::Failed(anyhow::anyhow!(
                    "--run: a run of this name has been before, and its events are there. Choose another name, or none"
                )));
            }
            Verdict::Refused => {
                let error = anyhow::anyhow!("a new event was answered {verdict:?}, and nothing was measured");
                return Err(NotMeasured::Failed(error));
            }
        }
        Ok(())
    }

    /// Completes its share of the events to send duplicates of.
    async fn prepare(&mut self) -> Result<(), NotMeasured> {
        const FAILED: &str = "cannot complete the events to send again";
        let mut key = u64::from(self.number);
        while key < self.run.keys && !self.run.is_stopped() && !self.run.failed.is_cancelled() {
            let mut tries = 0;
            let answer = loop {
                match self.caller.process(KEYS_FROM + key, self.number).await {
                    Ok(answer) => break answer,
                    // The first call was answered: somebody is there.
                    Err(fault) if tries == TRIES || self.run.is_stopped() => {
                        let error = anyhow::anyhow!("{}", fault.code);
                        return Err(NotMeasured::Failed(error.context(FAILED)));
                    }
                    Err(_) => tokio::time::sleep(PAUSE * (1 << tries)).await,
                }
                tries += 1;
            };
            match answer.verdict {
                Verdict::Granted => self.acknowledge(KEYS_FROM + key),
                // Completed by an earlier try whose answer was lost.
                Verdict::Completed => {}
                Verdict::InProgress | Verdict::Refused => {
                    let error = anyhow::anyhow!("a new event was answered {:?}", answer.verdict);
                    return Err(NotMeasured::Failed(error.context(FAILED)));
                }
            }
            key += u64::from(self.run.concurrency);
        }
        Ok(())
    }

    /// New events, duplicates, or both.
    async fn load(&mut self, window: Window) {
        while !self.run.is_over(window) {
            let duplicate = match self.run.workload {
                Workload::Duplicates => true,
                Workload::Mixed(share) => rand::random_bool(share),
                Workload::Cycle | Workload::Claims | Workload::Storm => false,
            };
            if duplicate {
                let event = KEYS_FROM + rand::random_range(0..self.run.keys);
                let answer = self.caller.process(event, DUPLICATE + self.number).await;
                self.count(window, &answer, |tally, answer| tally.record(Operation::Duplicate, answer.first));
                match answer.map(|answer| answer.verdict) {
                    Ok(Verdict::Completed) => {}
                    Ok(verdict @ (Verdict::Granted | Verdict::InProgress)) => {
                        let granted = verdict == Verdict::Granted;
                        self.run.not_completed(event, granted, &mut self.tally.lock().correctness);
                    }
                    Ok(Verdict::Refused) => self.tally.lock().correctness.unexpected += 1,
                    Err(_) => tokio::time::sleep(PAUSE).await,
                }
            } else {
                let event = self.next;
                self.next += u64::from(self.run.concurrency);
                if self.run.workload == Workload::Claims {
                    self.claim(window, event).await;
                    continue;
                }
                let answer = self.caller.process(event, self.number).await;
                self.count(window, &answer, |tally, answer| {
                    tally.record(Operation::Cycle, answer.first + answer.completion.unwrap_or_default());
                    if let Some(completion) = answer.completion {
                        tally.record(Operation::CheckAndLock, answer.first);
                        tally.record(Operation::MarkCompleted, completion);
                    }
                });
                match answer.map(|answer| answer.verdict) {
                    Ok(Verdict::Granted) => self.acknowledge(event),
                    Ok(_) => self.tally.lock().correctness.unexpected += 1,
                    Err(_) => tokio::time::sleep(PAUSE).await,
                }
            }
        }
    }

    /// Locks a new event, without completing it for now.
    async fn claim(&mut self, window: Window, event: u64) {
        let began = Instant::now();
        let answer = self.caller.claim(event, self.number).await;
        if let Ok((Verdict::Granted, token)) = answer
            && !self.run.leave_locked
        {
            self.locked.push((event, token));
        }
        let answer = answer.map(|(verdict, _)| Answer { verdict, first: began.elapsed(), completion: None });
        self.count(window, &answer, |tally, answer| tally.record(Operation::CheckAndLock, answer.first));
        match answer.map(|answer| answer.verdict) {
            Ok(Verdict::Granted) => {}
            Ok(_) => self.tally.lock().correctness.unexpected += 1,
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }

    /// Completes what it has locked: no cleanup deletes events that are being processed, and once their locks expire they are
    /// stuck.
    async fn complete(&mut self) {
        // If one cannot be completed in all that time, neither can the others.
        let mut given_up = None;
        for (event, token) in std::mem::take(&mut self.locked) {
            let mut tries = 0;
            while given_up.is_none()
                && let Err(fault) = self.caller.complete(event, self.number, token).await
            {
                if tries == TRIES {
                    given_up = Some(format!("left locked: {}", fault.code));
                } else {
                    tokio::time::sleep(PAUSE * (1 << tries)).await;
                    tries += 1;
                }
            }
            match &given_up {
                Some(code) => self.tally.lock().error(code),
                None => self.acknowledge(event),
            }
            self.progress.checked.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All callers ask for one new event at once, again and again.
    async fn storms(&mut self, window: Window) {
        let run = Arc::clone(&self.run);
        for event in 0.. {
            run.round.wait().await;
            if run.storm.over.load(Ordering::Relaxed) {
                break;
            }
            let answer = self.caller.process(event, self.number).await;
            self.count(window, &answer, |tally, answer| tally.record(Operation::Storm, answer.first));
            match answer.map(|answer| answer.verdict) {
                Ok(Verdict::Granted) => {
                    run.storm.winners.fetch_add(1, Ordering::Relaxed);
                    self.acknowledge(event);
                }
                Ok(Verdict::Completed | Verdict::InProgress) => {}
                Ok(Verdict::Refused) => self.tally.lock().correctness.unexpected += 1,
                Err(_) => {
                    run.storm.faults.fetch_add(1, Ordering::Relaxed);
                }
            }
            // The barriers order the counts: all of this storm's happen before, all of the next one's after.
            if run.round.wait().await.is_leader() {
                let winners = run.storm.winners.swap(0, Ordering::Relaxed);
                let faults = run.storm.faults.swap(0, Ordering::Relaxed);
                {
                    let correctness = &mut self.tally.lock().correctness;
                    correctness.storms += 1;
                    correctness.double_grants += u64::from(winners.saturating_sub(1));
                    // A caller that got no answer may have won.
                    correctness.storms_without_winner += u64::from(winners == 0 && faults == 0);
                }
                if faults > 0 {
                    tokio::time::sleep(PAUSE).await;
                }
                run.storm.over.store(run.is_over(window), Ordering::Relaxed);
            }
        }
    }

    /// Asks again for the acknowledged completions that were remembered: all of them have to be there.
    async fn check(&mut self) {
        let acknowledged = std::mem::replace(&mut self.acknowledged, Sample::of(0));
        self.tally.lock().correctness.left_out += acknowledged.left_out();
        // If one gets no answer in all that time, neither will the others. Nothing is known about them then, which does not
        // mean that they are there.
        let mut given_up = None;
        for event in acknowledged.into_events() {
            let mut tries = 0;
            while given_up.is_none() {
                match self.caller.ask(event, CHECK + self.number).await {
                    Ok(verdict) => {
                        let correctness = &mut self.tally.lock().correctness;
                        correctness.checked += 1;
                        correctness.lost += u64::from(verdict != Verdict::Completed);
                        correctness.double_grants += u64::from(verdict == Verdict::Granted);
                        break;
                    }
                    Err(fault) if tries == TRIES || self.run.is_stopped() => {
                        given_up = Some(format!("not asked for again: {}", fault.code));
                    }
                    Err(_) => {
                        tokio::time::sleep(PAUSE * (1 << tries)).await;
                        tries += 1;
                    }
                }
            }
            if let Some(code) = &given_up {
                let mut tally = self.tally.lock();
                tally.error(code);
                tally.correctness.unchecked += 1;
            }
            self.progress.checked.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts an answer, or an error, if it falls into the measured time.
    fn count(&self, window: Window, answer: &Result<Answer, Fault>, record: impl FnOnce(&mut Tally, &Answer)) {
        let now = Instant::now();
        let measured = now >= window.from && now < window.until;
        match answer {
            Ok(answer) => {
                self.progress.done.fetch_add(1, Ordering::Relaxed);
                if measured {
                    record(&mut self.tally.lock(), answer);
                }
            }
            Err(fault) => {
                self.progress.failed.fetch_add(1, Ordering::Relaxed);
                self.tally.lock().error(&fault.code);
            }
        }
    }

    fn acknowledge(&mut self, event: u64) {
        self.tally.lock().correctness.acknowledged += 1;
        self.acknowledged.add(event, &mut rand::rng());
    }
}
