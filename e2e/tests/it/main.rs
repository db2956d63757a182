//! Everything with everything real, in one test binary.

mod api;
mod bad_input;
mod chaos;
mod commands;
mod dev;
mod end_to_end;
mod enforcement;
mod harness;
mod ledger;
mod operators;
mod outage;
mod pair;
mod providers;
mod python_client;
mod redis_many;
mod setup;
mod simulate;
mod verify;
