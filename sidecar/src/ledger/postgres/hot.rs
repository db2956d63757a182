//! The hot statement: new claims, duplicates, and marks of events being processed. It is the path of every event that
//! completes on its first attempt (L3). Without new events or marks it writes nothing at all.
//!
//! It comes in several forms ([`form`]), because starting a plan costs about as much as a handful of items.

mod form;

use futures::TryStreamExt as _;
use sqlx::{
    PgConnection, Row as _,
    postgres::{PgBindIterExt as _, PgRow},
};

use self::form::Form;
use super::{
    bind::{Bind as _, Query},
    row,
    statement::Statement,
};
use crate::{
    event::{Claim, Claimed, Ending, Event, FencingToken, Key, Mark, Marked, RowId, Time},
    ledger::{Error, queue::Reply},
};

/// A claim or a mark, with the caller that waits for its answer.
pub(super) enum HotItem {
    Claim(Pending<Claim, Claimed>),
    /// With the event as it was granted, if the mark completes a grant of this process that it still remembers.
    Mark(Pending<Mark, Marked>, Option<Box<Event>>),
}

impl HotItem {
    pub(super) fn key(&self) -> &Key {
        match self {
            HotItem::Claim(claim) => &claim.request.key,
            HotItem::Mark(mark, _) => &mark.request.key,
        }
    }
}

/// A request on its way.
pub(super) struct Pending<R, A> {
    pub(super) request: R,
    pub(super) reply: Reply<A>,
    pub(super) past: Past,
}

/// What a request has been through so far.
#[derive(Clone, Copy, Default)]
pub(super) struct Past {
    /// How often the event changed underneath it.
    pub(super) tries: u32,
    /// It was in a statement under way when the connection broke: it may have happened, whatever later statements find.
    pub(super) uncertain: bool,
}

impl Past {
    /// What the caller may be told about an error of a later statement: never that nothing has happened.
    pub(super) fn told(self, error: Error) -> Error {
        match error {
            Error::Unavailable { .. } | Error::Overloaded { .. } if self.uncertain => Error::OutcomeUnknown,
            error => error,
        }
    }
}

/// What the statement says about one item.
pub(super) enum HotRow {
    /// The claim's event, as the snapshot has it.
    Seen { event: Event, claim_ended: bool, now: Time },
    /// The claim's event was inserted and granted.
    Fresh { row: RowId, fencing_token: FencingToken, now: Time },
    /// The mark was applied.
    Marked { event: Event, now: Time },
    /// The completion of a grant that is known was applied.
    Completed { since: row::Since, now: Time },
    /// A claim that met an invisible insert (or, where new events are expected, a known one), or a mark that was not applied.
    Nothing,
}

/// What is known of the events that a statement's claims are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claims {
    /// They are likely to be new. For those that are not, the statement returns [`HotRow::Nothing`].
    New,
    /// Anything.
    Any,
    /// They are likely to be known. For those that are not, the statement returns [`HotRow::Nothing`].
    Known,
}

/// What the claims of a batch turned out to be.
#[derive(Debug, Default)]
pub(super) struct Met {
    pub(super) new: u32,
    pub(super) known: u32,
}

/// Predicts from recent claims whether the next ones are likely to be of new events or of known ones.
#[derive(Debug, Default)]
pub(super) struct Outlook {
    /// Roughly the share of recent claims that were of known events.
    known: f64,
}

impl Outlook {
    /// The weight of one batch.
    const WEIGHT: f64 = 0.25;
    /// Up to this share of unexpected claims, the second statement that they need costs less than the prediction saves.
    const OTHERS_MAX: f64 = 1.0 / 16.0;

    pub(super) fn claims(&self) -> Claims {
        if self.known < Self::OTHERS_MAX {
            Claims::New
        } else if self.known > 1.0 - Self::OTHERS_MAX {
            Claims::Known
        } else {
            Claims::Any
        }
    }

    pub(super) fn saw(&mut self, met: Met) {
        if met.new + met.known > 0 {
            let share = f64::from(met.known) / f64::from(met.new + met.known);
            self.known += Self::WEIGHT * (share - self.known);
        }
    }
}

/// Items must be sorted by key; per key either one mark or claims, each with a different claim id (with a mark and a claim of
/// one key in one statement, the mark would silently change nothing).
pub(super) struct Hot {
    pub(super) claims: Claims,
}

impl Statement for Hot {
    type Item = HotItem;
    type Output = Vec<HotRow>;

    fn doubt(item: &mut HotItem) {
        match item {
            HotItem::Claim(claim) => claim.past.uncertain = true,
            HotItem::Mark(mark, _) => mark.past.uncertain = true,
        }
    }

    fn is_abandoned(item: &HotItem) -> bool {
        // Never a mark: it may be the only record of an effect.
        matches!(item, HotItem::Claim(claim) if claim.reply.is_closed())
    }

    async fn run(
        &self,
        connection: &mut PgConnection,
        slot: i32,
        items: &[HotItem],
    ) -> Result<Vec<HotRow>, sqlx::Error> {
        let alone = match items {
            [HotItem::Claim(claim)] if self.claims == Claims::New => {
                // A claim that is not new is left to the other form, as in a batch.
                Some(claim_alone(connection, slot, &claim.request).await?)
            }
            [HotItem::Mark(mark, Some(grant))] => {
                Some(own_completion_alone(connection, slot, &mark.request, grant).await?)
            }
            [HotItem::Mark(mark, None)] => completion_alone(connection, slot, &mark.request).await?,
            _ => None,
        };
        if let Some(row) = alone {
            return Ok(vec![row]);
        }
        let form = Form::of(items, self.claims);
        let query = sqlx::query(form.sql());
        let query = match form {
            Form::Known => bind_known(query, items),
            Form::OwnCompletions | Form::NewAndOwnCompletions => {
                bind_own_completions(bind_claims(query.bind(slot), items), items)
            }
            _ => bind_marks(bind_claims(query.bind(slot), items), items),
        };
        let answer = |row: &PgRow| match form {
            Form::Known => known_row(row),
            Form::OwnCompletions => own_completion_row(row, 0),
            Form::Marks => marked_row(items, row),
            Form::Claims | Form::New | Form::ClaimsAndMarks | Form::NewAndMarks => {
                row_of_part(items, row, EVENT_COLUMN)
            }
            Form::NewAndOwnCompletions => row_of_part(items, row, EVENT_COLUMN_BESIDE_OWN),
        };
        // Row by row, or those of 512 results of 64 KiB would be there twice. To the end, whatever a row has: the answer to the
        // commit comes after them (I5).
        let mut answers = Vec::with_capacity(items.len());
        let mut rows = query.fetch(connection);
        while let Some(row) = rows.try_next().await? {
            answers.push(answer(&row));
        }
        let mut found: Vec<HotRow> = items.iter().map(|_| HotRow::Nothing).collect();
        for placed in answers {
            let (place, answer) = placed?;
            if let Some(at_place) = place.and_then(|place| found.get_mut(place)) {
                *at_place = answer;
            }
        }
        Ok(found)
    }
}

fn claims(items: &[HotItem]) -> impl Iterator<Item = (&Claim, i32)> + Clone {
    items.iter().zip(0_i32..).filter_map(|(item, place)| match item {
        HotItem::Claim(claim) => Some((&claim.request, place)),
        HotItem::Mark(..) => None,
    })
}

fn marks(items: &[HotItem]) -> impl Iterator<Item = (&Mark, i32)> + Clone {
    items.iter().zip(0_i32..).filter_map(|(item, place)| match item {
        HotItem::Mark(mark, _) => Some((&mark.request, place)),
        HotItem::Claim(_) => None,
    })
}

fn bind_known<'q>(query: Query<'q>, items: &'q [HotItem]) -> Query<'q> {
    let (claims, places) = (|| claims(items).map(|(claim, _)| claim), claims(items).map(|(_, place)| place));
    query
        .bind_keys(claims().map(|claim| &claim.key))
        .bind(claims().map(|claim| claim.claim_id.as_str()).bind_iter())
        .bind(places.bind_iter())
}

fn bind_claims<'q>(query: Query<'q>, items: &'q [HotItem]) -> Query<'q> {
    let (claims, places) = (|| claims(items).map(|(claim, _)| claim), claims(items).map(|(_, place)| place));
    query
        .bind_keys(claims().map(|claim| &claim.key))
        .bind(claims().map(|claim| claim.event_type.as_str()).bind_iter())
        .bind(claims().map(|claim| claim.claim_id.as_str()).bind_iter())
        .bind(claims().map(|claim| claim.holder.as_str()).bind_iter())
        .bind(claims().map(|claim| claim.lock_duration.0).bind_iter())
        .bind_digests(claims().map(|claim| claim.fingerprint.as_ref()))
        .bind(claims().map(|claim| claim.metadata.as_deref()).bind_iter())
        .bind_digests(claims().map(|claim| claim.payload_digest.as_ref()))
        .bind(places.bind_iter())
}

fn bind_marks<'q>(query: Query<'q>, items: &'q [HotItem]) -> Query<'q> {
    let (marks, places) = (|| marks(items).map(|(mark, _)| mark), marks(items).map(|(_, place)| place));
    query
        .bind_keys(marks().map(|mark| &mark.key))
        .bind(marks().map(|mark| mark.fencing_token).bind_iter())
        .bind(marks().map(|mark| mark.claim_id.as_deref()).bind_iter())
        .bind(marks().map(|mark| mark.ending.outcome().as_str()).bind_iter())
        .bind(marks().map(|mark| row::attempts_max(mark.attempts_max)).bind_iter())
        .bind(marks().map(|mark| error_of(&mark.ending)).bind_iter())
        .bind(marks().map(|mark| retry_of(&mark.ending)).bind_iter())
        .bind_results(marks().map(|mark| mark.result.as_ref()))
        .bind(marks().map(|mark| metadata_of(&mark.ending)).bind_iter())
        .bind(places.bind_iter())
}

fn bind_own_completions<'q>(query: Query<'q>, items: &'q [HotItem]) -> Query<'q> {
    let grants = || {
        items.iter().filter_map(|item| match item {
            HotItem::Mark(_, grant) => grant.as_deref(),
            HotItem::Claim(_) => None,
        })
    };
    let (marks, places) = (|| marks(items).map(|(mark, _)| mark), marks(items).map(|(_, place)| place));
    query
        .bind(grants().map(|grant| grant.row).bind_iter())
        .bind(marks().map(|mark| mark.fencing_token).bind_iter())
        .bind_results(marks().map(|mark| mark.result.as_ref()))
        .bind(marks().map(|mark| metadata_of(&mark.ending)).bind_iter())
        .bind(places.bind_iter())
        .bind(grants().map(|grant| grant.create_time).bind_iter())
}

/// What a row says, and the index of the item that it answers.
type Placed = Result<(Option<usize>, HotRow), sqlx::Error>;

/// The index that a column names.
fn place(row: &PgRow, column: usize) -> Result<Option<usize>, sqlx::Error> {
    row.try_get::<i32, _>(column).map(|place| usize::try_from(place).ok())
}

/// The part of a statement that a row is of.
enum Part {
    /// A claimed event as it stands (`answer_seen.sql`).
    Seen,
    /// An event that was inserted and granted (`answer_fresh.sql`, `answer_new.sql`, `answer_new_beside.sql`).
    Fresh,
    /// An event that a mark was applied to (`answer_marks.sql`).
    Marked,
    /// A completion of this process's own grant (`answer_own_completions.sql`).
    Own,
}

impl Part {
    /// As the first column says, in the forms that have several parts.
    fn of(row: &PgRow) -> Result<Part, sqlx::Error> {
        let source = match row.try_get(0)? {
            "seen" => Some(Part::Seen),
            "fresh" => Some(Part::Fresh),
            "marked" => Some(Part::Marked),
            "own" => Some(Part::Own),
            _ => None,
        };
        row::word("source", source)
    }
}

/// A row of the forms that have several parts. In front of the event's columns, which begin at `first`, each has its part, its
/// place and the time.
fn row_of_part(items: &[HotItem], row: &PgRow, first: usize) -> Placed {
    let now: Time = row.try_get(2)?;
    match Part::of(row)? {
        Part::Seen => {
            let (claim_ended, event) = (row.try_get("claim_ended")?, row::event(row, first)?);
            Ok((place(row, 1)?, HotRow::Seen { event, claim_ended, now }))
        }
        Part::Fresh => fresh(items, row, first, now),
        Part::Marked => marked(items, row, place(row, 1)?, now, row::MarkedColumns::AmongAll(first)),
        Part::Own => own_completion_row(row, 1),
    }
}

/// A row of the form for known events.
fn known_row(row: &PgRow) -> Placed {
    let (now, claim_ended) = (row.try_get(1)?, row.try_get(2)?);
    Ok((place(row, 0)?, HotRow::Seen { claim_ended, event: row::event(row, 3)?, now }))
}

/// A row of the form for marks.
fn marked_row(items: &[HotItem], row: &PgRow) -> Placed {
    marked(items, row, place(row, 0)?, row.try_get(1)?, row::MarkedColumns::Alone(2))
}

/// A row about a completion of this process's own grant, starting at a column.
fn own_completion_row(row: &PgRow, first: usize) -> Placed {
    let now = row.try_get(first + 1)?;
    Ok((place(row, first)?, HotRow::Completed { since: row::Since::read(row, first + 2)?, now }))
}

fn marked(items: &[HotItem], row: &PgRow, place: Option<usize>, now: Time, columns: row::MarkedColumns) -> Placed {
    Ok(match place.and_then(|place| items.get(place)) {
        Some(HotItem::Mark(mark, _)) => (place, HotRow::Marked { event: columns.event(row, &mark.request, now)?, now }),
        // The row belongs to no item.
        Some(HotItem::Claim(_)) | None => (None, HotRow::Nothing),
    })
}

/// A row that was inserted, whose columns begin at `first`.
fn fresh(items: &[HotItem], row: &PgRow, first: usize, now: Time) -> Placed {
    let fencing_token = row.try_get("fencing_token")?;
    Ok((place_of(items, row, first)?, HotRow::Fresh { row: row.try_get(first)?, fencing_token, now }))
}

/// The claim of an event that is expected to be new; granted if it is.
async fn claim_alone(connection: &mut PgConnection, slot: i32, claim: &Claim) -> Result<HotRow, sqlx::Error> {
    let rows = sqlx::query(form::CLAIM_ALONE)
        .bind(slot)
        .bind_key(&claim.key)
        .bind(&claim.event_type)
        .bind(&claim.claim_id)
        .bind(&claim.holder)
        .bind(claim.lock_duration.0)
        .bind(claim.fingerprint.as_ref().map(<[u8; 32]>::as_slice))
        .bind(claim.metadata.as_deref())
        .bind(claim.payload_digest.as_ref().map(<[u8; 32]>::as_slice))
        // Read the whole answer: that of the commit comes after the row (I5).
        .fetch_all(connection)
        .await?;
    Ok(match rows.first() {
        Some(row) => HotRow::Fresh { row: row.try_get(0)?, fencing_token: row.try_get(1)?, now: row.try_get(2)? },
        None => HotRow::Nothing,
    })
}

/// Applies the mark if it is a completion and the event is being processed under its token.
async fn completion_alone(
    connection: &mut PgConnection,
    slot: i32,
    mark: &Mark,
) -> Result<Option<HotRow>, sqlx::Error> {
    let Ending::Completed { metadata } = &mark.ending else { return Ok(None) };
    let rows = sqlx::query(form::COMPLETION_ALONE)
        .bind(slot)
        .bind_key(&mark.key)
        .bind(mark.fencing_token)
        .bind(mark.claim_id.as_deref())
        .bind_result(mark.result.as_ref())
        .bind(metadata.as_deref())
        .fetch_all(connection)
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let now = row.try_get(0)?;
    Ok(Some(HotRow::Marked { event: row::MarkedColumns::Alone(1).event(row, mark, now)?, now }))
}

/// Applies the completion of a grant of this process, if the event still has that token.
async fn own_completion_alone(
    connection: &mut PgConnection,
    slot: i32,
    mark: &Mark,
    grant: &Event,
) -> Result<HotRow, sqlx::Error> {
    let rows = sqlx::query(form::OWN_COMPLETION_ALONE)
        .bind(slot)
        .bind(grant.row)
        .bind(mark.fencing_token)
        .bind_result(mark.result.as_ref())
        .bind(metadata_of(&mark.ending))
        .bind(grant.create_time)
        .fetch_all(connection)
        .await?;
    Ok(match rows.first() {
        Some(row) => HotRow::Completed { now: row.try_get(0)?, since: row::Since::read(row, 1)? },
        None => HotRow::Nothing,
    })
}

/// Where the event's columns begin in the forms that have several parts.
const EVENT_COLUMN: usize = 4;
/// The same in the form where what is told of own completions comes before them.
const EVENT_COLUMN_BESIDE_OWN: usize = 8;

/// The index of the claim that a row was inserted for, found by key and claim id: an INSERT cannot return what it does not
/// insert.
fn place_of(items: &[HotItem], row: &PgRow, first: usize) -> Result<Option<usize>, sqlx::Error> {
    let tenant: &str = row.try_get(first + 1)?;
    let provider: &str = row.try_get(first + 2)?;
    let event_id: &str = row.try_get(first + 3)?;
    let claim_id: &str = row.try_get("claim_id")?;
    let of = |item: &HotItem| {
        let key = item.key();
        (key.tenant.as_str(), key.provider.as_str(), key.event_id.as_str()).cmp(&(tenant, provider, event_id))
    };
    let first = items.partition_point(|item| of(item).is_lt());
    let same_key = items.iter().enumerate().skip(first).take_while(|(_, item)| of(item).is_eq());
    Ok(same_key
        .filter(|(_, item)| matches!(item, HotItem::Claim(claim) if claim.request.claim_id == claim_id))
        .map(|(place, _)| place)
        .next())
}

fn error_of(ending: &Ending) -> Option<&str> {
    match ending {
        Ending::Completed { .. } => None,
        Ending::Failed { error, .. } => error.as_deref(),
    }
}

fn retry_of(ending: &Ending) -> Option<i64> {
    match ending {
        Ending::Completed { .. } => None,
        Ending::Failed { retry_after, .. } => retry_after.filter(|pause| pause.0 > 0).map(|pause| pause.0),
    }
}

fn metadata_of(ending: &Ending) -> Option<&str> {
    match ending {
        Ending::Completed { metadata } => metadata.as_deref(),
        Ending::Failed { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Claims, Error, Met, Outlook, Past};

    #[test]
    fn what_may_have_happened_is_never_told_as_nothing() {
        let nothing = || Error::Unavailable { retry_after: Duration::from_secs(1) };
        let full = || Error::Overloaded { retry_after: Duration::from_secs(1) };
        assert!(matches!(Past::default().told(nothing()), Error::Unavailable { .. }));
        let past = Past { uncertain: true, ..Past::default() };
        for error in [nothing(), full()] {
            assert!(matches!(past.told(error), Error::OutcomeUnknown));
        }
        // Here the reason itself is worth more.
        assert!(matches!(past.told(Error::Internal("sqlstate 42601".into())), Error::Internal(_)));
    }

    #[test]
    fn new_events_are_expected_until_known_ones_come_and_again_when_they_are_gone() {
        let mut outlook = Outlook::default();
        assert_eq!(outlook.claims(), Claims::New);
        // A duplicate among many does not change it.
        outlook.saw(Met { new: 31, known: 1 });
        assert_eq!(outlook.claims(), Claims::New);
        outlook.saw(Met { new: 0, known: 1 });
        assert_eq!(outlook.claims(), Claims::Any);
        // Batches of marks say nothing.
        for _ in 0..100 {
            outlook.saw(Met::default());
        }
        assert_eq!(outlook.claims(), Claims::Any);
        for _ in 0..8 {
            outlook.saw(Met { new: 1, known: 0 });
        }
        assert_eq!(outlook.claims(), Claims::New);
        // New and known events alternate evenly: neither form is right often enough to be worth guessing.
        for _ in 0..100 {
            outlook.saw(Met { new: 1, known: 0 });
            outlook.saw(Met { new: 0, known: 1 });
            assert_eq!(outlook.claims(), Claims::Any);
        }
        // Known ones alone, until a batch has many others.
        for _ in 0..16 {
            outlook.saw(Met { new: 0, known: 1 });
        }
        assert_eq!(outlook.claims(), Claims::Known);
        outlook.saw(Met { new: 1, known: 31 });
        assert_eq!(outlook.claims(), Claims::Known);
        outlook.saw(Met { new: 1, known: 1 });
        assert_eq!(outlook.claims(), Claims::Any);
    }
}
