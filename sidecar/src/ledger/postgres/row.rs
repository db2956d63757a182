//! Between rows and the domain: times as the protocol has them, events, attempts and resolutions by column.

use std::num::NonZeroU32;

use bytes::Bytes;
use sqlx::{
    Column as _, Decode, Encode, Postgres, Row as _, Type,
    encode::IsNull,
    error::BoxDynError,
    postgres::{PgArgumentBuffer, PgHasArrayType, PgRow, PgTypeInfo, PgValueRef},
};

use crate::event::{
    Attempt, Digest, Ending, Event, FencingToken, Key, Latest, Mark, Outcome, Resolution, RowId, State, StoredResult,
    Time, transition,
};

/// `timestamptz` counts from 2000-01-01, in microseconds.
const EPOCH_2000_MICROS: i64 = 946_684_800_000_000;

impl Type<Postgres> for Time {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("timestamptz")
    }
}

impl PgHasArrayType for Time {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("timestamptz[]")
    }
}

impl Encode<'_, Postgres> for Time {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        let micros = self.0.saturating_sub(EPOCH_2000_MICROS);
        <i64 as Encode<'_, Postgres>>::encode_by_ref(&micros, buffer)
    }
}

impl<'r> Decode<'r, Postgres> for Time {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        // Binary: every statement is prepared, and sqlx asks for binary results of prepared statements.
        let micros: [u8; 8] = value.as_bytes()?.try_into()?;
        Ok(Time(i64::from_be_bytes(micros).saturating_add(EPOCH_2000_MICROS)))
    }
}

/// Numbers are columns of the type `bigint`.
macro_rules! bigint {
    ($($number:ident),*) => {$(
        impl Type<Postgres> for $number {
            fn type_info() -> PgTypeInfo {
                <i64 as Type<Postgres>>::type_info()
            }
        }

        impl PgHasArrayType for $number {
            fn array_type_info() -> PgTypeInfo {
                <i64 as PgHasArrayType>::array_type_info()
            }
        }

        impl Encode<'_, Postgres> for $number {
            fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
                <i64 as Encode<'_, Postgres>>::encode_by_ref(&self.0, buffer)
            }
        }

        impl<'r> Decode<'r, Postgres> for $number {
            fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
                <i64 as Decode<'r, Postgres>>::decode(value).map($number)
            }
        }
    )*};
}

bigint!(FencingToken, RowId);

/// A cap on attempts as the statements have it; 0: there is none.
pub(super) fn attempts_max(cap: Option<NonZeroU32>) -> i32 {
    // Attempts are counted in the same type, and never exceed what does not fit into it.
    cap.map_or(0, |cap| i32::try_from(cap.get()).unwrap_or(i32::MAX))
}

/// A word that is not known: as a state or outcome, the row was written by a newer version or by hand.
#[derive(Debug, thiserror::Error)]
#[error("column {column} has an unknown word")]
struct UnknownWord {
    column: &'static str,
}

/// Bytes that are no digest, where there has to be one: passed over, they would switch off what is compared with it (S8).
#[derive(Debug, thiserror::Error)]
#[error("column {column} has {bytes} bytes, where a digest has 32")]
struct NotADigest {
    column: &'static str,
    bytes: usize,
}

/// The digest in a column, if there is one.
fn digest(column: &'static str, bytes: Option<&[u8]>) -> Result<Option<Digest>, sqlx::Error> {
    bytes.map(|bytes| standing_digest(column, bytes)).transpose()
}

/// The digest in a column that always has one.
pub(super) fn standing_digest(column: &'static str, bytes: &[u8]) -> Result<Digest, sqlx::Error> {
    let not_a_digest = |_| sqlx::Error::Decode(Box::new(NotADigest { column, bytes: bytes.len() }));
    bytes.try_into().map_err(not_a_digest)
}

/// What a word of a column was read as, if it is known.
pub(super) fn word<T>(column: &'static str, parsed: Option<T>) -> Result<T, sqlx::Error> {
    parsed.ok_or_else(|| sqlx::Error::Decode(Box::new(UnknownWord { column })))
}

/// The columns of an event, in the order that every statement of this folder selects them in.
const EVENT: [&str; 29] = [
    "id",
    "tenant",
    "provider",
    "event_id",
    "event_type",
    "state",
    "attempt_count",
    "attempts_forgiven",
    "duplicate_count",
    "mismatch_count",
    "last_mismatch_time",
    "fencing_token",
    "create_time",
    "update_time",
    "end_time",
    "retry_time",
    "fingerprint",
    "metadata",
    "completion_metadata",
    "result_code",
    "result_body",
    "result_content_type",
    "last_error",
    "claim_id",
    "holder",
    "start_time",
    "lock_expire_time",
    "outcome",
    "payload_digest",
];

/// The event whose columns begin at `first`. Read by place, which costs less than by name; every test that reads an event shows
/// that the places are right.
pub(super) fn event(row: &PgRow, first: usize) -> Result<Event, sqlx::Error> {
    let at = |column: usize| first + column;
    debug_assert!(
        row.columns().iter().skip(first).map(sqlx::Column::name).take(EVENT.len()).eq(EVENT),
        "another order of columns: {:?}",
        row.columns()
    );
    let state: &str = row.try_get(at(5))?;
    let claim_id: Option<String> = row.try_get(at(23))?;
    let latest = match claim_id {
        None => None,
        Some(claim_id) => {
            let outcome: &str = row.try_get(at(27))?;
            Some(Latest {
                claim_id,
                holder: row.try_get::<Option<String>, _>(at(24))?.unwrap_or_default(),
                start_time: row.try_get(at(25))?,
                lock_expire_time: row.try_get(at(26))?,
                outcome: word("outcome", Outcome::parse(outcome))?,
                payload_digest: digest("payload_digest", row.try_get(at(28))?)?,
            })
        }
    };
    Ok(Event {
        row: row.try_get(at(0))?,
        key: Key { tenant: row.try_get(at(1))?, provider: row.try_get(at(2))?, event_id: row.try_get(at(3))? },
        event_type: row.try_get(at(4))?,
        state: word("state", State::parse(state))?,
        attempt_count: row.try_get(at(6))?,
        attempts_forgiven: row.try_get(at(7))?,
        duplicate_count: row.try_get(at(8))?,
        mismatch_count: row.try_get(at(9))?,
        last_mismatch_time: row.try_get(at(10))?,
        fencing_token: row.try_get(at(11))?,
        create_time: row.try_get(at(12))?,
        update_time: row.try_get(at(13))?,
        end_time: row.try_get(at(14))?,
        retry_time: row.try_get(at(15))?,
        fingerprint: digest("fingerprint", row.try_get(at(16))?)?,
        metadata: row.try_get(at(17))?,
        completion_metadata: row.try_get(at(18))?,
        result: result(row.try_get(at(19))?, row.try_get(at(20))?, row.try_get(at(21))?),
        last_error: row.try_get(at(22))?,
        latest,
    })
}

/// The columns of an event that a mark was applied to, by their places among all. Those that whoever marked it knows are left
/// out: every column has its cost, for each row and each start of the statement.
const MARKED: [usize; 18] = [0, 4, 5, 6, 7, 8, 9, 10, 12, 16, 17, 18, 22, 23, 24, 25, 26, 28];

/// Where the columns of a marked event stand in a row.
#[derive(Clone, Copy)]
pub(super) enum MarkedColumns {
    /// One behind the other, from here on.
    Alone(usize),
    /// Among all those of an event, which begin here.
    AmongAll(usize),
}

impl MarkedColumns {
    fn place(self, column: usize) -> usize {
        match self {
            Self::Alone(first) => first + column,
            Self::AmongAll(first) => first + MARKED[column],
        }
    }

    /// The event as it stands after `mark` was applied to it at `now`.
    pub(super) fn event(self, row: &PgRow, mark: &Mark, now: Time) -> Result<Event, sqlx::Error> {
        let at = |column: usize| self.place(column);
        debug_assert!(
            MARKED.iter().enumerate().all(|(column, &place)| row.column(at(column)).name() == EVENT[place]),
            "another order of columns: {:?}",
            row.columns()
        );
        let state: &str = row.try_get(at(2))?;
        let state = word("state", State::parse(state))?;
        Ok(Event {
            row: row.try_get(at(0))?,
            key: mark.key.clone(),
            event_type: row.try_get(at(1))?,
            state,
            attempt_count: row.try_get(at(3))?,
            attempts_forgiven: row.try_get(at(4))?,
            duplicate_count: row.try_get(at(5))?,
            mismatch_count: row.try_get(at(6))?,
            last_mismatch_time: row.try_get(at(7))?,
            fencing_token: mark.fencing_token,
            create_time: row.try_get(at(8))?,
            update_time: now,
            end_time: (state != State::Failed).then_some(now),
            retry_time: match &mark.ending {
                Ending::Completed { .. } => None,
                Ending::Failed { retry_after, .. } => transition::retry_time(state, *retry_after, now),
            },
            fingerprint: digest("fingerprint", row.try_get(at(9))?)?,
            metadata: row.try_get(at(10))?,
            completion_metadata: row.try_get(at(11))?,
            result: mark.result.clone(),
            last_error: row.try_get(at(12))?,
            latest: Some(Latest {
                claim_id: row.try_get(at(13))?,
                holder: row.try_get::<Option<String>, _>(at(14))?.unwrap_or_default(),
                start_time: row.try_get(at(15))?,
                lock_expire_time: row.try_get(at(16))?,
                outcome: mark.ending.outcome(),
                payload_digest: digest("payload_digest", row.try_get(at(17))?)?,
            }),
        })
    }
}

/// What others may have changed in an event between its grant and the completion of that grant: duplicates are counted, and the
/// lock is extended. Everything else in it changes only with its token.
pub(super) struct Since {
    duplicate_count: i64,
    mismatch_count: i64,
    last_mismatch_time: Option<Time>,
    lock_expire_time: Time,
    /// With what the completion added to it.
    completion_metadata: Option<String>,
}

impl Since {
    /// From columns that begin at `first`.
    pub(super) fn read(row: &PgRow, first: usize) -> Result<Since, sqlx::Error> {
        Ok(Since {
            duplicate_count: row.try_get(first)?,
            mismatch_count: row.try_get(first + 1)?,
            last_mismatch_time: row.try_get(first + 2)?,
            lock_expire_time: row.try_get(first + 3)?,
            completion_metadata: row.try_get(first + 4)?,
        })
    }

    /// The event, as it was granted, after `mark` completed it at `now`.
    pub(super) fn completed(self, granted: Event, mark: &Mark, now: Time) -> Event {
        let Since { duplicate_count, mismatch_count, last_mismatch_time, lock_expire_time, completion_metadata } = self;
        Event {
            state: State::Completed,
            duplicate_count,
            mismatch_count,
            last_mismatch_time,
            update_time: now,
            end_time: Some(now),
            retry_time: None,
            completion_metadata,
            result: mark.result.clone(),
            latest: granted.latest.map(|latest| Latest { lock_expire_time, outcome: Outcome::Completed, ..latest }),
            ..granted
        }
    }
}

fn result(code: Option<i32>, body: Option<&[u8]>, content_type: Option<String>) -> Option<StoredResult> {
    Some(StoredResult {
        code: code?,
        body: body.map(Bytes::copy_from_slice).unwrap_or_default(),
        content_type: content_type.unwrap_or_default(),
    })
}

/// The archived attempt in a row, if there is one.
pub(super) fn archived(row: &PgRow) -> Result<Option<Attempt>, sqlx::Error> {
    let Some(attempt) = row.try_get::<Option<i32>, _>("archived_attempt")? else { return Ok(None) };
    let outcome: &str = row.try_get("archived_outcome")?;
    Ok(Some(Attempt {
        attempt,
        fencing_token: row.try_get("archived_fencing_token")?,
        claim_id: row.try_get("archived_claim_id")?,
        holder: row.try_get("archived_holder")?,
        start_time: row.try_get("archived_start_time")?,
        end_time: row.try_get("archived_end_time")?,
        outcome: word("outcome", Outcome::parse(outcome))?,
        error: row.try_get("archived_error")?,
        payload_digest: digest("payload_digest", row.try_get("archived_payload_digest")?)?,
        result: result(
            row.try_get("archived_result_code")?,
            row.try_get("archived_result_body")?,
            row.try_get("archived_result_content_type")?,
        ),
    }))
}

/// The resolution in a row, if there is one.
pub(super) fn resolution(row: &PgRow) -> Result<Option<Resolution>, sqlx::Error> {
    let Some(from_state) = row.try_get::<Option<&str>, _>("resolved_from_state")? else { return Ok(None) };
    let to_state: &str = row.try_get("resolved_to_state")?;
    Ok(Some(Resolution {
        from_state: word("from_state", State::parse(from_state))?,
        to_state: word("to_state", State::parse(to_state))?,
        from_fencing_token: row.try_get("resolved_from_fencing_token")?,
        fencing_token: row.try_get("resolved_fencing_token")?,
        reason: row.try_get("resolved_reason")?,
        actor: row.try_get("resolved_actor")?,
        time: row.try_get("resolved_time")?,
    }))
}
