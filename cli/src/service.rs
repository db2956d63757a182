//! What the commands that serve have in common: signals, the admin listener, and the order of shutdown.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use anyhow::Context as _;
use oncegate_runtime::{
    admin::{self, Condition, Control, Facts, Metrics, Readiness},
    metrics::{
        Page,
        certificates::{self, Certificates},
        process,
    },
    shutdown::{self, CancellationToken},
};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::failure::{Failure, listen};

/// The listener for probes and metrics.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Admin")]
pub(crate) struct AdminOptions {
    /// Where to serve /livez, /readyz and /metrics [default: nowhere]
    #[arg(long, env = "ADMIN_LISTEN", value_name = "ADDRESS")]
    admin_listen: Option<SocketAddr>,

    /// Who may change something on the admin listener (PUT /enforcement): loopback, callers on this machine or in this pod;
    /// anyone, whoever can connect. It has neither TLS nor tokens
    #[arg(long, env = "ADMIN_CONTROL", value_name = "WHO", default_value = "loopback")]
    admin_control: admin::Trusted,
}

/// A process that serves until it is told to end.
pub(crate) struct Service {
    shutdown: CancellationToken,
    readiness: Readiness,
    started: Condition,
    // Known only once the parts exist; probes are answered before that.
    metrics: Arc<OnceLock<Metrics>>,
    control: Arc<OnceLock<Control>>,
    facts: Arc<OnceLock<Facts>>,
    admin: Option<(JoinHandle<()>, CancellationToken)>,
}

impl Service {
    /// Listens for signals and, if configured, for probes, which are answered while everything else is still starting.
    pub(crate) async fn begin(options: &AdminOptions) -> Result<Self, Failure> {
        let shutdown = shutdown::on_signals().context("cannot listen for signals")?;
        let readiness = Readiness::new();
        let started = readiness.condition("start");
        let metrics = Arc::new(OnceLock::<Metrics>::new());
        let rendered = Arc::clone(&metrics);
        let render: Metrics = Arc::new(move || rendered.get().map(|metrics| metrics()).unwrap_or_default());
        let control = Arc::new(OnceLock::<Control>::new());
        let controlled = Arc::clone(&control);
        let controls: Control = Arc::new(move |method, uri| controlled.get().and_then(|control| control(method, uri)));
        let facts = Arc::new(OnceLock::<Facts>::new());
        let told = Arc::clone(&facts);
        let tell: Facts = Arc::new(move || told.get().map(|facts| facts()).unwrap_or_default());
        let admin = match options.admin_listen {
            None => None,
            Some(address) => {
                let listener = bind("ADMIN_LISTEN", address).await?;
                tracing::info!(address = %listener.local_addr().context("a bound listener has no address")?, "admin listening");
                // A token of its own, since it answers until the very end.
                let stop = CancellationToken::new();
                let serve = admin::serve(
                    listener,
                    readiness.clone(),
                    tell,
                    render,
                    (controls, options.admin_control),
                    stop.clone(),
                );
                Some((tokio::spawn(serve), stop))
            }
        };
        Ok(Self { shutdown, readiness, started, metrics, control, facts, admin })
    }

    /// Waits for a part to start, which may take as long as a migration; None when the first signal comes before that.
    pub(crate) async fn start<T>(&self, part: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            started = part => Some(started),
            () = self.shutdown.cancelled() => {
                tracing::info!("told to end before the start was over");
                None
            }
        }
    }

    /// Sets what /metrics shows from here on: the metrics of each part of the process, and when certificates expire.
    pub(crate) fn show(
        &self,
        parts: impl IntoIterator<Item = Metrics>,
        certificates: impl IntoIterator<Item = Certificates>,
    ) {
        let parts: Vec<Metrics> = parts.into_iter().collect();
        let certificates: Vec<Certificates> = certificates.into_iter().collect();
        let all: Metrics = Arc::new(move || {
            let mut page = Page::new();
            process::render(&mut page);
            certificates::render(&mut page, &certificates);
            parts.iter().fold(page.finish(), |page, part| page + &part())
        });
        // Called once, when the parts exist.
        let _ = self.metrics.set(all);
    }

    /// Sets what else the admin listener answers from here on.
    pub(crate) fn control(&self, control: Control) {
        // Called once, when the part exists.
        let _ = self.control.set(control);
    }

    /// Sets what /readyz says in addition to being ready.
    pub(crate) fn tell(&self, facts: Facts) {
        // Called once, when the parts exist.
        let _ = self.facts.set(facts);
    }

    /// Everything has been opened and bound, and work may arrive. Returns the token that the first signal cancels.
    pub(crate) fn ready(&self) -> CancellationToken {
        self.started.met();
        let readiness = self.readiness.clone();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            shutdown.cancelled().await;
            readiness.drain();
        });
        self.shutdown.clone()
    }

    /// Everything else has drained.
    pub(crate) async fn end(self) {
        if let Some((task, stop)) = self.admin {
            stop.cancel();
            // Bounded by its own drain.
            let _ = task.await;
        }
        tracing::info!("ended");
    }
}

/// Raises the number of files, and so of connections, that the process may have open to its hard limit. The usual soft
/// limit of 1,024 is for programs that call `select`; the bound on connections is above it, and a listener that runs out of
/// files first accepts nobody.
pub(crate) fn permit_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, files = limit.current, "the number of open files cannot be raised");
    }
}

/// Binds a listener, or names the setting that has to change.
pub(crate) async fn bind(setting: &'static str, address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| listen(setting, address, &error))
}

/// Says in the log where a sidecar is to be found.
pub(crate) fn log_sidecar(sidecar: &oncegate_sidecar::Sidecar) {
    if let Some(address) = sidecar.local_addr() {
        tracing::info!(%address, "sidecar listening");
    }
}

/// Says in the log where a gateway is to be found, and for whom.
pub(crate) fn log_gateway(gateway: &oncegate_gateway::Gateway) {
    tracing::info!(address = %gateway.local_addr(), "gateway listening");
    for (path, provider) in gateway.routes() {
        tracing::info!(path, provider, "webhooks taken");
    }
}
