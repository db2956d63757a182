//! One transaction of the writer: items are read, judged by the pure rules and applied one after another, so that each
//! sees what those before it did, also on the same event.

pub(super) mod cleanup;

use rusqlite::{CachedStatement, Connection, OptionalExtension as _, params};

use super::{clock::Clock, counts::Deltas, error::Fault, rows};
use crate::{
    event::{
        Attempt, Claim, Claimed, Decision, Digest, Event, Extend, FencingToken, Key, Lock, Mark, Marked, Refusal,
        Resolution, Resolve, RowId, Time, apply,
        transition::{self, ClaimStep, ExtendStep, MarkStep, ResolveStep, Tallied},
    },
    ledger::{Delivery, DeliveryName},
};

/// What the rules say to a call, or why the transaction must be given up.
type Judged<T> = Result<Result<T, Refusal>, Fault>;

/// What a claim is answered with and how it is counted.
pub(super) struct ClaimOutcome {
    pub(super) answer: Result<Claimed, Refusal>,
    /// Of an event that exists.
    pub(super) tallied: Tallied,
    pub(super) now: Time,
}

/// A transaction under way.
pub(super) struct Transaction<'a> {
    conn: &'a Connection,
    clock: &'a Clock,
    /// The last token that was given out.
    token: &'a mut FencingToken,
    /// Whether it was begun immediate, and may write.
    immediate: bool,
    written: bool,
    /// Events were deleted, up to this hour: counts that count nothing any more go too.
    deleted_until: Option<Time>,
    deltas: Deltas,
}

impl<'a> Transaction<'a> {
    /// Begins. An immediate one may write; one that is not answers [`Fault::NeedsWrite`] where it would have to, and
    /// is dropped then: going on from reading to writing fails at once when anybody else has written.
    pub(super) fn begin(
        conn: &'a Connection,
        clock: &'a Clock,
        token: &'a mut FencingToken,
        immediate: bool,
    ) -> Result<Self, Fault> {
        let begin = if immediate { "begin immediate" } else { "begin" };
        conn.prepare_cached(begin)?.execute([])?;
        Ok(Self { conn, clock, token, immediate, written: false, deleted_until: None, deltas: Deltas::default() })
    }

    /// Commits. Where nothing was written this costs no wait for the disk.
    pub(super) fn commit(self) -> Result<(), Fault> {
        if self.written {
            if !self.deltas.is_empty() {
                self.deltas.write(self.conn)?;
            }
            if let Some(hour) = self.deleted_until {
                self.deltas.prune(self.conn)?;
                self.prepare(include_str!("times_passed.sql"))?.execute([hour])?;
            }
            self.prepare(include_str!("counter.sql"))?.execute(params![*self.token, self.clock.now()])?;
        }
        self.prepare("commit")?.execute([]).map_err(Fault::Commit)?;
        Ok(())
    }

    fn prepare(&self, sql: &str) -> Result<CachedStatement<'a>, Fault> {
        Ok(self.conn.prepare_cached(sql)?)
    }

    /// Every write goes through here first.
    fn writes(&mut self) -> Result<(), Fault> {
        if !self.immediate {
            return Err(Fault::NeedsWrite);
        }
        self.written = true;
        Ok(())
    }

    /// The next fencing token. Only within a transaction that holds the write lock, and kept by its commit (S2); one that
    /// is rolled back leaves a gap.
    fn draw_token(&mut self) -> Result<FencingToken, Fault> {
        self.writes()?;
        self.token.0 += 1;
        Ok(*self.token)
    }

    // === the calls ===

    /// CheckAndLock.
    pub(super) fn claim(&mut self, claim: &Claim) -> Result<ClaimOutcome, Fault> {
        let before = self.event(&claim.key)?;
        let now = self.clock.now();
        if let Some(delivery) = Delivery::of(claim)
            && !self.admits(&delivery, now)?
        {
            let refusal = Refusal::DeliveryMismatch;
            // Counted on the event that the claim names, if there is one.
            let tallied = before.map(|_| transition::tallied(claim, Err(&refusal), true)).unwrap_or_default();
            return Ok(ClaimOutcome { answer: Err(refusal), tallied, now });
        }
        let claim_ended = match &before {
            Some(event) if event.archived_count() > 0 => self.was_claimed(event.row, &claim.claim_id)?,
            Some(_) | None => false,
        };
        let step = transition::claim(before.as_ref(), claim_ended, claim, now);
        // With the latest attempt before the call: a burial may archive it.
        let payload_changed = before.as_ref().is_some_and(|event| event.payload_differs(claim));
        let granted = matches!(step, ClaimStep::Insert | ClaimStep::Grant);
        let (decision, event) = match (step, before) {
            (ClaimStep::Insert, None) => {
                // The row is named after its first token: neither is ever used again.
                let token = self.draw_token()?;
                let event = Event::inserted(claim, RowId(token.0), token, now);
                self.insert(&event)?;
                (acquired(&event, now)?, event)
            }
            (ClaimStep::Grant, Some(before)) => {
                let event = apply::granted(&before, claim, self.draw_token()?, now);
                self.archive(&before, now)?;
                self.update(&before, &event)?;
                (acquired(&event, now)?, event)
            }
            (ClaimStep::Bury, Some(before)) => {
                let event = apply::buried(&before, now);
                if event.latest.is_none() {
                    self.archive(&before, now)?;
                }
                self.update(&before, &event)?;
                (Decision::Refused, event)
            }
            (ClaimStep::Keep(decision), Some(before)) => (decision, before),
            (ClaimStep::Refuse(refusal), _) => {
                let tallied = transition::tallied(claim, Err(&refusal), payload_changed);
                return Ok(ClaimOutcome { answer: Err(refusal), tallied, now });
            }
            (ClaimStep::Insert, Some(_)) | (ClaimStep::Grant | ClaimStep::Bury | ClaimStep::Keep(_), None) => {
                return Err(Fault::Defect("the rules answered for an event that is not there, or that is"));
            }
        };
        let tallied = transition::tallied(claim, Ok(&decision), payload_changed);
        Ok(ClaimOutcome { answer: Ok(Claimed { decision, granted, event, payload_changed, now }), tallied, now })
    }

    /// MarkCompleted and MarkFailed.
    pub(super) fn mark(&mut self, mark: &Mark) -> Judged<Marked> {
        let before = self.event(&mark.key)?;
        let archived = match &before {
            Some(event) if event.is_archived(mark.fencing_token) => self.attempt(event.row, mark.fencing_token)?,
            Some(_) | None => None,
        };
        Ok(match (transition::mark(before.as_ref(), archived.as_ref(), mark), before) {
            (MarkStep::Apply(state), Some(before)) => {
                let event = apply::marked(&before, mark, state, self.clock.now());
                self.update(&before, &event)?;
                self.deltas.marked(&event);
                Ok(Marked { event, repeated: false })
            }
            (MarkStep::Repeated, Some(event)) => Ok(Marked { event, repeated: true }),
            (MarkStep::Refuse(refusal), _) => Err(refusal),
            (MarkStep::Apply(_) | MarkStep::Repeated, None) => Err(Refusal::NotFound),
        })
    }

    /// ExtendLock.
    pub(super) fn extend(&mut self, extend: &Extend) -> Judged<Lock> {
        let before = self.event(&extend.key)?;
        Ok(match (transition::extend(before.as_ref(), extend), before) {
            (ExtendStep::Apply, Some(before)) => {
                let now = self.clock.now();
                let event = apply::extended(&before, extend, now);
                self.update(&before, &event)?;
                match event.latest.as_ref() {
                    Some(latest) => Ok(transition::lock_of(&event, latest, now)),
                    None => return Err(Fault::Defect("a lock was extended that nobody holds")),
                }
            }
            (ExtendStep::Refuse(refusal), _) => Err(refusal),
            (ExtendStep::Apply, None) => Err(Refusal::NotFound),
        })
    }

    /// Resolve.
    pub(super) fn resolve(&mut self, resolve: &Resolve) -> Judged<Event> {
        let before = self.event(&resolve.key)?;
        let last = match &before {
            Some(event) => self.last_resolution(event.row)?,
            None => None,
        };
        let now = self.clock.now();
        Ok(match (transition::resolve(before.as_ref(), last.as_ref(), resolve, now), before) {
            (ResolveStep::Apply, Some(before)) => {
                let token = self.draw_token()?;
                let event = apply::resolved(&before, resolve, token, now);
                self.archive(&before, now)?;
                self.update(&before, &event)?;
                self.record(event.row, &apply::resolution(&before, resolve, token, now))?;
                Ok(event)
            }
            (ResolveStep::Repeated, Some(event)) => Ok(event),
            (ResolveStep::Refuse(refusal), _) => Err(refusal),
            (ResolveStep::Apply | ResolveStep::Repeated, None) => Err(Refusal::NotFound),
        })
    }

    /// Adds what was counted in memory to an event; nothing where it was deleted meanwhile.
    pub(super) fn flush(&mut self, key: &Key, count: &crate::ledger::tally::Count) -> Result<(), Fault> {
        self.writes()?;
        let create_time = self
            .prepare(include_str!("flush.sql"))?
            .query_row(
                params![
                    key.tenant,
                    key.provider,
                    key.event_id,
                    count.duplicates,
                    count.mismatches,
                    count.last_mismatch_time
                ],
                |row| row.get(0),
            )
            .optional()?;
        if let Some(create_time) = create_time {
            self.deltas.at(&key.tenant, &key.provider, create_time).duplicates += count.duplicates;
        }
        Ok(())
    }

    // === reading ===

    fn event(&self, key: &Key) -> Result<Option<Event>, Fault> {
        let mut statement = self.prepare(include_str!("event.sql"))?;
        Ok(statement.query_row(params![key.tenant, key.provider, key.event_id], rows::event).optional()?)
    }

    fn was_claimed(&self, row: RowId, claim_id: &str) -> Result<bool, Fault> {
        Ok(self.prepare(include_str!("attempt_claimed.sql"))?.exists(params![row, claim_id])?)
    }

    fn attempt(&self, row: RowId, fencing_token: FencingToken) -> Result<Option<Attempt>, Fault> {
        let mut statement = self.prepare(include_str!("attempt_by_token.sql"))?;
        Ok(statement.query_row(params![row, fencing_token], rows::attempt).optional()?)
    }

    fn last_resolution(&self, row: RowId) -> Result<Option<Resolution>, Fault> {
        let mut statement = self.prepare(include_str!("resolution_last.sql"))?;
        Ok(statement.query_row(params![row], rows::resolution).optional()?)
    }

    /// Whether a delivery id is new, and recorded now, or came with this very digest before.
    fn admits(&mut self, delivery: &Delivery, now: Time) -> Result<bool, Fault> {
        let Delivery { name: DeliveryName { tenant, provider, delivery_id }, payload_digest } = delivery;
        let known: Option<Digest> = self
            .prepare(include_str!("delivery.sql"))?
            .query_row(params![tenant, provider, delivery_id], |row| row.get(0))
            .optional()?;
        if let Some(known) = known {
            return Ok(known == *payload_digest);
        }
        self.writes()?;
        self.prepare(include_str!("delivery_insert.sql"))?.execute(params![
            tenant,
            provider,
            delivery_id,
            payload_digest,
            now
        ])?;
        Ok(true)
    }

    // === writing ===

    fn insert(&mut self, event: &Event) -> Result<(), Fault> {
        self.writes()?;
        let Some(latest) = &event.latest else { return Err(Fault::Defect("a new event has no attempt")) };
        self.prepare(include_str!("insert.sql"))?.execute(params![
            event.row,
            event.key.tenant,
            event.key.provider,
            event.key.event_id,
            event.event_type,
            event.create_time,
            latest.lock_expire_time,
            latest.claim_id,
            latest.holder,
            latest.payload_digest,
            event.fingerprint,
            event.metadata,
        ])?;
        self.deltas.changed(None, event);
        Ok(())
    }

    fn update(&mut self, before: &Event, after: &Event) -> Result<(), Fault> {
        self.writes()?;
        let latest = after.latest.as_ref();
        let result = after.result.as_ref();
        let changed = self.prepare(include_str!("update.sql"))?.execute(params![
            before.row,
            before.state,
            before.fencing_token,
            after.state,
            after.attempt_count,
            after.attempts_forgiven,
            after.fencing_token,
            after.update_time,
            after.end_time,
            after.retry_time,
            latest.map(|latest| &latest.claim_id),
            latest.map(|latest| &latest.holder),
            latest.map(|latest| latest.start_time),
            latest.map(|latest| latest.lock_expire_time),
            latest.map(|latest| latest.outcome),
            latest.and_then(|latest| latest.payload_digest),
            after.fingerprint,
            after.last_error,
            result.map(|result| result.code),
            result.map(|result| &result.content_type),
            result.map(|result| result.body.as_ref()),
            after.completion_metadata,
        ])?;
        if changed != 1 {
            return Err(Fault::Defect("an event changed between its reading and its writing"));
        }
        self.deltas.changed(Some(before), after);
        Ok(())
    }

    fn archive(&mut self, before: &Event, now: Time) -> Result<(), Fault> {
        self.writes()?;
        let Some(attempt) = apply::archived(before, now) else { return Ok(()) };
        let result = attempt.result.as_ref();
        self.prepare(include_str!("archive.sql"))?.execute(params![
            before.row,
            attempt.attempt,
            attempt.fencing_token,
            attempt.claim_id,
            attempt.holder,
            attempt.start_time,
            attempt.end_time,
            attempt.outcome,
            attempt.error,
            attempt.payload_digest,
            result.map(|result| result.code),
            result.map(|result| &result.content_type),
            result.map(|result| result.body.as_ref()),
        ])?;
        Ok(())
    }

    fn record(&mut self, row: RowId, resolution: &Resolution) -> Result<(), Fault> {
        self.writes()?;
        self.prepare(include_str!("resolution_insert.sql"))?.execute(params![
            row,
            resolution.fencing_token,
            resolution.from_fencing_token,
            resolution.from_state,
            resolution.to_state,
            resolution.reason,
            resolution.actor,
            resolution.time,
        ])?;
        Ok(())
    }
}

fn acquired(event: &Event, now: Time) -> Result<Decision, Fault> {
    match &event.latest {
        Some(latest) => Ok(Decision::Acquired(transition::lock_of(event, latest, now))),
        None => Err(Fault::Defect("an event was granted without an attempt")),
    }
}
