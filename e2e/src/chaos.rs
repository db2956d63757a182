//! The tests of the promise: everything runs as processes with proxies between them, under a random load and random
//! faults derived from one seed; what every caller saw is recorded, and the invariants are checked over that record.
//!
//! A seed repeats every *decision*: which events there are, what their callers try, which faults strike, and for how
//! long. It does not repeat the machine's scheduling, so a seed may have to run a few times to hit the same moment again.

pub mod application;
pub mod campaign;
pub mod check;
pub mod client;
pub mod disk;
pub mod faults;
pub mod history;
pub mod kill;
pub mod residue;
pub mod rows;
pub mod seed;
pub mod single;
pub mod workload;
pub mod world;
