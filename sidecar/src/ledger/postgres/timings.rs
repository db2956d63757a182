//! Writes the processing times that the writer has counted in memory.

use sqlx::{PgConnection, postgres::PgBindIterExt as _};

use super::statement::Statement;
use crate::{
    event::Time,
    ledger::timings::{Place, Timings},
};

/// Adds processing times to the histograms. Not repeatable: it adds. Items sorted by place.
pub(super) struct FlushTimings;

impl Statement for FlushTimings {
    type Item = (Place, Timings);
    type Output = ();
    const REPEATABLE: bool = false;

    async fn run(
        &self,
        connection: &mut PgConnection,
        slot: i32,
        items: &[(Place, Timings)],
    ) -> Result<(), sqlx::Error> {
        let rows: Vec<(&str, &str, Time, i16, i64)> = items
            .iter()
            .flat_map(|((tenant, provider, hour), timings)| {
                timings.buckets().map(move |(bucket, count)| (tenant.as_str(), provider.as_str(), *hour, bucket, count))
            })
            .collect();
        sqlx::query(include_str!("timings.sql"))
            .bind(rows.iter().map(|row| row.0).bind_iter())
            .bind(rows.iter().map(|row| row.1).bind_iter())
            .bind(rows.iter().map(|row| row.2).bind_iter())
            .bind(rows.iter().map(|row| row.3).bind_iter())
            .bind(rows.iter().map(|row| row.4).bind_iter())
            .bind(slot)
            .execute(connection)
            .await?;
        Ok(())
    }
}
