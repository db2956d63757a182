//! Reads again what a running gateway takes from files: secrets, the listener's certificate, PayPal's certificates, and
//! which routes enforce (G3, W5).

use std::{convert::Infallible, error::Error as StdError, future::pending, io, mem, sync::Arc, time::Duration};

use oncegate_runtime::{
    reload::READ_TIME_MAX,
    secret::{ReadError, Secret, SecretSource},
    tls::ServerTls,
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};

use crate::{
    config::{ConfigFile, FileNow},
    metrics::Metrics,
    providers::{BadSecret, Provider, paystack::one_mode},
    route::{Route, Secrets},
    signing::Signer,
};

/// Looks at the files of `routes` every `pause`, for ever. A path is opened anew each time, because Kubernetes swaps a
/// symbolic link. Content is compared and not times, which such a swap does not change reliably. A file that cannot be
/// read, or not in time, or is blank, leaves the old secrets in place and is reported once until it is mended.
pub(crate) async fn watch(routes: &[Arc<Route>], pause: Duration, metrics: &Metrics) -> Infallible {
    let mut files: Vec<Watched> = Vec::new();
    // The secrets that each route has, and those that its file holds now.
    let mut holding: Vec<Vec<Secret>> = routes.iter().map(|route| route.secrets.read.clone()).collect();
    let mut wanted = holding.clone();
    for (place, route) in routes.iter().enumerate() {
        files.extend(Watched::new(&route.secrets, Holder::Provider(place, route.clone())));
        if let (Some(signer), Some(secrets)) = (&route.application.signer, &route.application.signer_secrets) {
            // Routes may share the signer of the settings.
            let known = |file: &Watched| matches!(&file.holder, Holder::Signer(known) if known.is(signer));
            if !files.iter().any(known) {
                files.extend(Watched::new(secrets, Holder::Signer(signer.clone())));
            }
        }
    }
    if files.is_empty() {
        return pending().await;
    }
    let mut ticks = interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // All at once: a read that hangs is waited for once, and holds up no other.
        for file in &mut files {
            let source = file.source.clone();
            file.reading.begin(move || source.read_list());
        }
        let latest = Instant::now() + READ_TIME_MAX;
        let mut reads = Vec::with_capacity(files.len());
        for file in &mut files {
            let read = file.reading.end(latest).await;
            if let Holder::Provider(place, _) = file.holder {
                let now = read.as_ref().and_then(|read| read.as_ref().ok()?.as_ref().ok()).unwrap_or(&file.current);
                wanted[place].clone_from(now);
            }
            reads.push(read);
        }
        for (file, read) in files.iter_mut().zip(reads) {
            let Some(read) = read else { continue };
            let fits = match &file.holder {
                Holder::Provider(place, _) => paystack_modes(routes, &wanted, &holding, *place),
                Holder::Signer(_) => Ok(()),
            };
            file.update(read, fits, metrics);
            if let Holder::Provider(place, _) = file.holder {
                holding[place].clone_from(&file.current);
            }
        }
    }
}

/// Whether the Paystack keys of one tenant's routes would still be of one mode, as at the start ([`crate::route::check`]),
/// if the route at `place` got what its file holds. Judged by what all files hold now: if two files are moved to the other
/// mode one after the other, the first waits for the second. Or by what the other routes have: a spoiled file keeps no
/// other key from being replaced.
fn paystack_modes(
    routes: &[Arc<Route>],
    wanted: &[Vec<Secret>],
    holding: &[Vec<Secret>],
    place: usize,
) -> Result<(), BadSecret> {
    let is_paystack = |route: &Route| matches!(route.provider, Provider::Paystack(_));
    if !is_paystack(&routes[place]) {
        return Ok(());
    }
    let beside = |others: &[Vec<Secret>]| {
        let of_tenant =
            routes.iter().enumerate().filter(|(_, route)| is_paystack(route) && route.tenant == routes[place].tenant);
        let keys = of_tenant.map(|(other, _)| if other == place { &wanted[other] } else { &others[other] });
        one_mode(keys.flatten())
    };
    beside(wanted).or_else(|_| beside(holding))
}

/// Looks at the listener's certificate every `pause`, for ever.
pub(crate) async fn watch_listener(tls: Option<ServerTls>, pause: Duration) -> Infallible {
    if let Some(tls) = tls {
        tls.watch(pause).await;
    }
    pending().await
}

/// Looks at the directories with PayPal's certificates every `pause`, for ever, for when these end. Verification does not wait
/// for what is seen here: it reads a certificate when one is named that it does not hold, and holds it until it ends.
pub(crate) async fn watch_directories(routes: &[Arc<Route>], pause: Duration) -> Infallible {
    let stores = routes.iter().filter_map(|route| route.provider.paypal()?.store());
    let stores: Vec<_> = stores.filter(|store| store.has_directory()).cloned().collect();
    if stores.is_empty() {
        return pending().await;
    }
    let mut ticks = interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let stores = stores.clone();
        // On a thread of its own, because a network file system that hangs must not hold up requests. An error is a panic,
        // which has been reported.
        let _ = spawn_blocking(move || stores.iter().for_each(|store| store.look())).await;
    }
}

/// Looks at the file with routes every `pause`, for ever, and switches the routes whose enforcement it changes. Nothing
/// else in the file takes effect while the gateway runs. The log says so when something else changes: nobody who writes a
/// new secret there should believe that it is in use. What the admin listener has switched stays until the file says
/// something new about it.
pub(crate) async fn watch_config(
    routes: &[Arc<Route>],
    file: Option<ConfigFile>,
    pause: Duration,
    metrics: &Metrics,
) -> Infallible {
    let Some(file) = file else { return pending().await };
    let mut known: Vec<_> = routes.iter().map(|route| route.enforcement.get()).collect();
    let (mut first_rest, mut known_rest) = (None, None);
    let (mut reading, mut trouble) = (Reading::default(), Trouble::default());
    let mut ticks = interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (again, all) = (file.clone(), routes.to_vec());
        reading.begin(move || again.now(&all));
        let Some(read) = reading.end(Instant::now() + READ_TIME_MAX).await else { continue };
        match flat(read) {
            Ok(FileNow { enforcement: now, rest }) => {
                trouble.ends(metrics);
                // Not if it is back to what it was at the start.
                let started = *first_rest.get_or_insert(rest);
                if known_rest.replace(rest).is_some_and(|known| known != rest) && rest != started {
                    tracing::warn!(
                        file = %file.path.display(),
                        "the file with routes has changed in more than enforcement: restart to take it over"
                    );
                }
                for ((route, known), now) in routes.iter().zip(&mut known).zip(now) {
                    if *known != now {
                        *known = now;
                        metrics.reloaded();
                        route.switch(now, "configuration file");
                    }
                }
            }
            Err(problems) if trouble.begins(metrics) => {
                tracing::error!(
                    file = %file.path.display(),
                    error = &*problems,
                    "configuration cannot be read again, keeping what holds"
                );
            }
            Err(_) => {}
        }
    }
}

/// Whose secrets a file holds.
enum Holder {
    /// The provider of the route at this place.
    Provider(usize, Arc<Route>),
    Signer(Signer),
}

impl Holder {
    fn replace(&self, secrets: &[Secret]) -> Result<(), BoxError> {
        match self {
            Self::Provider(_, route) => Ok(route.provider.replace_secrets(secrets)?),
            Self::Signer(signer) => Ok(signer.replace(secrets)?),
        }
    }
}

type BoxError = Box<dyn StdError>;

/// A file with secrets. Not one of the runtime's [`Files`](oncegate_runtime::reload::Files), which build what they hold as
/// soon as they are read: here all files are read before any of them is judged, because keys of one tenant have to fit each
/// other, and a read that hangs holds up no other.
struct Watched {
    source: SecretSource,
    holder: Holder,
    current: Vec<Secret>,
    reading: Reading<Result<Vec<Secret>, ReadError>>,
    trouble: Trouble,
}

impl Watched {
    /// None if the secrets are not from a file: nothing can change.
    fn new(secrets: &Secrets, holder: Holder) -> Option<Self> {
        secrets.source.path()?;
        let (source, current) = (secrets.source.clone(), secrets.read.clone());
        Some(Self { source, holder, current, reading: Reading::default(), trouble: Trouble::default() })
    }

    fn update(&mut self, read: Read<Result<Vec<Secret>, ReadError>>, fits: Result<(), BadSecret>, metrics: &Metrics) {
        let file = self.source.path().map(|path| path.display().to_string()).unwrap_or_default();
        let replaced = match flat(read) {
            Ok(secrets) if self.current == secrets => {
                self.trouble.ends(metrics);
                return;
            }
            Ok(secrets) => match fits {
                Ok(()) => self.holder.replace(&secrets).map(|()| self.current = secrets),
                Err(error) => Err(error.into()),
            },
            Err(error) => Err(error),
        };
        match replaced {
            Ok(()) => {
                self.trouble.ends(metrics);
                metrics.reloaded();
                tracing::info!(file, "secrets were replaced from their file");
            }
            Err(error) if self.trouble.begins(metrics) => {
                tracing::error!(file, error = &*error, "secrets cannot be read again, keeping the old ones");
            }
            Err(_) => {}
        }
    }
}

/// Whether a file has become unusable: reported and counted once, until it is mended.
#[derive(Default)]
struct Trouble {
    lasts: bool,
}

impl Trouble {
    /// True if it was fine until now.
    fn begins(&mut self, metrics: &Metrics) -> bool {
        let is_new = !mem::replace(&mut self.lasts, true);
        if is_new {
            metrics.reload_fails();
        }
        is_new
    }

    fn ends(&mut self, metrics: &Metrics) {
        if mem::take(&mut self.lasts) {
            metrics.reload_mended();
        }
    }
}

/// What a read returned in time; Err: it hangs.
type Read<T> = Result<T, io::Error>;

fn flat<T, E: StdError + 'static>(read: Read<Result<T, E>>) -> Result<T, BoxError> {
    Ok(read??)
}

/// A read on a thread of its own: a network file system that hangs must hold up neither requests nor other reads.
struct Reading<T> {
    under_way: Option<JoinHandle<T>>,
    hangs: bool,
}

impl<T> Default for Reading<T> {
    fn default() -> Self {
        Self { under_way: None, hangs: false }
    }
}

impl<T: Send + 'static> Reading<T> {
    /// Begins a read, unless the last one is still under way: each would hold a thread.
    fn begin(&mut self, read: impl FnOnce() -> T + Send + 'static) {
        if self.under_way.is_none() {
            self.under_way = Some(spawn_blocking(read));
        }
    }

    /// What the read returned, if it has ended by `latest`. None: a panic, which has been reported.
    async fn end(&mut self, latest: Instant) -> Option<Read<T>> {
        let task = self.under_way.as_mut()?;
        // A read that was waited for in vain is not waited for again.
        let latest = if self.hangs { Instant::now() } else { latest };
        let Ok(read) = timeout_at(latest, task).await else {
            self.hangs = true;
            return Some(Err(io::ErrorKind::TimedOut.into()));
        };
        *self = Self::default();
        read.ok().map(Ok)
    }
}
