//! The gateway: it terminates the webhooks of payment providers, verifies them over the bytes received, asks the
//! sidecar for the lock on each event, delivers the event to the application behind it, records how that ended, and
//! answers the provider.
//!
//! What it guarantees while it enforces: nothing is delivered without a lock, and no provider gets its 200 before the
//! completion is durable (unless the configuration says so, [`config::InProgressStatus`] and [`config::HeldStatus`]). What
//! it does not guarantee: that an application gets each event only once. If a lock expires while the application is at
//! work, the event comes again, and the application has to look at the fencing token.
//!
//! The rules cited by number (G1, S1, W1) stand in `docs/rules.md`.
//!
//! From the outside in: `server` (routes) → `ingest` (up to a verified event: `body`, [`providers`], [`key`]) →
//! `delivery` (claim, `upstream`, mark: [`sidecar`]) → `answer`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod access;
mod answer;
mod body;
pub mod config;
mod delivery;
mod enforcement;
mod failures;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod health;
mod ingest;
pub mod key;
pub mod metrics;
pub mod providers;
mod reload;
mod route;
mod server;
pub mod sidecar;
mod signing;
mod trace;
mod upstream;
mod url;
pub mod verify;

/// What the gateway calls itself where it is the client.
const USER_AGENT: http::HeaderValue = http::HeaderValue::from_static(concat!("oncegate/", env!("CARGO_PKG_VERSION")));

pub use enforcement::Enforcement;
pub use server::{Gateway, RunError, StartError};
