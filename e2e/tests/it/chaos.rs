//! The promise under faults. See `oncegate_e2e::chaos`.

mod kill9;
