//! The gateway over real sockets, between a recording application and a scripted sidecar: covers outcomes that a real
//! sidecar hardly ever produces.

#![allow(clippy::unwrap_used)]

mod application;
mod balance;
mod client;
mod delivery;
mod harness;
mod health;
mod input;
mod log;
mod providers;
mod shutdown;
mod sidecar;
mod vectors;
