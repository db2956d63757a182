//! What the promise is tested with: everything as processes with proxies between them, a random load under random faults
//! that come from one seed, a record of what every caller saw, and a checker of the invariants over it.
//!
//! A seed repeats every *decision*: which events there are, what their callers try, which faults strike, for how long. It
//! does not repeat the machine's scheduling, so the same seed may have to run a few times to meet the same moment again.

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
