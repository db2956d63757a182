//! The promise under faults. See `oncegate_e2e::chaos`.

mod campaign;
mod clocks;
mod conservation;
mod kill9;
mod power_cut;
mod promotion;
mod proxies;
mod zombie;
