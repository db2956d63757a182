//! The numbers that a ledger gives out. Each is a type of its own, so that none can be taken for another, or for a time.

use std::fmt;

/// The number of a grant or of a resolution: those of one event strictly increase, and none is given out twice (I1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FencingToken(pub i64);

impl FencingToken {
    /// Lower than all that are given out.
    pub const NONE: FencingToken = FencingToken(0);
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The ledger's own number of an event's row. A deleted event that is seen again gets another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(pub i64);

impl RowId {
    /// Lower than those of all rows, which are numbered from 1.
    pub const NONE: RowId = RowId(0);
}
