//! Reading beside the writer: connections of their own, each query on one snapshot, off the async runtime's threads.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use oncegate_runtime::throttle::Throttle;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};
use tokio::{sync::Semaphore, task::spawn_blocking};

use super::{clock::Clock, error::Fault, rows};
use crate::{
    event::{FencingToken, Key, KeyDigest, State, Time},
    ledger::{
        Attempts, Error, EventHistory, Replayed,
        filter::{Counts, Cursor, HistoryFilter, Page, StatsFilter, StatsReport},
        stretches::of_hours,
        timings::Folding,
        walk::{Bounds, Walk},
    },
};

/// The readers' connections, opened as they are needed and kept.
#[derive(Debug)]
pub(super) struct Readers {
    path: PathBuf,
    busy_timeout: Duration,
    idle: Mutex<Vec<Connection>>,
    /// As many as there may be queries at once; closed with the ledger.
    permits: Arc<Semaphore>,
    failures: Throttle,
}

impl Readers {
    pub(super) fn new(path: PathBuf, busy_timeout: Duration, connections: usize) -> Self {
        let permits = Arc::new(Semaphore::new(connections.max(1)));
        Self { path, busy_timeout, idle: Mutex::default(), permits, failures: Throttle::default() }
    }

    /// Runs a query on one snapshot. Cancelled, it goes on to its end and is forgotten.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_closed| Error::unavailable())?;
        let readers = Arc::clone(self);
        let done = spawn_blocking(move || {
            let done = readers.snapshot(query);
            drop(permit);
            done
        });
        match done.await {
            Ok(done) => done.map_err(|error| {
                let fault = Fault::from(error);
                if let Some(unreported) = self.failures.pass() {
                    tracing::warn!(
                        error = &fault as &dyn std::error::Error,
                        unreported,
                        "the embedded database could not be read"
                    );
                }
                fault.answer()
            }),
            Err(error) if error.is_panic() => Err(Error::Internal("a read of the ledger ended early".into())),
            // The runtime is shutting down.
            Err(_) => Err(Error::unavailable()),
        }
    }

    fn snapshot<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let idle = self.idle().pop();
        let conn = match idle {
            Some(conn) => conn,
            None => self.open()?,
        };
        // Deferred: the first query takes the snapshot that the others see as well. Dropped, it is rolled back.
        let transaction = conn.unchecked_transaction()?;
        let answer = query(&transaction)?;
        transaction.commit()?;
        // One that met an error is not kept.
        if !self.permits.is_closed() {
            self.idle().push(conn);
        }
        Ok(answer)
    }

    fn open(&self) -> rusqlite::Result<Connection> {
        // Not the read-only flag: a reader of a write-ahead log has its part in the log's index.
        let conn = Connection::open_with_flags(
            &self.path,
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        conn.busy_timeout(self.busy_timeout)?;
        conn.pragma_update(None, "query_only", true)?;
        Ok(conn)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        // Nothing can panic while it is held.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether [`Self::close`] was called.
    pub(super) fn is_closed(&self) -> bool {
        self.permits.is_closed()
    }

    /// Refuses further queries and closes the connections; those of queries under way end with them.
    pub(super) fn close(&self) {
        self.permits.close();
        self.idle().clear();
    }
}

/// Where these events are now; absent ones, and those in a state that this version does not know, are left out.
pub(super) fn peek(conn: &Connection, keys: Vec<Key>) -> rusqlite::Result<Vec<(Key, State, FencingToken)>> {
    let mut statement = conn.prepare_cached(include_str!("peek.sql"))?;
    let mut found = Vec::new();
    for key in keys {
        let row = statement
            .query_row(params![key.tenant, key.provider, key.event_id], |row| {
                Ok((State::parse(row.get_ref(0)?.as_str()?), row.get(1)?))
            })
            .optional()?;
        if let Some((Some(state), fencing_token)) = row {
            found.push((key, state, fencing_token));
        }
    }
    Ok(found)
}

/// What was replayed by force since an earlier read, which ended with this token (C7).
pub(super) fn replays(conn: &Connection, after: FencingToken, clock: &Clock) -> rusqlite::Result<Replayed> {
    let mut statement = conn.prepare_cached(include_str!("replays.sql"))?;
    let mut rows = statement.query(params![after])?;
    let mut events = Vec::new();
    let mut last = after;
    while let Some(row) = rows.next()? {
        last = row.get(0)?;
        let key = Key { tenant: row.get(1)?, provider: row.get(2)?, event_id: row.get(3)? };
        events.push((KeyDigest::of(&key), last));
    }
    Ok(Replayed { now: clock.now(), events, floor: FencingToken::NONE, bookmark: Some(last.to_string().into()) })
}

/// One event with all that was done on it.
pub(super) fn history_of(conn: &Connection, key: &Key) -> rusqlite::Result<Option<EventHistory>> {
    let event = conn
        .prepare_cached(include_str!("event.sql"))?
        .query_row(params![key.tenant, key.provider, key.event_id], rows::event)
        .optional()?;
    let Some(event) = event else { return Ok(None) };
    let mut attempts = Attempts::default();
    attempts.extend(event.latest_attempt());
    let mut statement = conn.prepare_cached(include_str!("attempts.sql"))?;
    for attempt in statement.query_map(params![event.row, EventHistory::ATTEMPTS_MAX], rows::attempt)? {
        attempts.extend([attempt?]);
    }
    let resolutions = conn
        .prepare_cached(include_str!("resolutions.sql"))?
        .query_map(params![event.row, EventHistory::RESOLUTIONS_MAX], rows::resolution)?
        .collect::<Result<_, _>>()?;
    Ok(Some(attempts.history(event, resolutions)))
}

/// Events, newest first. A page whose time is over ends where it has come to.
///
/// The end of a part is looked up first, because SQLite would copy whole rows, with their large bodies, out of a subquery that
/// bounds it.
pub(super) fn history(conn: &Connection, filter: &HistoryFilter, time_max: Duration) -> rusqlite::Result<Page> {
    let begun = Instant::now();
    let bounds = Bounds::of(filter);
    let states = (!filter.states.is_empty())
        .then(|| serde_json::Value::from_iter(filter.states.iter().map(|state| state.as_str())).to_string());
    let stretches = if bounds.by_hours {
        let mut statement = conn.prepare_cached(include_str!("history_hours.sql"))?;
        let (first, last) = (bounds.start.hour(), bounds.end.create_time);
        let hours = statement
            .query_map(params![filter.tenant, filter.provider, states, first, last], |row| row.get::<_, Time>(0))?;
        of_hours(hours.collect::<Result<Vec<_>, _>>()?, bounds.start, bounds.end)
    } else {
        vec![bounds.whole()]
    };
    let mut boundary = conn.prepare_cached(include_str!("history_boundary.sql"))?;
    let mut part = conn.prepare_cached(include_str!("history_page.sql"))?;
    let mut walk = Walk::new(filter.page_size, stretches, begun, time_max);
    while let Some(look) = walk.look() {
        let last = boundary
            .query_row(params![look.place.create_time, look.place.row, look.start, look.look_max], |row| {
                Ok(Cursor { create_time: row.get(0)?, row: row.get(1)? })
            })
            .optional()?;
        let until = last.unwrap_or(Cursor::before(look.start));
        let rows = part.query_map(
            params![
                look.place.create_time,
                look.place.row,
                until.create_time,
                until.row,
                filter.tenant,
                filter.provider,
                filter.event_type,
                states,
                look.wanted,
            ],
            rows::event,
        )?;
        for event in rows {
            if !walk.push(event?) {
                return Ok(walk.page());
            }
        }
        walk.looked(last, Instant::now());
    }
    Ok(walk.page())
}

/// Counts, and what is stuck.
pub(super) fn stats(conn: &Connection, filter: &StatsFilter, clock: &Clock) -> rusqlite::Result<StatsReport> {
    let (start_time, end_time) = filter.bounds();
    let mut counts: BTreeMap<(Time, String), Counts> = BTreeMap::new();
    let mut statement = conn.prepare_cached(include_str!("stats.sql"))?;
    let mut rows = statement.query(params![filter.tenant, filter.provider, start_time, end_time])?;
    while let Some(row) = rows.next()? {
        let mut found = Counts { duplicates: row.get(8)?, retries: row.get(9)?, ..Counts::default() };
        for (column, state) in (2..).zip(State::ALL) {
            found[state] = row.get(column)?;
        }
        if !filter.add(&mut counts, row.get(0)?, row.get(1)?, &found) {
            break;
        }
    }
    // After the first query, which took the snapshot: nothing in it is later than this.
    let now = clock.now();
    counts.retain(|_, found| *found != Counts::default());
    if filter.is_exceeded_by(&counts) {
        return Ok(StatsReport::of(counts, now));
    }
    let (percentiles, timings) =
        if filter.timings { timings(conn, filter, &counts)?.end() } else { Default::default() };
    let mut statement = conn.prepare_cached(include_str!("stats_stuck.sql"))?;
    let mut rows = statement.query(params![filter.tenant, filter.provider, start_time, end_time, now])?;
    while let Some(row) = rows.next()? {
        counts.entry(filter.place_of(row.get(0)?, row.get(1)?)).or_default().stuck += 1;
    }
    Ok(StatsReport { counts, percentiles, timings, as_of: now })
}

/// By tenant first, as they lie in the table: a bucket is complete only at the end. Sorting them would take memory as well.
fn timings(
    conn: &Connection,
    filter: &StatsFilter,
    counts: &BTreeMap<(Time, String), Counts>,
) -> rusqlite::Result<Folding> {
    let (start, end) = filter.bounds();
    let (first_day, last_day) = filter.whole_days();
    let mut times = Folding::default();
    let mut statement = conn.prepare_cached(include_str!("stats_timings.sql"))?;
    let mut rows = statement.query(params![filter.tenant, filter.provider, start, first_day, last_day, end])?;
    while let Some(row) = rows.next()? {
        let place = filter.place_of(row.get(0)?, row.get(1)?);
        // Times may outlive what is counted, and are then nobody's.
        if times.len() >= filter.counts_max && !counts.contains_key(&place) {
            continue;
        }
        times.at(place.0, place.1).add(row.get(2)?, row.get(3)?);
    }
    Ok(times)
}

/// Whether the database can be read at all.
pub(super) fn check(conn: &Connection) -> rusqlite::Result<()> {
    conn.prepare_cached("select 1 from oncegate_counter where id = 1")?.query_row([], |_| Ok(()))
}
