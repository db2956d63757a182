//! Everything with everything real, in one test binary.

mod access;
mod api;
mod bad_input;
mod bench;
mod cases;
mod chaos;
mod commands;
mod dev;
mod durability;
mod end_to_end;
mod enforcement;
mod faults_table;
mod harness;
mod ledger;
mod limits;
mod operators;
mod outage;
mod pair;
mod providers;
mod python_client;
mod redis_many;
mod secrets;
mod setup;
mod shutdown;
mod simulate;
mod verify;
