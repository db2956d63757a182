//! What runs beside the calls: Cleanup, the sweep that keeps queries quick, the count for the metrics, and the watch on the
//! ledger that health reports.

pub mod cleanup;
pub(crate) mod count;
pub mod pace;
pub mod sweep;
pub mod watch;
