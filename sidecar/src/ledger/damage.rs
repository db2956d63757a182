//! What follows when the database fails to read what it keeps (L3): a damaged page is the trouble of the events on it, and a
//! database that reads nothing any more is an outage.

/// How many items of a batch the database may fail to read before it has read any of it: then it is taken to read nothing, and
/// the rest is not tried.
pub(super) const ITEMS_MAX: usize = 16;
/// How many items in a row, each alone in its batch, the database may fail to read before it is taken to read nothing.
const ALONE_MAX: u32 = 2;

/// What the batches before have met.
#[derive(Debug, Default)]
pub(super) struct Damage {
    /// Items that could not be read, each alone in its batch, since one was last read.
    alone: u32,
}

impl Damage {
    /// Whether the rest of a batch is not tried any more, of which items were read (`done`) or not, and `damaged` could not be.
    pub(super) fn ends_batch(done: bool, damaged: usize) -> bool {
        !done && damaged >= ITEMS_MAX
    }

    /// Whether the database is to be taken to read nothing any more, after it has read (`done`) or not read items of a batch,
    /// and failed to read `damaged` of them.
    pub(super) fn reads_nothing(&mut self, done: bool, damaged: usize) -> bool {
        if done {
            self.alone = 0;
        } else if damaged == 1 {
            self.alone = self.alone.saturating_add(1);
        }
        !done && (damaged > 1 || damaged == 1 && self.alone > ALONE_MAX)
    }
}
