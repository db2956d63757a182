//! History: one event, and pages of them in bounded time whatever the filters are.

use std::time::Instant;

use futures::TryStreamExt as _;
use sqlx::{Connection as _, PgConnection, Row as _};

use super::{read::Reader, row};
use crate::{
    event::{Key, Time},
    ledger::{
        Attempts, Error, EventHistory,
        filter::{Cursor, EARLIEST, Filling, HistoryFilter, LATEST, Page},
        stretches::{LOOK_MAX, PAGE_TIME_MAX, Stretch, of_hours},
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
        self.run(move |connection| Box::pin(async move { page(connection, &filter).await })).await
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
    // The end is exclusive: a place before every row that was created at it.
    let end = Cursor { create_time: filter.end_time.unwrap_or(LATEST), row: 0 };
    let end = filter.after.map_or(end, |after| after.min(end));
    let start = filter.start_time.unwrap_or(EARLIEST);
    let states =
        (!filter.states.is_empty()).then(|| filter.states.iter().map(|state| state.as_str()).collect::<Vec<_>>());
    let stretches = if states.is_none() && filter.tenant.is_none() && filter.provider.is_none() {
        vec![Stretch { start, end }]
    } else {
        let hours: Vec<Time> = sqlx::query_scalar(include_str!("history_hours.sql"))
            .bind(&filter.tenant)
            .bind(&filter.provider)
            .bind(&states)
            .bind(start.hour())
            .bind(end.create_time)
            .fetch_all(&mut *snapshot)
            .await?;
        of_hours(hours, start, end)
    };
    let mut filling = Filling::new(filter.page_size);
    let mut stretches = stretches.into_iter();
    while let Some(stretch) = stretches.next() {
        let mut place = stretch.end;
        loop {
            let wanted = filling.wanted();
            let mut rows = sqlx::query(include_str!("history_page.sql"))
                .bind(place.create_time)
                .bind(place.row)
                .bind(stretch.start)
                .bind(&filter.tenant)
                .bind(&filter.provider)
                .bind(&filter.event_type)
                .bind(&states)
                .bind(wanted)
                .bind(LOOK_MAX.max(wanted))
                .fetch(&mut *snapshot);
            while let Some(row) = rows.try_next().await? {
                if !filling.push(row::event(&row, 0)?) {
                    // What else the statement found is read and dropped, row by row, before the connection's next one.
                    return Ok(filling.full());
                }
            }
            drop(rows);
            let boundary = sqlx::query(include_str!("history_boundary.sql"))
                .bind(place.create_time)
                .bind(place.row)
                .bind(stretch.start)
                .bind(LOOK_MAX.max(wanted))
                .fetch_optional(&mut *snapshot)
                .await?;
            match boundary {
                Some(boundary) => place = Cursor { create_time: boundary.try_get(0)?, row: boundary.try_get(1)? },
                None => {
                    // The stretch is walked to its end.
                    place = Cursor { create_time: stretch.start, row: 0 };
                    break;
                }
            }
            if begun.elapsed() >= PAGE_TIME_MAX {
                return Ok(filling.ending_at(Some(place)));
            }
        }
        // Behind the last one there is nothing to go on with.
        if stretches.len() > 0 && begun.elapsed() >= PAGE_TIME_MAX {
            return Ok(filling.ending_at(Some(place)));
        }
    }
    Ok(filling.ending_at(None))
}
