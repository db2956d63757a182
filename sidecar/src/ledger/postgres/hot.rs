//! The hot statement: new claims, duplicates, and marks of events that are being processed: the path of every event that
//! completes at once (L3). Without new events and marks it writes nothing at all.
//!
//! It comes in several forms, made of the same parts: starting a plan costs about as much as a handful of items, so a batch of
//! claims alone does not start what marks need, and where claims have met new events only, none what known ones need. What
//! comes alone, as most calls do where there is no storm, has forms of its own: one new claim, one completion.

use sqlx::{
    PgConnection, Row as _,
    postgres::{PgBindIterExt as _, PgRow},
};

use super::{row, statement::Statement};
use crate::{
    event::{Claim, Claimed, Ending, Event, Key, Mark, Marked, Time},
    ledger::{Error, queue::Reply},
};

/// A claim or a mark, with the caller that waits for its answer.
pub(super) enum HotItem {
    Claim(Pending<Claim, Claimed>),
    Mark(Pending<Mark, Marked>),
}

impl HotItem {
    pub(super) fn key(&self) -> &Key {
        match self {
            HotItem::Claim(claim) => &claim.request.key,
            HotItem::Mark(mark) => &mark.request.key,
        }
    }
}

/// A request on its way.
pub(super) struct Pending<R, A> {
    pub(super) request: R,
    pub(super) reply: Reply<A>,
    pub(super) past: Past,
}

/// What a request has been through.
#[derive(Clone, Copy, Default)]
pub(super) struct Past {
    /// How often it found the event changed under its feet.
    pub(super) tries: u32,
    /// A statement with it was out when the connection broke: it may have happened, whatever later statements meet.
    pub(super) uncertain: bool,
}

impl Past {
    /// What may be told of an error of a later statement: not that nothing has happened.
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
    Fresh { row: i64, fencing_token: i64, now: Time },
    /// The mark was applied.
    Marked { event: Event, now: Time },
    /// A claim that met an invisible insert (or, where new events are expected, a known one), or a mark that was not applied.
    Nothing,
}

/// Its parts, by file.
macro_rules! part {
    ($name:literal) => {
        include_str!(concat!("hot/", $name, ".sql"))
    };
}

/// Claims of events that may be known.
const CLAIMS: &str = concat!(
    "with\n",
    part!("claims"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    part!("counts_end"),
    part!("answer_seen"),
    "union all\n",
    part!("answer_fresh"),
);

/// Claims of events that are expected to be new.
const NEW: &str = concat!(
    "with\n",
    part!("new"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    part!("counts_end"),
    part!("answer_new"),
);

const MARKS: &str = concat!(
    "with\n",
    part!("marks"),
    ",\n",
    part!("counts_begin"),
    part!("counts_marks"),
    part!("counts_end"),
    part!("answer_marks_alone"),
);

// Of both. What is changed is changed when it is answered: in all forms marks before claims, or two sidecars would wait for each
// other, one with a marked event in hand and the other with a new one.

const CLAIMS_AND_MARKS: &str = concat!(
    "with\n",
    part!("claims"),
    ",\n",
    part!("marks"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    "union all\n",
    part!("counts_marks"),
    part!("counts_end"),
    part!("answer_marks"),
    "union all\n",
    part!("answer_seen"),
    "union all\n",
    part!("answer_fresh"),
);

const NEW_AND_MARKS: &str = concat!(
    "with\n",
    part!("new"),
    ",\n",
    part!("marks"),
    ",\n",
    part!("counts_begin"),
    part!("counts_claims"),
    "union all\n",
    part!("counts_marks"),
    part!("counts_end"),
    part!("answer_marks"),
    "union all\n",
    part!("answer_fresh"),
);

/// One claim of an event that is expected to be new.
const CLAIM_ALONE: &str = part!("claim_alone");

/// One completion of an event that is being processed.
const COMPLETION_ALONE: &str = part!("completion_alone");

/// What is known of the events that a statement's claims are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claims {
    /// They are likely to be new. Of those that are not the statement says [`HotRow::Nothing`].
    New,
    /// Anything.
    Any,
}

/// What the claims of a batch have met.
#[derive(Debug, Default)]
pub(super) struct Met {
    pub(super) new: u32,
    pub(super) known: u32,
}

/// What claims have met lately: whether the next ones are likely to be of new events.
#[derive(Debug, Default)]
pub(super) struct Outlook {
    /// About how many of a batch's claims were of known events, lately.
    known: f64,
}

impl Outlook {
    /// What a batch adds.
    const WEIGHT: f64 = 0.25;
    /// Up to this share a second statement for those that are known costs less than it saves.
    const KNOWN_MAX: f64 = 1.0 / 16.0;

    pub(super) fn claims(&self) -> Claims {
        if self.known < Self::KNOWN_MAX { Claims::New } else { Claims::Any }
    }

    pub(super) fn saw(&mut self, met: Met) {
        if met.new + met.known > 0 {
            let share = f64::from(met.known) / f64::from(met.new + met.known);
            self.known += Self::WEIGHT * (share - self.known);
        }
    }
}

/// Items must be sorted by key; per key either one mark or claims, each with another claim id (a mark and a claim of one key
/// in one statement: the mark would silently change nothing).
pub(super) struct Hot {
    pub(super) claims: Claims,
}

impl Statement for Hot {
    type Item = HotItem;
    type Output = Vec<HotRow>;

    fn doubt(item: &mut HotItem) {
        match item {
            HotItem::Claim(claim) => claim.past.uncertain = true,
            HotItem::Mark(mark) => mark.past.uncertain = true,
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
                // What is not new is the other form's, as in a batch.
                Some(claim_alone(connection, slot, &claim.request).await?)
            }
            [HotItem::Mark(mark)] => completion_alone(connection, slot, &mark.request).await?,
            _ => None,
        };
        if let Some(row) = alone {
            return Ok(vec![row]);
        }
        let placed_claims = || {
            items.iter().zip(0_i32..).filter_map(|(item, place)| match item {
                HotItem::Claim(claim) => Some((&claim.request, place)),
                HotItem::Mark(_) => None,
            })
        };
        let claims = || placed_claims().map(|(claim, _)| claim);
        let marks = || {
            items.iter().zip(0_i32..).filter_map(|(item, place)| match item {
                HotItem::Mark(mark) => Some((&mark.request, place)),
                HotItem::Claim(_) => None,
            })
        };
        let (statement, read): (&str, ReadRow) = match (claims().next(), marks().next(), self.claims) {
            (Some(_), None, Claims::Any) => (CLAIMS, mixed_row),
            (Some(_), None, Claims::New) => (NEW, mixed_row),
            (None, _, _) => (MARKS, marked_row),
            (Some(_), Some(_), Claims::Any) => (CLAIMS_AND_MARKS, mixed_row),
            (Some(_), Some(_), Claims::New) => (NEW_AND_MARKS, mixed_row),
        };
        let rows = sqlx::query(statement)
            .bind(slot)
            .bind(claims().map(|claim| claim.key.tenant.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.key.provider.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.key.event_id.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.event_type.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.claim_id.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.holder.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.lock_duration.0).bind_iter())
            .bind(claims().map(|claim| claim.fingerprint.as_ref().map(<[u8; 32]>::as_slice)).bind_iter())
            .bind(claims().map(|claim| claim.metadata.as_deref()).bind_iter())
            .bind(claims().map(|claim| claim.payload_digest.as_ref().map(<[u8; 32]>::as_slice)).bind_iter())
            .bind(placed_claims().map(|(_, place)| place).bind_iter())
            .bind(marks().map(|(mark, _)| mark.key.tenant.as_str()).bind_iter())
            .bind(marks().map(|(mark, _)| mark.key.provider.as_str()).bind_iter())
            .bind(marks().map(|(mark, _)| mark.key.event_id.as_str()).bind_iter())
            .bind(marks().map(|(mark, _)| mark.fencing_token).bind_iter())
            .bind(marks().map(|(mark, _)| mark.claim_id.as_deref()).bind_iter())
            .bind(marks().map(|(mark, _)| mark.ending.outcome().as_str()).bind_iter())
            .bind(marks().map(|(mark, _)| mark.attempts_max).bind_iter())
            .bind(marks().map(|(mark, _)| error_of(&mark.ending)).bind_iter())
            .bind(marks().map(|(mark, _)| retry_of(&mark.ending)).bind_iter())
            .bind(marks().map(|(mark, _)| mark.result.as_ref().map(|result| result.code)).bind_iter())
            .bind(marks().map(|(mark, _)| mark.result.as_ref().map(|result| result.body.as_ref())).bind_iter())
            .bind(marks().map(|(mark, _)| mark.result.as_ref().map(|result| result.content_type.as_str())).bind_iter())
            .bind(marks().map(|(mark, _)| metadata_of(&mark.ending)).bind_iter())
            .bind(marks().map(|(_, place)| place).bind_iter())
            .fetch_all(connection)
            .await?;
        let mut found: Vec<HotRow> = items.iter().map(|_| HotRow::Nothing).collect();
        for row in &rows {
            let (place, answer) = read(items, row)?;
            if let Some(slot) = place.and_then(|place| found.get_mut(place)) {
                *slot = answer;
            }
        }
        Ok(found)
    }
}

/// What a row says, and the place of the item that it answers.
type Placed = Result<(Option<usize>, HotRow), sqlx::Error>;
type ReadRow = fn(&[HotItem], &PgRow) -> Placed;

/// A row of one of the statements that have claims among their items.
fn mixed_row(items: &[HotItem], row: &PgRow) -> Placed {
    let now: Time = row.try_get(2)?;
    let place = || row.try_get::<i32, _>(1).map(|place| usize::try_from(place).ok());
    Ok(match row.try_get(0)? {
        "fresh" => (
            place_of(items, row)?,
            HotRow::Fresh { row: row.try_get(EVENT_COLUMN)?, fencing_token: row.try_get("fencing_token")?, now },
        ),
        "marked" => marked(items, row, place()?, now, row::Marked::AmongAll(EVENT_COLUMN))?,
        _ => (
            place()?,
            HotRow::Seen { claim_ended: row.try_get("claim_ended")?, event: row::event(row, EVENT_COLUMN)?, now },
        ),
    })
}

/// The same, of the statement that has none.
fn marked_row(items: &[HotItem], row: &PgRow) -> Placed {
    let place = usize::try_from(row.try_get::<i32, _>(0)?).ok();
    marked(items, row, place, row.try_get(1)?, row::Marked::Alone(2))
}

fn marked(items: &[HotItem], row: &PgRow, place: Option<usize>, now: Time, columns: row::Marked) -> Placed {
    Ok(match place.and_then(|place| items.get(place)) {
        Some(HotItem::Mark(mark)) => (place, HotRow::Marked { event: columns.event(row, &mark.request, now)?, now }),
        // A row of nobody's.
        Some(HotItem::Claim(_)) | None => (None, HotRow::Nothing),
    })
}

/// The claim of an event that is expected to be new, which is granted, if it is.
async fn claim_alone(connection: &mut PgConnection, slot: i32, claim: &Claim) -> Result<HotRow, sqlx::Error> {
    let rows = sqlx::query(CLAIM_ALONE)
        .bind(slot)
        .bind(&claim.key.tenant)
        .bind(&claim.key.provider)
        .bind(&claim.key.event_id)
        .bind(&claim.event_type)
        .bind(&claim.claim_id)
        .bind(&claim.holder)
        .bind(claim.lock_duration.0)
        .bind(claim.fingerprint.as_ref().map(<[u8; 32]>::as_slice))
        .bind(claim.metadata.as_deref())
        .bind(claim.payload_digest.as_ref().map(<[u8; 32]>::as_slice))
        // All of the answer: that of the commit comes behind the row (I5).
        .fetch_all(connection)
        .await?;
    Ok(match rows.first() {
        Some(row) => HotRow::Fresh { row: row.try_get(0)?, fencing_token: row.try_get(1)?, now: row.try_get(2)? },
        None => HotRow::Nothing,
    })
}

/// A completion, if it is one and the event is being processed under its token.
async fn completion_alone(
    connection: &mut PgConnection,
    slot: i32,
    mark: &Mark,
) -> Result<Option<HotRow>, sqlx::Error> {
    let Ending::Completed { metadata } = &mark.ending else { return Ok(None) };
    let result = mark.result.as_ref();
    let rows = sqlx::query(COMPLETION_ALONE)
        .bind(slot)
        .bind(&mark.key.tenant)
        .bind(&mark.key.provider)
        .bind(&mark.key.event_id)
        .bind(mark.fencing_token)
        .bind(mark.claim_id.as_deref())
        .bind(result.map(|result| result.code))
        .bind(result.map(|result| result.body.as_ref()))
        .bind(result.map(|result| result.content_type.as_str()))
        .bind(metadata.as_deref())
        .fetch_all(connection)
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let now = row.try_get(0)?;
    Ok(Some(HotRow::Marked { event: row::Marked::Alone(1).event(row, mark, now)?, now }))
}

/// Where the event's columns begin.
const EVENT_COLUMN: usize = 4;

/// The place of the claim whose insert a row is, by its key and claim id: an INSERT cannot return what it does not insert.
fn place_of(items: &[HotItem], row: &sqlx::postgres::PgRow) -> Result<Option<usize>, sqlx::Error> {
    let tenant: &str = row.try_get(EVENT_COLUMN + 1)?;
    let provider: &str = row.try_get(EVENT_COLUMN + 2)?;
    let event_id: &str = row.try_get(EVENT_COLUMN + 3)?;
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

    use super::{CLAIMS_AND_MARKS, Claims, Error, Met, NEW_AND_MARKS, Outlook, Past};

    #[test]
    fn every_form_of_both_changes_marked_events_before_it_adds_new_ones() {
        for form in [CLAIMS_AND_MARKS, NEW_AND_MARKS] {
            let answers = form.split_once(part!("counts_end")).unwrap().1;
            let marks = answers.find(part!("answer_marks")).unwrap();
            assert!(marks < answers.find(part!("answer_fresh")).unwrap(), "{answers}");
        }
    }

    #[test]
    fn what_may_have_happened_is_never_told_as_nothing() {
        let nothing = || Error::Unavailable { retry_after: Duration::from_secs(1) };
        let full = || Error::Overloaded { retry_after: Duration::from_secs(1) };
        assert!(matches!(Past::default().told(nothing()), Error::Unavailable { .. }));
        let past = Past { uncertain: true, ..Past::default() };
        for error in [nothing(), full()] {
            assert!(matches!(past.told(error), Error::OutcomeUnknown));
        }
        // Whose reason is worth more.
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
        // As many new events as known ones, in turn: neither form wins often enough to be worth guessing.
        for _ in 0..100 {
            outlook.saw(Met { new: 1, known: 0 });
            outlook.saw(Met { new: 0, known: 1 });
            assert_eq!(outlook.claims(), Claims::Any);
        }
    }
}
