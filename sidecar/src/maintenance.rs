//! What runs beside the calls: Cleanup, and the watch on the ledger that readiness and health tell of.

pub mod cleanup;
pub mod watch;
