//! What both services need, with no knowledge of events: configuration types, secrets, signals and drain, the accept
//! loop, the admin listener, logging, metrics and traces.
//!
//! Nothing here belongs to one service: listeners and the shutdown token come from outside, so two services can start in one
//! process. What a process has only once (the subscriber of its log, the exporter of its spans) is set up by the owner of
//! `main`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod admin;
pub mod buckets;
pub mod chain;
pub mod config;
pub mod detach;
pub mod idle;
pub mod logging;
pub mod metrics;
pub mod reload;
pub mod secret;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod throttle;
pub mod tls;
#[cfg(test)]
mod written;
