//! All sidecars as one: a call goes to the less busy of two, avoids those that fail, and is repeated where that is safe.
//!
//! A name is resolved again every few seconds, because a single HTTP/2 connection to a Kubernetes Service would stay with
//! one pod for ever. When it cannot be resolved, the known addresses stay.
//!
//! A call is repeated here, byte for byte and therefore with its `claim_id`, when its connection could not be made, broke,
//! or led to an overloaded sidecar: at most twice, and within a budget of a tenth of all calls, so that retries do not make
//! an outage worse. A sidecar without its store is a reason to ask another, once: that one may reach it. Any other answer of
//! the sidecar is for the caller to judge (`docs/errors.md`).

use std::{
    error::Error as StdError,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use oncegate_api::reason;
use oncegate_runtime::{
    admin,
    metrics::{
        Counter,
        certificates::{CertificateFile, Certificates},
    },
    reload::Files,
    tls::ClientTls,
};
use rand::seq::IteratorRandom as _;
use tokio::{sync::Notify, task::JoinSet, time::Instant};
use tonic::{Code, Status, body::Body, transport::Channel};
use tonic_types::StatusExt as _;
use tower::{
    Service, ServiceExt as _,
    retry::budget::{Budget as _, TpsBudget},
};

use crate::metrics::PoolCounts;

use super::{
    BoxError,
    dial::{self, Dial},
    options::{Reach, Token},
    target::{Resolve, SystemResolver},
};

/// How many tries may follow the first.
const RETRIES_MAX: u32 = 2;

/// Retries as a share of calls, and how many a second even a quiet gateway may make.
const RETRIES_SHARE: f32 = 0.1;
const RETRIES_A_SECOND: u32 = 5;
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

/// The longest pause before the first retry; twice that before the second. Chosen at random up to it, so that the calls of
/// a lost connection do not all arrive at once.
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// How long an address is left alone after a failure: doubled with each, while there are others.
const ASIDE_MIN: Duration = Duration::from_millis(200);
const ASIDE_MAX: Duration = Duration::from_secs(5);

/// A failure is a reason to resolve at once, but not more often than this.
const RESOLVE_PAUSE: Duration = Duration::from_secs(1);

/// How long one name may take to resolve. The others wait meanwhile: they are resolved in turn.
const RESOLVE_TIME_MAX: Duration = Duration::from_secs(5);

/// Sidecars as a tower service. Cloning is cheap; clones share everything. The background task ends with the last clone.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
    /// Aborted when dropped.
    _background: Arc<JoinSet<()>>,
}

struct Shared {
    reach: Reach,
    resolver: Arc<dyn Resolve>,
    members: RwLock<Arc<[Arc<Member>]>>,
    budget: TpsBudget,
    /// Notified when the known addresses did not do.
    wanting: Notify,
    /// Notified after each resolution, whether it found members or not.
    resolved: Notify,
    retries: Counter,
    retries_refused: Counter,
    resolutions_failed: Counter,
}

/// One address.
struct Member {
    dial: Dial,
    channel: Channel,
    in_flight: AtomicUsize,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    failures: u32,
    /// Until when others are preferred.
    aside: Option<Instant>,
}

/// There is no address to call.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("no sidecar has an address: the name of SIDECAR_URL cannot be resolved")]
pub(super) struct NoAddress;

impl Pool {
    /// The sidecars of `reach`. Connections are made when they are needed. Has to be called inside a tokio runtime.
    #[must_use]
    pub fn new(reach: Reach) -> Self {
        Self::with_resolver(reach, SystemResolver)
    }

    /// The same, with another resolver.
    #[must_use]
    pub fn with_resolver(reach: Reach, resolver: impl Resolve) -> Self {
        let mut background = JoinSet::new();
        if let Some(tls) = &reach.tls {
            background.spawn(tls.clone().watch(reach.reload));
        }
        if let Some(Token::File(file)) = &reach.token {
            background.spawn(Files::watch(file.clone(), reach.reload));
        }
        let shared = Arc::new(Shared {
            reach,
            resolver: Arc::new(resolver),
            members: RwLock::new(Arc::new([])),
            budget: TpsBudget::new(BUDGET_WINDOW, RETRIES_A_SECOND, RETRIES_SHARE),
            wanting: Notify::new(),
            resolved: Notify::new(),
            retries: Counter::new(),
            retries_refused: Counter::new(),
            resolutions_failed: Counter::new(),
        });
        background.spawn(shared.clone().keep_resolving());
        Self { shared, _background: Arc::new(background) }
    }

    /// Connects to any of them now, so that the caller knows at once if none can be reached.
    ///
    /// # Errors
    ///
    /// What was wrong with the last one that was tried.
    pub async fn connect(&self) -> Result<(), BoxError> {
        let shared = &self.shared;
        let mut last: BoxError = NoAddress.into();
        for member in shared.members_or_wait().await.iter() {
            match dial::connect(&member.dial, shared.reach.tls.as_ref(), shared.reach.connect_timeout).await {
                Ok(_) => return Ok(()),
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    /// What the admin listener shows under `/metrics`.
    #[must_use]
    pub fn metrics(&self) -> admin::Metrics {
        let shared = self.shared.clone();
        Arc::new(move || shared.render())
    }

    /// When the certificates for calls to sidecars expire.
    #[must_use]
    pub fn certificates(&self) -> Certificates {
        let tls = self.shared.reach.tls.clone();
        Arc::new(move || {
            let ends = tls.iter().map(ClientTls::ends);
            ends.flat_map(|ends| {
                [
                    CertificateFile { setting: "SIDECAR_CA_FILE", end: ends.authorities },
                    CertificateFile { setting: "SIDECAR_CLIENT_CERT_FILE", end: ends.own },
                ]
            })
            .collect()
        })
    }
}

impl Service<http::Request<Body>> for Pool {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        // Which member is asked is decided in the call. Calls are bounded by the courier's slots.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let shared = self.shared.clone();
        Box::pin(async move { shared.call(request).await })
    }
}

impl Shared {
    async fn call(&self, request: http::Request<Body>) -> Result<http::Response<Body>, BoxError> {
        let (parts, body) = request.into_parts();
        // A single message, of the size of an event's metadata at most.
        let body = body.collect().await?.to_bytes();
        self.budget.deposit();
        let mut members = self.members_or_wait().await;
        let mut asked: Option<Arc<Member>> = None;
        // The first try that may have had an effect: an error, or an answer that was not the sidecar's.
        let mut unknown: Option<Result<http::Response<Body>, BoxError>> = None;
        // Who said that its store is away.
        let mut storeless: Option<Arc<Member>> = None;
        let mut tries = 0;
        loop {
            let Some(member) = pick(&members, asked.as_ref(), Instant::now()) else {
                return unknown.unwrap_or_else(|| Err(NoAddress.into()));
            };
            let tried = self.try_member(&member, &parts, &body).await;
            let verdict = match &tried {
                Ok(response) => verdict(response),
                Err(error) if never_sent(error.as_ref()) => Verdict::NotDone,
                Err(_) => Verdict::Unknown,
            };
            match verdict {
                Verdict::Done => {
                    member.worked();
                    // The store is there: who does not reach it is cut off, and refuses faster than others work. Without
                    // this proof nobody is set aside for the store: when it comes back, it is back for all at once.
                    if let Some(cut_off) = storeless.take().filter(|storeless| !Arc::ptr_eq(storeless, &member)) {
                        self.set_aside(&cut_off);
                    }
                }
                Verdict::NotDone | Verdict::Unknown => self.set_aside(&member),
                Verdict::Storeless | Verdict::Refused => {}
            }
            // A try without effect says nothing about an earlier one that may have had an effect.
            let settles = matches!(verdict, Verdict::Done) || unknown.is_none();
            let again = tries < RETRIES_MAX
                && match verdict {
                    Verdict::NotDone | Verdict::Unknown => true,
                    // If a second one says so, a third would as well.
                    Verdict::Storeless => storeless.is_none() && members.len() > 1,
                    Verdict::Done | Verdict::Refused => false,
                };
            if !again || !self.budget.withdraw() {
                if again {
                    self.retries_refused.add();
                }
                return match unknown {
                    Some(first) if !settles => first,
                    _ => tried,
                };
            }
            if verdict == Verdict::Unknown {
                unknown.get_or_insert(tried);
            }
            if verdict == Verdict::Storeless {
                storeless = Some(member.clone());
            }
            self.retries.add();
            tokio::time::sleep(PAUSE_MAX.mul_f64(rand::random::<f64>() * f64::from(1 << tries))).await;
            asked = Some(member);
            members = self.members_or_wait().await;
            tries += 1;
        }
    }

    fn set_aside(&self, member: &Member) {
        member.failed(Instant::now());
        self.wanting.notify_one();
    }

    async fn try_member(
        &self,
        member: &Arc<Member>,
        parts: &http::request::Parts,
        body: &Bytes,
    ) -> Result<http::Response<Body>, BoxError> {
        let mut request = http::Request::new(Body::new(Full::new(body.clone())));
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = parts.uri.clone();
        *request.version_mut() = parts.version;
        *request.headers_mut() = parts.headers.clone();
        *request.extensions_mut() = parts.extensions.clone();
        if let Some(token) = &self.reach.token {
            request.headers_mut().insert(http::header::AUTHORIZATION, token.current());
        }
        let mut in_flight = InFlight { pool: self, member, answered: false };
        member.in_flight.fetch_add(1, Relaxed);
        let mut channel = member.channel.clone();
        let tried = match channel.ready().await {
            Ok(channel) => channel.call(request).await,
            Err(error) => Err(error),
        };
        in_flight.answered = true;
        Ok(tried?)
    }

    fn members(&self) -> Arc<[Arc<Member>]> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The members; at the start, and after a resolution that found none, waits for the next one.
    async fn members_or_wait(&self) -> Arc<[Arc<Member>]> {
        let resolved = self.resolved.notified();
        tokio::pin!(resolved);
        resolved.as_mut().enable();
        let members = self.members();
        if !members.is_empty() {
            return members;
        }
        self.wanting.notify_one();
        // Bounded like a connection, of which this is a part.
        let _ = tokio::time::timeout(self.reach.connect_timeout, resolved).await;
        self.members()
    }

    async fn keep_resolving(self: Arc<Self>) {
        // The last known addresses of each target, kept only as long as its name cannot be resolved.
        let mut dials = vec![Vec::new(); self.reach.targets.len()];
        loop {
            self.resolve(&mut dials).await;
            self.resolved.notify_waiters();
            tokio::time::sleep(RESOLVE_PAUSE.min(self.reach.resolve_interval)).await;
            let _ = tokio::time::timeout(self.reach.resolve_interval, self.wanting.notified()).await;
        }
    }

    async fn resolve(&self, known: &mut [Vec<Dial>]) {
        let mut failed = false;
        for (target, dials) in self.reach.targets.iter().zip(&mut *known) {
            let host = target.host();
            match tokio::time::timeout(RESOLVE_TIME_MAX, target.dials(&*self.resolver)).await {
                Ok(Ok(found)) if found.is_empty() => failed = true,
                Ok(Ok(found)) => *dials = found,
                Ok(Err(error)) => {
                    failed = true;
                    tracing::warn!(%host, %error, "name of the sidecar cannot be resolved, keeping the addresses");
                }
                Err(_) => {
                    failed = true;
                    tracing::warn!(%host, "resolving the name of the sidecar takes too long, keeping the addresses");
                }
            }
        }
        if failed {
            self.resolutions_failed.add();
        }
        let old = self.members();
        let mut dials = known.concat();
        dials.sort();
        dials.dedup();
        if dials.len() == old.len() && old.iter().zip(&dials).all(|(member, dial)| member.dial == *dial) {
            return;
        }
        let known = |dial: &Dial| old.iter().find(|member| member.dial == *dial).cloned();
        let members: Arc<[Arc<Member>]> =
            dials.into_iter().map(|dial| known(&dial).unwrap_or_else(|| Arc::new(self.member(dial)))).collect();
        tracing::info!(addresses = members.len(), before = old.len(), "addresses of the sidecar have changed");
        *self.members.write().unwrap_or_else(PoisonError::into_inner) = members;
    }

    fn member(&self, dial: Dial) -> Member {
        let channel = dial::channel(&dial, self.reach.tls.clone(), self.reach.connect_timeout);
        Member { dial, channel, in_flight: AtomicUsize::new(0), health: Mutex::default() }
    }

    fn render(&self) -> String {
        let counts = PoolCounts {
            addresses: self.members().len(),
            retries: &self.retries,
            retries_refused: &self.retries_refused,
            resolutions_failed: &self.resolutions_failed,
            certificates: self.reach.tls.as_ref().map(ClientTls::counts),
            token: match &self.reach.token {
                Some(Token::File(file)) => Some(file.counts()),
                Some(Token::Value(_)) | None => None,
            },
        };
        counts.render()
    }
}

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The sidecar did its work, or said why it will not.
    Done,
    /// It cannot or will not do it at the moment, and neither would another.
    Refused,
    /// It did nothing, because it has no store at the moment. Another might have one.
    Storeless,
    /// It did nothing, and another might do it.
    NotDone,
    /// Nobody knows.
    Unknown,
}

/// Errors stand in the headers of an answer without a body. Errors later in the stream are left to the caller.
fn verdict(response: &http::Response<Body>) -> Verdict {
    let headers = response.headers();
    if !headers.contains_key("grpc-status") {
        return match response.status().as_u16() {
            200 => Verdict::Done,
            // Not from a sidecar: with these a proxy says that the call may have reached one.
            429 | 502..=504 => Verdict::Unknown,
            _ => Verdict::Refused,
        };
    }
    let Some(status) = Status::from_header_map(headers) else { return Verdict::Done };
    match status.code() {
        Code::Unavailable => {}
        // Turned away before it was looked at, which says nothing about an earlier try that was looked at.
        Code::Unauthenticated | Code::PermissionDenied | Code::ResourceExhausted | Code::Unimplemented => {
            return Verdict::Refused;
        }
        _ => return Verdict::Done,
    }
    match status.get_details_error_info() {
        Some(info) if info.domain == reason::DOMAIN && info.reason == reason::OVERLOADED => Verdict::NotDone,
        Some(info) if info.domain == reason::DOMAIN && info.reason == reason::STORE_UNAVAILABLE => Verdict::Storeless,
        // Whatever it is, it is not known that nothing happened.
        Some(_) => Verdict::Refused,
        // A proxy's, or a connection's that broke after the headers.
        None => Verdict::Unknown,
    }
}

/// Whether the connection could not even be made.
pub(super) fn never_sent(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<tonic::ConnectError>() || error.is::<NoAddress>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// The less busy of two chosen at random (power of two choices). Avoids the one asked before and those set aside, as long
/// as there are others.
fn pick(members: &[Arc<Member>], before: Option<&Arc<Member>>, now: Instant) -> Option<Arc<Member>> {
    let is_other = |member: &&Arc<Member>| !before.is_some_and(|before| Arc::ptr_eq(before, member));
    let others = || members.iter().filter(is_other);
    let picked = less_busy(others().filter(|member| member.is_well(now))).or_else(|| less_busy(others()));
    picked.or(members.first()).cloned()
}

fn less_busy<'m>(members: impl Iterator<Item = &'m Arc<Member>> + Clone) -> Option<&'m Arc<Member>> {
    let mut rng = rand::rng();
    let (one, other) = (members.clone().choose(&mut rng)?, members.choose(&mut rng)?);
    // Of equals the first, which is a random one.
    [one, other].into_iter().min_by_key(|member| member.in_flight.load(Relaxed))
}

impl Member {
    fn is_well(&self, now: Instant) -> bool {
        self.health().aside.is_none_or(|until| until <= now)
    }

    fn worked(&self) {
        let mut health = self.health();
        if health.failures > 0 {
            *health = Health::default();
        }
    }

    fn failed(&self, now: Instant) {
        let mut health = self.health();
        health.failures = health.failures.saturating_add(1);
        let doubled = ASIDE_MIN.saturating_mul(1 << (health.failures - 1).min(10)).min(ASIDE_MAX);
        health.aside = Some(now + doubled.mul_f64(0.75 + 0.5 * rand::random::<f64>()));
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a call while it is under way. A call whose caller gave up before there was an answer or an error is a failure.
/// The channel ends a call at its deadline as well, but no sooner than the caller does, and later after a retry.
struct InFlight<'a> {
    pool: &'a Shared,
    member: &'a Member,
    answered: bool,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.member.in_flight.fetch_sub(1, Relaxed);
        if !self.answered {
            self.pool.set_aside(self.member);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn what_a_proxy_answers_by_itself_is_not_taken_for_the_sidecars_word() {
        let answered = |status: u16, grpc: Option<&'static str>| {
            let mut response = http::Response::builder().status(status);
            if let Some(grpc) = grpc {
                response = response.header("grpc-status", grpc);
            }
            verdict(&response.body(Body::empty()).expect("an answer"))
        };
        assert_eq!(answered(200, None), Verdict::Done);
        assert_eq!(answered(200, Some("5")), Verdict::Done);
        for status in [400, 401, 403, 404, 500] {
            assert_eq!(answered(status, None), Verdict::Refused, "{status}");
        }
        for status in [429, 502, 503, 504] {
            assert_eq!(answered(status, None), Verdict::Unknown, "{status}");
        }
        // An answer with a gRPC status is judged by that.
        assert_eq!(answered(503, Some("7")), Verdict::Refused);
    }

    #[test]
    fn another_is_asked_only_for_what_says_that_nothing_happened() {
        let refused = |domain: &str, name: &str| {
            let details = ErrorDetails::with_error_info(name, domain, HashMap::new());
            verdict(&Status::with_error_details(Code::Unavailable, "some text", details).into_http::<Body>())
        };
        for name in reason::ALL {
            let wanted = match *name {
                reason::STORE_UNAVAILABLE => Verdict::Storeless,
                reason::OVERLOADED => Verdict::NotDone,
                _ => Verdict::Refused,
            };
            assert_eq!(refused(reason::DOMAIN, name), wanted, "{name}");
            assert_eq!(refused("example.com", name), Verdict::Refused, "somebody else's {name}");
        }
    }
}
