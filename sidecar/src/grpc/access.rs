//! Access control: who is calling, and whether that is permitted. The tenant named in a request is checked by [`Caller`] once
//! the request has been decoded.

use std::sync::Arc;

use jiff::Timestamp;
use oncegate_api::{limits::TENANT_BYTES_MAX, reason, v1};
use oncegate_runtime::{reload::Files, server::Peer, throttle::Throttle};
use tonic::{Code, Status, codegen::http};

use super::{audit, status::status};
use crate::{
    access::{Directory, Identity, Tenants, Unknown},
    method::{Called, Method},
    metrics::Metrics,
};

/// How many refusals of strangers are logged one by one per second; beyond that only their number is logged. Refusals of known
/// callers are always logged.
const STRANGERS_LOGGED: u32 = 100;

/// What access checks need, shared by all connections.
pub(crate) struct Door {
    directory: Arc<Files<Directory>>,
    metrics: Arc<Metrics>,
    strangers: Throttle,
}

impl Door {
    pub(crate) fn new(directory: Arc<Files<Directory>>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { directory, metrics, strangers: Throttle::per_second(STRANGERS_LOGGED) })
    }
}

/// The access checks of one connection.
#[derive(Clone)]
pub(super) struct Guard {
    door: Arc<Door>,
    peer: Arc<Peer>,
}

impl Guard {
    pub(super) fn new(door: Arc<Door>, peer: Peer) -> Self {
        Self { door, peer: Arc::new(peer) }
    }

    /// Admits a request, adding its caller as an extension, or says why not.
    pub(super) fn admit<B>(&self, called: Called, request: &mut http::Request<B>) -> Result<(), Status> {
        // Called by probes and load balancers, which have no credentials; it reveals nothing about events.
        if called == Called::Health {
            return Ok(());
        }
        // As the other lines of the audit name it; what is no method of the API has nothing but its path.
        let method = if let Called::Api(method) = called { method.name() } else { request.uri().path() };
        let mut authorizations = request.headers().get_all(http::header::AUTHORIZATION).iter();
        let authorization = authorizations.next().map(http::HeaderValue::as_bytes);
        // If there are two, picking either could be wrong, so neither is used (W7).
        let authorization = if authorizations.next().is_some() { Some(&b""[..]) } else { authorization };
        let directory = self.door.directory.current();
        let identity = match directory.identify(authorization, self.peer.certificate.as_ref(), Timestamp::now()) {
            Ok(identity) => identity,
            Err(unknown) => return Err(self.stranger(method, &unknown)),
        };
        let caller = Caller { identity, peer: self.peer.clone(), metrics: self.door.metrics.clone() };
        if !caller.identity.role.permits(called) {
            let why = format!("the role {} does not permit it", caller.identity.role);
            return Err(caller.denied(method, None, &why));
        }
        if matches!(called, Called::Api(Method::Resolve | Method::Cleanup)) {
            // Manual decisions and deletions are logged when they begin, in case this process does not live to log how they end
            // (W20).
            tracing::info!(caller = caller.identity.name, method, peer = %self.peer, "an operator calls");
        }
        request.extensions_mut().insert(caller);
        Ok(())
    }

    fn stranger(&self, method: &str, unknown: &Unknown) -> Status {
        self.door.metrics.unauthenticated.add();
        let (who, why) = match unknown {
            Unknown::NoCredentials => (String::new(), "neither a token nor a client certificate was sent"),
            Unknown::UnknownToken => (String::new(), "the token is not known"),
            Unknown::UnknownCertificate(certificate) => {
                let names = certificate.uris.iter().chain(&certificate.dns_names).map(String::as_str);
                (names.collect::<Vec<_>>().join(","), "the client certificate is not known")
            }
            Unknown::Expired(identity) => (identity.name.clone(), "the credentials have expired"),
        };
        if let Some(unreported) = self.door.strangers.pass() {
            // A path is the caller's own text: printed as a value, never as a format.
            tracing::warn!(
                target: audit::TARGET,
                caller = who,
                ?method,
                peer = %self.peer,
                why,
                unreported,
                outcome = reason::UNAUTHENTICATED,
                "a call was denied"
            );
        }
        status(Code::Unauthenticated, reason::UNAUTHENTICATED, why)
    }
}

/// The caller that was admitted. An extension of the request.
#[derive(Clone)]
pub(super) struct Caller {
    identity: Arc<Identity>,
    peer: Arc<Peer>,
    metrics: Arc<Metrics>,
}

impl Caller {
    /// For logs.
    pub(super) fn name(&self) -> &str {
        &self.identity.name
    }

    pub(super) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// `tenant` is the tenant asked for, if already known.
    fn denied(&self, method: &str, tenant: Option<&str>, why: &str) -> Status {
        self.metrics.permission_denied.add();
        tracing::warn!(
            target: audit::TARGET,
            caller = self.identity.name,
            ?method,
            // The caller's own text, of any length. No tenant's name is longer than this.
            tenant = tenant.map(|tenant| tenant.chars().take(TENANT_BYTES_MAX).collect::<String>()),
            peer = %self.peer,
            why,
            outcome = reason::PERMISSION_DENIED,
            "a call was denied"
        );
        status(Code::PermissionDenied, reason::PERMISSION_DENIED, why)
    }

    /// Whether the tenant is one of the caller's (W21).
    fn of_tenant(&self, method: Method, tenant: &str) -> Result<(), Status> {
        // As the contract defines for keys.
        let tenant = if tenant.is_empty() { "default" } else { tenant };
        if self.identity.tenants.include(tenant) {
            return Ok(());
        }
        Err(self.denied(method.name(), Some(tenant), "the event belongs to a tenant of somebody else"))
    }

    /// The tenant of a listing: a caller bound to a single tenant gets that one without naming it.
    fn of_listing(&self, method: Method, tenant: &mut String) -> Result<(), Status> {
        match &self.identity.tenants {
            Tenants::All => Ok(()),
            Tenants::Only(tenants) if tenant.is_empty() => match (tenants.first(), tenants.len()) {
                (Some(only), 1) => {
                    tenant.clone_from(only);
                    Ok(())
                }
                _ => Err(self.denied(method.name(), None, "the tenants of everybody were asked for: name one")),
            },
            Tenants::Only(_) => self.of_tenant(method, tenant),
        }
    }
}

/// Whether the caller may touch the event, where callers are told apart. A request without a key is refused later, for that
/// reason.
pub(super) fn event<T>(
    request: &tonic::Request<T>,
    method: Method,
    key: impl FnOnce(&T) -> Option<&v1::EventKey>,
) -> Result<(), Status> {
    let Some(caller) = request.extensions().get::<Caller>() else { return Ok(()) };
    match key(request.get_ref()) {
        Some(key) => caller.of_tenant(method, &key.tenant),
        None => Ok(()),
    }
}

/// The same for calls that list, count or delete by tenant.
pub(super) fn listing<T>(
    request: &mut tonic::Request<T>,
    method: Method,
    tenant: impl FnOnce(&mut T) -> &mut String,
) -> Result<(), Status> {
    let Some(caller) = request.extensions().get::<Caller>().cloned() else { return Ok(()) };
    caller.of_listing(method, tenant(request.get_mut()))
}
