//! Between rows and the domain. The order of the columns is that of the `select`s in `event.sql`, `history_page.sql` and
//! `attempts.sql`.

use rusqlite::{
    Row,
    types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef},
};

use crate::event::{Attempt, Event, FencingToken, Key, Latest, Outcome, Resolution, RowId, State, StoredResult, Time};

/// Reads one column after another.
struct Columns<'a, 'stmt> {
    row: &'a Row<'stmt>,
    next: usize,
}

impl Columns<'_, '_> {
    fn take<T: FromSql>(&mut self) -> rusqlite::Result<T> {
        let value = self.row.get(self.next);
        self.next += 1;
        value
    }

    fn result(&mut self) -> rusqlite::Result<Option<StoredResult>> {
        let code: Option<i32> = self.take()?;
        let content_type: Option<String> = self.take()?;
        let body: Option<Vec<u8>> = self.take()?;
        Ok(code.map(|code| StoredResult {
            code,
            content_type: content_type.unwrap_or_default(),
            body: body.unwrap_or_default().into(),
        }))
    }
}

/// An event of `event.sql` or `history_page.sql`.
pub(super) fn event(row: &Row<'_>) -> rusqlite::Result<Event> {
    let mut columns = Columns { row, next: 0 };
    Ok(Event {
        row: columns.take()?,
        key: Key { tenant: columns.take()?, provider: columns.take()?, event_id: columns.take()? },
        event_type: columns.take()?,
        state: columns.take()?,
        attempt_count: columns.take()?,
        attempts_forgiven: columns.take()?,
        duplicate_count: columns.take()?,
        mismatch_count: columns.take()?,
        last_mismatch_time: columns.take()?,
        fencing_token: columns.take()?,
        create_time: columns.take()?,
        update_time: columns.take()?,
        end_time: columns.take()?,
        retry_time: columns.take()?,
        latest: latest(&mut columns)?,
        fingerprint: columns.take()?,
        last_error: columns.take()?,
        result: columns.result()?,
        metadata: columns.take()?,
        completion_metadata: columns.take()?,
    })
}

fn latest(columns: &mut Columns<'_, '_>) -> rusqlite::Result<Option<Latest>> {
    let claim_id: Option<String> = columns.take()?;
    let holder: Option<String> = columns.take()?;
    let start_time: Option<Time> = columns.take()?;
    let lock_expire_time: Option<Time> = columns.take()?;
    let outcome: Option<Outcome> = columns.take()?;
    let payload_digest = columns.take()?;
    // All or none are there: payment_webhook_events_attempt_is_whole.
    let (Some(claim_id), Some(holder), Some(start_time), Some(lock_expire_time), Some(outcome)) =
        (claim_id, holder, start_time, lock_expire_time, outcome)
    else {
        return Ok(None);
    };
    Ok(Some(Latest { claim_id, holder, start_time, lock_expire_time, outcome, payload_digest }))
}

/// An attempt of `attempts.sql` or `attempt_by_token.sql`.
pub(super) fn attempt(row: &Row<'_>) -> rusqlite::Result<Attempt> {
    let mut columns = Columns { row, next: 0 };
    Ok(Attempt {
        attempt: columns.take()?,
        fencing_token: columns.take()?,
        claim_id: columns.take()?,
        holder: columns.take()?,
        start_time: columns.take()?,
        end_time: columns.take()?,
        outcome: columns.take()?,
        error: columns.take()?,
        payload_digest: columns.take()?,
        result: columns.result()?,
    })
}

/// A resolution of `resolutions.sql` or `resolution_last.sql`.
pub(super) fn resolution(row: &Row<'_>) -> rusqlite::Result<Resolution> {
    let mut columns = Columns { row, next: 0 };
    Ok(Resolution {
        fencing_token: columns.take()?,
        from_fencing_token: columns.take()?,
        from_state: columns.take()?,
        to_state: columns.take()?,
        reason: columns.take()?,
        actor: columns.take()?,
        time: columns.take()?,
    })
}

// === times, numbers and words as columns ===

/// What is one integer.
macro_rules! integer {
    ($($type:ident),*) => {$(
        impl ToSql for $type {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                Ok(ToSqlOutput::from(self.0))
            }
        }

        impl FromSql for $type {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                i64::column_result(value).map($type)
            }
        }
    )*};
}

integer!(Time, FencingToken, RowId);

impl ToSql for State {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(self.as_str()))
    }
}

impl FromSql for State {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        State::parse(value.as_str()?).ok_or(FromSqlError::InvalidType)
    }
}

impl ToSql for Outcome {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(self.as_str()))
    }
}

impl FromSql for Outcome {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Outcome::parse(value.as_str()?).ok_or(FromSqlError::InvalidType)
    }
}
