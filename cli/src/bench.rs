//! `oncegate bench`: how much load an installation handles, and whether it does so correctly.

mod connection;
mod grpc;
mod http;
mod load;
mod message;
mod options;
mod report;
mod sample;
mod tally;
mod target;

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use oncegate_gateway::sidecar::Reach;
use oncegate_runtime::{
    config::{Problem, Problems, byte_size, duration},
    secret::{SecretText, file},
    shutdown::{self, CancellationToken},
};
use tokio::task::JoinHandle;

use self::{
    connection::Connection,
    grpc::Sidecar,
    http::{Gateway, Shared},
    load::{CALLERS_MAX, KEYS_FROM, NotMeasured, Progress, Run, Workload},
    message::Messages,
    report::{About, Report},
    tally::Tally,
    target::Caller,
};
use crate::{
    failure::Failure,
    http_client, output,
    sidecar_client::Credentials,
    simulate::{self, stripe},
};

/// A running server accepts a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The provider of events by default, over gRPC.
const PROVIDER: &str = "bench";
/// The size of a webhook's body by default.
const BODY_BYTES: u64 = 2 * 1024;

/// Measure what an installation does under load, and whether it does it right
///
/// Every caller asks, waits for the answer, and asks again. Afterwards, what was acknowledged as completed is asked for
/// again: by each caller all of its completions, or a random sample of them where they are more than its share of --check-max.
/// Each of those has to be there, and nothing may have been granted twice.
///
/// It WRITES REAL EVENTS, as many as the service takes. With --target grpc they are of the tenant "bench" and the
/// provider of --provider: `oncegate cleanup --tenant bench --days 7` deletes them once they are old enough. With --target
/// http they go through the gateway to the application behind it, as Stripe's webhooks whose ids begin with bench-: point it
/// at a gateway whose application may get them. They are of the gateway's tenant (GATEWAY_TENANT, "default") and the provider
/// "stripe", as genuine ones are, and a cleanup tells them from these by nothing: use a database of its own that is dropped.
///
/// Exits with 0 if nothing was answered wrongly. Calls that failed are counted by their code, and are not wrong. The first
/// SIGINT or SIGTERM ends the measurement; what was measured until then is checked and reported, and the exit code is the
/// signal's.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate bench
  oncegate bench --workload duplicates --concurrency 256 --duration 30s
  oncegate bench --workload storm --concurrency 100
  oncegate bench --workload mixed --duplicate-share 0.3 --json
  oncegate bench --url https://sidecar.example.com:50051 --ca-file ca.pem --token-file token.txt
  oncegate bench --target http --url http://127.0.0.1:8080 --secret-file secret.txt")]
pub(crate) struct Bench {
    /// What to call: a sidecar, or a gateway with signed webhooks
    #[arg(long, value_enum, default_value = "grpc")]
    target: TargetName,

    /// Where it is [default: for a sidecar SIDECAR_URL, or http://127.0.0.1:50051; for a gateway the one of `oncegate dev`
    /// in this directory, or http://127.0.0.1:8080]
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// Where the other commands find the sidecar. Not the default of --url itself, which may be a gateway's.
    #[arg(long, env = "SIDECAR_URL", hide = true, default_value = "http://127.0.0.1:50051")]
    sidecar_url: String,

    /// What the callers do
    #[arg(long, value_enum, default_value = "cycle")]
    workload: WorkloadName,

    /// Callers at once
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(CALLERS_MAX)))]
    concurrency: u32,

    /// Connections that the callers share (--target grpc) [default: one for 32 callers, at most 16]. Over HTTP each caller has
    /// its own
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connections: Option<u32>,

    /// Threads that make the load. One is enough for more than 100,000 calls a second
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,

    /// How long to measure
    #[arg(long, default_value = "10s", value_name = "DURATION", value_parser = duration)]
    duration: Duration,

    /// How long to run before that
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = duration)]
    warm_up: Duration,

    /// Leave what --workload claims has locked as it is. Nothing deletes it, and when the locks have expired the sidecar
    /// counts it as stuck
    #[arg(long)]
    leave_locked: bool,

    /// How many completed events duplicates are sent of
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    keys: u64,

    /// The name of the run, which is part of every event id: up to 16 letters and digits, and not used before [default: made
    /// up]
    #[arg(long, value_name = "NAME")]
    run: Option<String>,

    /// Send duplicates of the events that an earlier run of this name, with as many keys, has completed
    #[arg(long, requires = "run")]
    prepared: bool,

    /// The share of duplicates, from 0 to 1 (--workload mixed) [default: 0.3]
    #[arg(long, value_name = "SHARE")]
    duplicate_share: Option<f64>,

    /// How long to wait for each answer
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = duration)]
    timeout: Duration,

    /// The most completions to ask for again at the end, shared out equally among the callers and rounded up. A caller that has
    /// more than its share asks for a random sample of them, and the report says how many were left out; 0 to ask for none
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    check_max: u64,

    /// The provider of the events (--target grpc) [default: bench]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,

    /// How large a webhook's body is (--target http); a gateway takes up to 256KiB unless GATEWAY_BODY_BYTES_MAX says otherwise
    /// [default: 2KiB]
    #[arg(long, value_name = "SIZE", value_parser = byte_size)]
    body_size: Option<u64>,

    /// The secret to sign webhooks with. Other users of the machine see arguments: prefer the environment
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET", hide_env_values = true, value_name = "SECRET")]
    secret: Option<SecretText>,

    /// A file with the secret to sign webhooks with
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET_FILE", value_name = "FILE", value_parser = file)]
    secret_file: Option<PathBuf>,

    // Of a gateway with TLS, only the authorities are asked for.
    #[command(flatten)]
    credentials: Credentials,

    /// How often to say how far it is, where standard error is no terminal, or one that cannot change a line
    #[arg(long, default_value = "10s", value_name = "DURATION", value_parser = duration)]
    progress: Duration,

    /// Show the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum TargetName {
    /// A sidecar
    Grpc,
    /// A gateway
    Http,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum WorkloadName {
    /// New events, each locked and completed
    Cycle,
    /// New events, each locked; completed after the measurement, so that they can be deleted (--target grpc)
    Claims,
    /// Duplicates of completed events
    Duplicates,
    /// All callers at once for one new event, again and again: one wins
    Storm,
    /// New events and duplicates
    Mixed,
}

impl TargetName {
    /// Its name in reports.
    fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        }
    }
}

/// What the callers are shared out over.
#[derive(Clone, Copy, Debug)]
struct Shares {
    threads: u32,
    /// Of all threads together.
    connections: u32,
}

/// What came of a load.
struct Measured {
    tally: Tally,
    /// How long was measured.
    time: Duration,
    /// The code of the first signal that came, if one did.
    signal: Option<u8>,
}

/// What one thread has counted, and for how long it measured.
type Loaded = Result<(Tally, Duration), NotMeasured>;

/// How callers reach their target.
#[derive(Clone)]
enum Route {
    Grpc { reach: Box<Reach>, messages: Arc<Messages>, timeout: Duration },
    Http(Arc<Shared>),
}

impl Bench {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        self.validate()?;
        let shares = self.shares();
        let (route, url) = self.route()?;
        route.try_to_connect(&url).await?;
        let run = Arc::new(Run::new(self.workload(), self.limits(shares)));
        let Measured { tally, time, signal } = self.measure(&run, &route, shares).await?;
        let about = About {
            target: self.target.name(),
            url,
            workload: run.workload.name(),
            concurrency: self.concurrency,
            connections: shares.connections,
            threads: shares.threads,
        };
        // One that comes while the answers are checked cuts nothing short.
        let interrupted = signal.filter(|_| time < self.duration);
        let report = Report::new(about, tally, time, interrupted.is_some());
        if self.json {
            output::json(&report);
            report.complain();
        } else {
            report.show();
        }
        match interrupted {
            Some(code) if !report.is_wrong() => Err(Failure::Interrupted(code)),
            _ if report.is_good() => Ok(()),
            _ => Err(Failure::NotAsItShouldBe),
        }
    }

    /// Makes the load, says how far it is, and stops it early when a signal asks for that.
    async fn measure(&self, run: &Arc<Run>, route: &Route, shares: Shares) -> Result<Measured, Failure> {
        let (tasks, progress) = start_threads(run, route, shares);
        let shown = self.show_progress(run, progress);
        // Set by the first signal, to the code that it would end another command with.
        let signalled = Arc::new(OnceLock::new());
        let told = Arc::clone(&signalled);
        let tell = move |code| {
            let _ = told.set(code);
        };
        let signal = shutdown::on_signals_telling(tell).context("cannot listen for signals")?;
        let watch = tokio::spawn(stop_on_signal(Arc::clone(run), signal));
        let ended = join(tasks).await;
        watch.abort();
        shown.abort();
        // Until the line that changes is gone: it must not take the first line of what is written next with it.
        let _ = shown.await;
        let (tally, time) = ended?;
        Ok(Measured { tally, time, signal: signalled.get().copied() })
    }

    fn route(&self) -> Result<(Route, String), Failure> {
        let run = self.run.clone().unwrap_or_else(|| format!("{:08x}", rand::random::<u32>()));
        if self.target == TargetName::Http {
            let target = simulate::Target::find(self.url.as_deref(), stripe::PATH)?;
            let secret =
                target.secret("stripe", "STRIPE_WEBHOOK_SECRET", self.secret.clone(), self.secret_file.clone())?;
            let url = target.url.to_string();
            let authorities = self.credentials.ca_file.as_deref().filter(|path| !path.as_os_str().is_empty());
            let connector = match authorities.filter(|_| url.starts_with("https://")) {
                Some(path) => {
                    http_client::connector_trusting(path).map_err(|error| Problem::from_error("--ca-file", &error))?
                }
                None => http_client::connector(),
            };
            let shared = Shared {
                url: target.url,
                secret,
                run,
                body_bytes: usize::try_from(self.body_size.unwrap_or(BODY_BYTES)).unwrap_or(usize::MAX),
                timeout: self.timeout,
                connector,
            };
            return Ok((Route::Http(Arc::new(shared)), url));
        }
        let reach = match &self.url {
            Some(url) => self.credentials.reach(url).map_err(as_options)?,
            None => self.credentials.reach(&self.sidecar_url)?,
        };
        let url = self.url.clone().unwrap_or_else(|| self.sidecar_url.clone());
        let messages = Arc::new(Messages::new(&run, self.provider.as_deref().unwrap_or(PROVIDER)));
        Ok((Route::Grpc { reach: Box::new(reach), messages, timeout: self.timeout }, url))
    }

    /// How far it is, on standard error: a line that changes, if that is a terminal which can change one, and otherwise one now
    /// and then. With --json too: the result goes to standard output, and nothing of this is in it.
    fn show_progress(&self, run: &Arc<Run>, progress: Vec<Arc<Progress>>) -> JoinHandle<()> {
        let bar = ProgressBar::no_length();
        let bar = bar.with_style(ProgressStyle::with_template("{spinner} {msg}").expect("the template is sound"));
        let lines = bar.is_hidden();
        let every = if lines { self.progress } else { Duration::from_millis(250) };
        let run = Arc::clone(run);
        tokio::spawn(async move {
            let bar = ClearedAtTheEnd(bar);
            let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
            let mut before = (0, std::time::Instant::now());
            loop {
                ticks.tick().await;
                let sum = |of: fn(&Progress) -> &std::sync::atomic::AtomicU64| {
                    progress.iter().map(|thread| of(thread).load(Ordering::Relaxed)).sum::<u64>()
                };
                let (done, failed, checked) = (
                    sum(|progress| &progress.done),
                    sum(|progress| &progress.failed),
                    sum(|progress| &progress.checked),
                );
                let now = std::time::Instant::now();
                let rate = (done - before.0) as f64 / now.duration_since(before.1).as_secs_f64().max(1e-3);
                before = (done, now);
                let phase = match run.window() {
                    None => "preparing".to_owned(),
                    Some(window) if now < window.from => "warming up".to_owned(),
                    Some(window) if now < window.until && !run.stop.load(Ordering::Relaxed) => {
                        format!("{:.0} s left", window.until.duration_since(now).as_secs_f64())
                    }
                    Some(_) if run.workload == Workload::Claims => {
                        format!("completing what was locked, and checking: {checked}")
                    }
                    Some(_) => format!("checking: {checked}"),
                };
                let message = format!("{rate:.0} a second, {done} done, {failed} failed, {phase}");
                if lines {
                    output::notice(message);
                } else {
                    bar.0.set_message(message);
                    bar.0.tick();
                }
            }
        })
    }
}

/// Problems with reaching a sidecar, under the names of this command's options.
fn as_options(problems: Problems) -> Problems {
    let renamed = problems.iter().map(|problem| match &*problem.setting {
        "SIDECAR_URL" => Problem::new("--url", problem.message.clone()),
        _ => problem.clone(),
    });
    renamed.map(Problems::from).reduce(Problems::and).unwrap_or(problems)
}

struct ClearedAtTheEnd(ProgressBar);

impl Drop for ClearedAtTheEnd {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Route {
    /// Checks that the target can be reached, before starting threads that would each find out by themselves.
    async fn try_to_connect(&self, url: &str) -> Result<(), Failure> {
        let unreachable = |error: anyhow::Error| Failure::Unreachable(error.context(format!("cannot reach {url}")));
        match self {
            Self::Grpc { reach, .. } => {
                Connection::open(reach).await.map_err(unreachable)?;
            }
            Self::Http(shared) => {
                let mut gateway = Gateway::new(Arc::clone(shared), KEYS_FROM);
                match tokio::time::timeout(CONNECT_TIMEOUT, gateway.connect()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(fault)) => return Err(unreachable(anyhow::anyhow!("{}", fault.code))),
                    Err(_) => return Err(unreachable(anyhow::anyhow!("no connection within {CONNECT_TIMEOUT:?}"))),
                }
            }
        }
        Ok(())
    }
}

/// Starts the threads that make the load, each with what it says of its progress.
fn start_threads(run: &Arc<Run>, route: &Route, shares: Shares) -> (Vec<JoinHandle<Loaded>>, Vec<Arc<Progress>>) {
    (0..shares.threads)
        .map(|thread| {
            let progress: Arc<Progress> = Arc::default();
            let (run, route, told) = (Arc::clone(run), route.clone(), Arc::clone(&progress));
            // A runtime of its own, so that callers do not move between threads.
            let task = tokio::task::spawn_blocking(move || {
                let loaded = load_thread(&run, &route, thread, shares, &told);
                if loaded.is_err() {
                    run.failed.cancel();
                }
                loaded
            });
            (task, progress)
        })
        .unzip()
}

/// One thread's share of the load.
fn load_thread(run: &Arc<Run>, route: &Route, thread: u32, shares: Shares, progress: &Arc<Progress>) -> Loaded {
    let Shares { threads, connections } = shares;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    runtime.block_on(async {
        let numbers = (0..run.concurrency).filter(|number| number % threads == thread);
        let mut callers = Vec::new();
        match route {
            Route::Grpc { reach, messages, timeout } => {
                let mut opened = Vec::new();
                for _ in 0..connections / threads + u32::from(thread < connections % threads) {
                    let connection = Connection::open(reach).await;
                    opened.push(connection.map_err(|error| NotMeasured::Unreachable(error.context("cannot connect")))?);
                }
                for (number, connection) in numbers.zip(opened.iter().cycle()) {
                    let sidecar = Sidecar::new(connection.calls().await, Arc::clone(messages), *timeout);
                    callers.push((number, Caller::Grpc(Box::new(sidecar))));
                }
            }
            Route::Http(shared) => {
                for number in numbers {
                    let mut gateway = Gateway::new(Arc::clone(shared), KEYS_FROM);
                    let connected = gateway.connect().await;
                    connected.map_err(|fault| NotMeasured::Unreachable(anyhow::anyhow!("{}", fault.code)))?;
                    callers.push((number, Caller::Http(Box::new(gateway))));
                }
            }
        }
        load::run(run, callers, progress).await
    })
}

/// The first signal ends the measurement early, the second one the program.
async fn stop_on_signal(run: Arc<Run>, signal: CancellationToken) {
    signal.cancelled().await;
    run.stop.store(true, Ordering::Relaxed);
    output::notice("stopping; again to stop at once");
}

/// What all threads counted, and for how long they measured.
async fn join(tasks: Vec<JoinHandle<Loaded>>) -> Result<(Tally, Duration), Failure> {
    let mut all = (Tally::default(), Duration::ZERO);
    let mut failed: Option<NotMeasured> = None;
    for task in tasks {
        let loaded = task.await.context("a thread of the load panicked").map_err(NotMeasured::Failed);
        match loaded.and_then(|loaded| loaded) {
            Ok((tally, measured)) => {
                all.0.add(tally);
                all.1 = all.1.max(measured);
            }
            // Threads that waited for the failed one may come before or after it: the cause is what has to be reported.
            Err(error) => {
                failed = Some(match failed {
                    Some(known) if !matches!(known, NotMeasured::AnotherFailed) => known,
                    Some(_) | None => error,
                });
            }
        }
    }
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(all),
    }
}
