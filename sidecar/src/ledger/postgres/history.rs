//! History: one event, and pages of them in bounded time whatever the filters are.

use std::time::Instant;

use futures::TryStreamExt as _;
use sqlx::{Connection as _, PgConnection, Row as _};

use super::{read::Reader, row};
use crate::{
    event::{Key, Time},
    ledger::{
        Attempts, Error, EventHistory,
        filter::{Cursor, HistoryFilter, Page},
        stretches::of_hours,
        walk::{Bounds, PAGE_TIME_MAX, Walk},
    },
};

/// Begins what one page is read from. Vacuum waits for its end: for [`PAGE_TIME_MAX`], and a statement's time more.
const SNAPSHOT: &str = "begin isolation level repeatable read read only";

impl Reader {
    pub(super) async fn history_of(&self, key: Key) -> Result<Option<EventHistory>, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                let Some(row) = sqlx::query(include_str!("history_event.sql"))
                    .bind(key.tenant)
                    .bind(key.provider)
                    .bind(key.event_id)
                    .fetch_optional(&mut *connection)
                    .await?
                else {
                    return Ok(None);
                };
                let event = row::event(&row, 0)?;
                let mut attempts = Attempts::default();
                attempts.extend(event.latest_attempt());
                // One by one: 500 results of 64 KiB are more than one message, and one answer, may take.
                let mut rows = sqlx::query(include_str!("history_attempts.sql"))
                    .bind(event.row)
                    .bind(EventHistory::ATTEMPTS_MAX)
                    .fetch(&mut *connection);
                while let Some(row) = rows.try_next().await? {
                    // Granted again between the two reads: the event's row tells of its latest attempt as it was.
                    attempts.extend(row::archived(&row)?.filter(|attempt| attempt.attempt <= event.archived_count()));
                }
                drop(rows);
                let mut resolutions = Vec::new();
                for row in sqlx::query(include_str!("history_resolutions.sql"))
                    .bind(event.row)
                    .bind(EventHistory::RESOLUTIONS_MAX)
                    .fetch_all(&mut *connection)
                    .await?
                {
                    resolutions.extend(row::resolution(&row)?);
                }
                Ok(Some(attempts.history(event, resolutions)))
            })
        })
        .await
    }

    pub(super) async fn history(&self, filter: HistoryFilter) -> Result<Page, Error> {
        self.run(move |connection| Box::pin(async move { Ok(page(connection, &filter).await?) })).await
    }
}

/// Reads a page from one snapshot. What a statement found and how far it looked are two queries: from two snapshots, as many
/// events as came in between would be looked at twice, and as many as went would be passed over.
async fn page(connection: &mut PgConnection, filter: &HistoryFilter) -> Result<Page, sqlx::Error> {
    let mut snapshot = connection.begin_with(SNAPSHOT).await?;
    let page = walk(&mut snapshot, filter).await?;
    snapshot.commit().await?;
    Ok(page)
}

async fn walk(snapshot: &mut PgConnection, filter: &HistoryFilter) -> Result<Page, sqlx::Error> {
    let begun = Instant::now();
    let bounds = Bounds::of(filter);
    let states =
        (!filter.states.is_empty()).then(|| filter.states.iter().map(|state| state.as_str()).collect::<Vec<_>>());
    let stretches = if bounds.by_hours {
        let hours: Vec<Time> = sqlx::query_scalar(include_str!("history_hours.sql"))
            .bind(&filter.tenant)
            .bind(&filter.provider)
            .bind(&states)
            .bind(bounds.start.hour())
            .bind(bounds.end.create_time)
            .fetch_all(&mut *snapshot)
            .await?;
        of_hours(hours, bounds.start, bounds.end)
    } else {
        vec![bounds.whole()]
    };
    let mut walk = Walk::new(filter.page_size, stretches, begun, PAGE_TIME_MAX);
    while let Some(look) = walk.look() {
        let mut rows = sqlx::query(include_str!("history_page.sql"))
            .bind(look.place.create_time)
            .bind(look.place.row)
            .bind(look.start)
            .bind(&filter.tenant)
            .bind(&filter.provider)
            .bind(&filter.event_type)
            .bind(&states)
            .bind(look.wanted)
            .bind(look.look_max)
            .fetch(&mut *snapshot);
        while let Some(row) = rows.try_next().await? {
            if !walk.push(row::event(&row, 0)?) {
                // What else the statement found is read and dropped, row by row, before the connection's next one.
                return Ok(walk.page());
            }
        }
        drop(rows);
        let boundary = sqlx::query(include_str!("history_boundary.sql"))
            .bind(look.place.create_time)
            .bind(look.place.row)
            .bind(look.start)
            .bind(look.look_max)
            .fetch_optional(&mut *snapshot)
            .await?;
        let boundary = match boundary {
            Some(row) => Some(Cursor { create_time: row.try_get(0)?, row: row.try_get(1)? }),
            None => None,
        };
        walk.looked(boundary, Instant::now());
    }
    Ok(walk.page())
}
