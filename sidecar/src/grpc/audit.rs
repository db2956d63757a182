//! Everything that somebody may have to answer for gets one line in the log: each manual decision, each deletion, each
//! denial. These lines have a target of their own, so that a collector can store them separately and for longer; the log
//! level never drops them (see `logging` in the runtime).
//!
//! They identify an event by the same digest as the gateway's lines, and reveal nothing else of its name (W17).

use std::sync::Arc;

use oncegate_api::reason;
use oncegate_runtime::{logging::event_digest, server::Peer};
use tonic::Status;

use super::{access::Caller, status::reason_of};
use crate::{
    event::{Event, Key, Resolve, State},
    ledger::{
        Error,
        filter::{CleanupProgress, CleanupScope},
    },
    maintenance::cleanup::End,
    method::Method,
};

/// The target of these lines.
pub(super) const TARGET: &str = "oncegate_sidecar::audit";

/// The outcome of what was done.
const DONE: &str = "done";

/// The caller. Nothing is known about it where callers are not told apart.
#[derive(Clone)]
pub(super) struct Who {
    caller: Option<Caller>,
}

impl Who {
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        Self { caller: request.extensions().get::<Caller>().cloned() }
    }

    fn name(&self) -> Option<&str> {
        self.caller.as_ref().map(Caller::name)
    }

    fn peer(&self) -> Option<&Arc<Peer>> {
        self.caller.as_ref().map(Caller::peer)
    }
}

/// A manual decision that was requested.
pub(super) struct Decision {
    who: Who,
    key: Key,
    to: State,
    force: bool,
    actor: String,
}

impl Decision {
    pub(super) fn new(who: Who, resolve: &Resolve) -> Self {
        let Resolve { key, to, force, actor, .. } = resolve;
        Self { who, key: key.clone(), to: to.state(), force: *force, actor: actor.clone() }
    }

    /// How it ended. The reason given is stored with the event.
    pub(super) fn ended(&self, answer: &Result<Event, Error>) {
        let Key { tenant, provider, event_id } = &self.key;
        let (name, peer) = (self.who.name(), self.who.peer().map(tracing::field::display));
        let event = event_digest(tenant, provider, event_id);
        let (to, force, actor) = (self.to.as_str(), self.force, self.actor.as_str());
        match answer {
            Ok(now) => tracing::info!(
                target: TARGET,
                caller = name,
                peer,
                actor,
                tenant,
                provider,
                event,
                to,
                force,
                fencing_token = now.fencing_token.0,
                outcome = DONE,
                "an event was resolved by hand"
            ),
            Err(error) => tracing::warn!(
                target: TARGET,
                caller = name,
                peer,
                actor,
                tenant,
                provider,
                event,
                to,
                force,
                outcome = reason_of(error),
                "an event was not resolved by hand"
            ),
        }
    }
}

/// A Cleanup has ended.
pub(super) fn cleanup(who: &Who, scope: &CleanupScope, progress: &CleanupProgress, end: &End) {
    let (name, peer) = (who.name(), who.peer().map(tracing::field::display));
    let CleanupScope { tenant, provider, before, states, dry_run, .. } = scope;
    let states = states.iter().map(|state| state.as_str()).collect::<Vec<_>>().join(",");
    let before = jiff::Timestamp::from_microsecond(before.0).ok().map(tracing::field::display);
    let totals = progress.providers.values();
    let (matched, deleted) =
        totals.fold((0, 0), |(matched, deleted), totals| (matched + totals.matched, deleted + totals.deleted));
    let outcome = match end {
        End::Done => DONE,
        End::CallerGone => "caller gone",
        End::Stopping => "stopping",
        End::Failed(error) => reason_of(error),
    };
    tracing::info!(
        target: TARGET,
        caller = name,
        peer,
        tenant,
        provider,
        before,
        states,
        dry_run,
        matched,
        deleted,
        outcome,
        "a cleanup ended"
    );
}

/// Decisions and Cleanups that nobody can have meant. Their fields are not logged: they may contain anything.
pub(super) fn refused(who: &Who, method: Method, status: &Status) {
    let (name, peer) = (who.name(), who.peer().map(tracing::field::display));
    tracing::warn!(
        target: TARGET,
        caller = name,
        peer,
        method = method.name(),
        outcome = reason::INVALID_FIELD,
        reason = status.message(),
        "a {} was refused",
        if method == Method::Cleanup { "cleanup" } else { "decision by hand" }
    );
}
