//! Which rows of the counts the writer adds to (L5).
//!
//! Each batch updates the rows of its tenants and providers in the writer's slot, some hundred times a second. Postgres removes
//! their old versions with the next updates, unless a snapshot could still see them: that of a dump, of `oncegate check`, or of a
//! standby with `hot_standby_feedback`. They stay then, and each batch looks through all of them: calls were half as fast after
//! half a minute. So the writer goes on in new rows, as often as old versions have piled up. Sums are over all slots, and Cleanup
//! folds what is over.

use std::sync::{
    Arc,
    atomic::{AtomicI32, AtomicI64, Ordering::Relaxed},
};

use sqlx::Row as _;

use super::read::Reader;
use crate::ledger::Error;

/// How many old versions of one row may pile up before it is left behind: some milliseconds' worth of a hundred batches.
const VERSIONS_MAX: i64 = 1_024;
/// Between one number of a slot and the next: more than there are slots.
const STEP: i32 = 1_000;
/// Numbers begin anew beyond this: a snapshot has then been held for months.
const NUMBER_MAX: i32 = 1_000_000_000;

/// The number under which the writer adds, shared with whoever changes it. Clones share it.
#[derive(Clone, Default)]
pub(super) struct CountRows(Arc<Shared>);

#[derive(Default)]
struct Shared {
    number: AtomicI32,
    /// Old versions in the table when it was last changed.
    versions: AtomicI64,
}

impl CountRows {
    /// The number to add under.
    pub(super) fn number(&self) -> i32 {
        self.0.number.load(Relaxed)
    }

    /// Another connection has this slot.
    pub(super) fn begin(&self, slot: i32) {
        self.0.number.store(slot, Relaxed);
    }

    /// Tells how many old versions the table has, and how many rows there are under this number in the present hour. Whether
    /// other rows are to be used from here on.
    fn saw(&self, versions: i64, rows: i64) -> bool {
        let piled_up = versions - self.0.versions.load(Relaxed);
        let full = piled_up >= VERSIONS_MAX.saturating_mul(rows.max(1));
        if full {
            // A connection that is made anew at this moment begins one further on, which is as good.
            let next = self.number() + STEP;
            self.0.number.store(if next > NUMBER_MAX { next % STEP } else { next }, Relaxed);
        }
        if full || piled_up < 0 {
            self.0.versions.store(versions, Relaxed);
        }
        full
    }
}

impl Reader {
    /// Has the writer go on in other rows, where old versions of its own are not removed.
    pub(super) async fn turn(&self, counts: &CountRows) -> Result<(), Error> {
        let number = counts.number();
        let (versions, rows) = self
            .run(move |connection| {
                Box::pin(async move {
                    let row = sqlx::query(include_str!("count_rows.sql")).bind(number).fetch_one(connection).await?;
                    Ok((row.try_get::<i64, _>("versions")?, row.try_get::<i64, _>("rows")?))
                })
            })
            .await?;
        if counts.saw(versions, rows) {
            tracing::debug!(versions, rows, "old versions of the counts are not removed; going on in new rows");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_left_behind_when_their_old_versions_pile_up_and_not_before() {
        let counts = CountRows::default();
        counts.begin(7);
        for (versions, rows, number) in [
            (0, 0, 7),
            (VERSIONS_MAX - 1, 1, 7),
            (VERSIONS_MAX, 1, 1_007),
            // From there on.
            (2 * VERSIONS_MAX - 1, 1, 1_007),
            (2 * VERSIONS_MAX, 0, 2_007),
            // Many tenants share them.
            (100 * VERSIONS_MAX, 99, 2_007),
            // They were removed.
            (10, 1, 2_007),
            (VERSIONS_MAX, 1, 2_007),
            (VERSIONS_MAX + 10, 1, 3_007),
        ] {
            counts.saw(versions, rows);
            assert_eq!(counts.number(), number, "{versions} of {rows}");
        }
        counts.begin(NUMBER_MAX);
        assert!(counts.saw(3 * VERSIONS_MAX, 1));
        assert!((0..STEP).contains(&counts.number()));
    }
}
