//! The writer: one task that owns the connection and takes whatever has queued up as one batch (L3). While a batch is
//! out the next one gathers; nothing waits on purpose. The task is never cancelled with a caller's request.

mod dealt;
mod follow;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;

use self::{dealt::Dealt, follow::Unanswered};
use super::{
    cold::{
        Applied, ApplyResolutions, Bury, Candidate, Classified, Classify, Decided, ExtendLocks, GrantAgain,
        RecordDeliveries, Tokened,
    },
    counts::PendingCounts,
    grants::Grants,
    hot::{Claims, Hot, HotItem, HotRow, Met, Outlook, Past, Pending},
    statement::{Session, Statement},
};
use crate::{
    event::{
        Claim, Claimed, Decision, Digest, Event, Extend, Lock, Mark, Marked, Refusal, Resolve, RowId, Time,
        transition::{self, ClaimStep, ExtendStep, MarkStep, ResolveStep, Tallied},
    },
    ledger::{
        Delivery, DeliveryName, Error,
        load::Load,
        queue::{BATCH_BYTES_MAX, Op, batch_span},
        tally::Location,
    },
    lockstep::Lockstep,
};

/// How often a request may find its event changed between two statements, before its caller is told to come back.
const TRIES_MAX: u32 = 3;
/// How often an idle writer checks whether its connection is alive, or can be made.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// An operation, and what it has been through.
struct Queued {
    op: Box<Op>,
    past: Past,
}

impl Queued {
    fn new(op: Box<Op>) -> Queued {
        Queued { op, past: Past::default() }
    }
}

/// What the answers of a hot statement leave to other statements.
#[derive(Default)]
struct Left {
    /// Claims that the form of the statement has no answer for.
    unexpected: Vec<HotItem>,
    grants: Vec<Candidate>,
    burials: Vec<Candidate>,
    /// The rows of both: their statements accept each row only once.
    candidates: HashSet<RowId>,
    unapplied: Vec<Pending<Mark, Marked>>,
}

pub(super) struct Writer {
    session: Session,
    ops: mpsc::Receiver<Box<Op>>,
    batch_max: usize,
    /// Operations that go ahead of new ones: later callers of a key in the last batch, and requests that have to ask again.
    deferred: VecDeque<Queued>,
    /// How many of them there may be.
    deferred_max: usize,
    counts: PendingCounts,
    outlook: Outlook,
    grants: Grants,
    lockstep: Lockstep,
    load: Arc<Load>,
}

impl Writer {
    pub(super) fn new(
        session: Session,
        ops: mpsc::Receiver<Box<Op>>,
        batch_max: usize,
        counts: PendingCounts,
        load: Arc<Load>,
    ) -> Writer {
        let deferred_max = ops.max_capacity();
        let (deferred, outlook, lockstep) = (VecDeque::new(), Outlook::default(), Lockstep::default());
        let grants = Grants::default();
        Writer { session, ops, batch_max, deferred, deferred_max, counts, outlook, grants, lockstep, load }
    }

    /// Works until the ledger is closed or dropped.
    pub(super) async fn run(mut self) {
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut closing: Vec<oneshot::Sender<()>> = Vec::new();
        loop {
            if self.deferred.is_empty() {
                tokio::select! {
                    op = self.ops.recv() => match op {
                        Some(op) => self.deferred.push_back(Queued::new(op)),
                        None => break,
                    },
                    _ = look.tick() => {
                        self.session.ask().await;
                        // Calls would connect by themselves, but health wants to know before there are any.
                        let _down = self.session.connection().await;
                    }
                }
            }
            let batch = self.gather(&mut closing);
            if !batch.is_empty() {
                let load = Arc::clone(&self.load);
                let _timed = load.batch(batch.len());
                let span = batch_span(batch.iter().map(|queued| &*queued.op));
                let metrics = self.session.metrics.clone();
                let _counted = metrics.batch(batch.len());
                self.process(batch).instrument(span).await;
            }
            self.counts.keep_up().await;
            if !closing.is_empty() {
                // What was queued before the close is answered first.
                self.ops.close();
                while let Ok(op) = self.ops.try_recv() {
                    self.deferred.push_back(Queued::new(op));
                }
                if self.deferred.is_empty() {
                    break;
                }
            }
        }
        self.session.close().await;
        for reply in closing {
            // The caller may have gone away.
            let _gone = reply.send(());
        }
    }

    /// Takes what is queued, up to the limit, without waiting.
    fn gather(&mut self, closing: &mut Vec<oneshot::Sender<()>>) -> Vec<Queued> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        // Deferred operations go first, but never take the places of new ones: a crowd at one event must not hold up the
        // others, including the Mark of that event's own holder.
        let mut places = [self.batch_max.min(self.deferred.len()), self.batch_max];
        loop {
            let queued = if places[0] > 0 {
                places[0] -= 1;
                self.deferred.pop_front()
            } else if places[1] > 0 {
                places[1] -= 1;
                self.ops.try_recv().ok().map(Queued::new)
            } else {
                None
            };
            let Some(queued) = queued else { break };
            bytes += queued.op.bytes();
            if bytes > BATCH_BYTES_MAX {
                places = [0, 0];
            }
            match *queued.op {
                // The counts have a connection of their own.
                Op::Flush => {}
                Op::Close(reply) => closing.push(reply),
                _ if queued.op.is_abandoned() => {}
                _ => batch.push(queued),
            }
        }
        batch
    }

    /// Processes a batch. What it defers goes ahead of what was deferred before and did not fit into it, because the latter
    /// came later.
    async fn process(&mut self, batch: Vec<Queued>) {
        let later = self.deferred.len();
        self.deal_with(batch).await;
        self.deferred.rotate_left(later);
    }

    async fn deal_with(&mut self, mut batch: Vec<Queued>) {
        // The first operation of each key leads, in the order of the keys; the others of that key follow in theirs.
        batch.sort_by(|a, b| a.op.key().cmp(&b.op.key()));
        let mut leaders: Vec<Queued> = Vec::with_capacity(batch.len());
        let mut followers: Vec<Queued> = Vec::new();
        for queued in batch {
            if leaders.last().is_some_and(|leader| leader.op.key() == queued.op.key()) {
                followers.push(queued);
            } else {
                leaders.push(queued);
            }
        }

        let mut hot = Vec::new();
        let mut extends = Vec::new();
        let mut resolves = Vec::new();
        for Queued { op, past } in leaders {
            if past.tries >= TRIES_MAX {
                op.refuse(past.told(Error::changed()));
                continue;
            }
            match *op {
                Op::Claim(request, reply) => hot.push(HotItem::Claim(Pending { request, reply, past })),
                Op::Mark(request, reply) => {
                    let grant = self.grants.take(&request);
                    hot.push(HotItem::Mark(Pending { request, reply, past }, grant));
                }
                Op::Extend(request, reply) => extends.push(Pending { request, reply, past }),
                Op::Resolve(request, reply) => resolves.push(Pending { request, reply, past }),
                Op::Flush | Op::Close(_) => {}
            }
        }

        let mut dealt = Dealt::with(&followers);
        let hot = self.admit_deliveries(hot).await;
        self.hot(hot, &mut dealt).await;
        self.extend(extends, &mut dealt).await;
        self.resolve(resolves).await;
        // What only the ledger can judge goes into one more statement all together, instead of one item per batch.
        let Unanswered { claims, marks } = self.follow(followers, &dealt);
        let mut nobody_follows = Dealt::default();
        if !claims.is_empty() {
            let hot = self.admit_deliveries(claims).await;
            self.hot(hot, &mut nobody_follows).await;
        }
        self.classify_marks(marks, &mut nobody_follows).await;
    }

    // === Claims and marks ===

    /// Refuses claims whose delivery id was seen before with another payload, for whatever event.
    async fn admit_deliveries(&mut self, items: Vec<HotItem>) -> Vec<HotItem> {
        let named: Vec<Delivery> = items
            .iter()
            .filter_map(|item| match item {
                HotItem::Claim(claim) => Delivery::of(&claim.request),
                HotItem::Mark(..) => None,
            })
            .collect();
        if named.is_empty() {
            return items;
        }
        let recorded = self.record_deliveries(named).await;
        let mut admitted = Vec::with_capacity(items.len());
        let mut forged = Vec::new();
        for item in items {
            let claim = match item {
                HotItem::Mark(..) => {
                    admitted.push(item);
                    continue;
                }
                HotItem::Claim(claim) => claim,
            };
            let Some(delivery) = Delivery::of(&claim.request) else {
                admitted.push(HotItem::Claim(claim));
                continue;
            };
            match recorded.get(&delivery.name) {
                Some(Ok(known)) if *known == delivery.payload_digest => admitted.push(HotItem::Claim(claim)),
                Some(Ok(_)) => forged.push(claim),
                Some(Err(error)) => send(claim, Err(error.clone())),
                // It met an insert that the snapshot cannot see.
                None => self.again(claim, Op::Claim),
            }
        }
        // Counted on the event that the claim names, if there is one.
        for (claim, found) in self.classify(forged).await {
            match found {
                Some(found) => self.refuse(claim, Refusal::DeliveryMismatch, found.now),
                None => send(claim, Err(Refusal::DeliveryMismatch.into())),
            }
        }
        admitted
    }

    /// Records deliveries. Returns for each the digest that it first came with, or why that is not known.
    async fn record_deliveries(
        &mut self,
        mut deliveries: Vec<Delivery>,
    ) -> HashMap<DeliveryName, Result<Digest, Error>> {
        deliveries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut recorded = HashMap::with_capacity(deliveries.len());
        for (deliveries, result) in self.session.run(&RecordDeliveries, deliveries).await {
            match result {
                Ok(digests) => recorded.extend(digests.into_iter().map(|(name, digest)| (name, Ok(digest)))),
                Err(error) => {
                    recorded.extend(deliveries.into_iter().map(|delivery| (delivery.name, Err(error.clone()))));
                }
            }
        }
        recorded
    }

    async fn hot(&mut self, items: Vec<HotItem>, dealt: &mut Dealt) {
        let mut met = Met::default();
        let mut unexpected = self.hot_as(self.outlook.claims(), items, &mut met, dealt).await;
        if !unexpected.is_empty() {
            // Parts of a batch that was halved come back in any order.
            unexpected.sort_unstable_by(|a, b| a.key().cmp(b.key()));
            self.hot_as(Claims::Any, unexpected, &mut met, dealt).await;
        }
        self.outlook.saw(met);
    }

    /// Runs the hot statement in one form and does all that follows from its answers. Returns the claims that this form has
    /// no answer for.
    async fn hot_as(&mut self, claims: Claims, items: Vec<HotItem>, met: &mut Met, dealt: &mut Dealt) -> Vec<HotItem> {
        let mut left = Left::default();
        for (items, rows) in self.run_for(&Hot { claims }, items).await {
            let half = self.lockstep.split(rows.len(), self.ops.len() + self.deferred.len());
            for (place, (item, row)) in items.into_iter().zip(rows).enumerate() {
                if half == Some(place) {
                    tokio::task::yield_now().await;
                }
                match item {
                    HotItem::Claim(claim) => self.claim_answered(claim, row, claims, met, dealt, &mut left),
                    HotItem::Mark(mark, grant) => self.mark_answered(mark, grant, row, dealt, &mut left),
                }
            }
        }
        self.grant_again(left.grants, dealt).await;
        self.bury(left.burials, dealt).await;
        self.classify_marks(left.unapplied, dealt).await;
        left.unexpected
    }

    fn claim_answered(
        &mut self,
        claim: Pending<Claim, Claimed>,
        row: HotRow,
        claims: Claims,
        met: &mut Met,
        dealt: &mut Dealt,
        left: &mut Left,
    ) {
        let (event, claim_ended, now) = match row {
            HotRow::Seen { event, claim_ended, now } => (event, claim_ended, now),
            HotRow::Fresh { row, fencing_token, now } => {
                met.new += 1;
                let event = Event::inserted(&claim.request, row, fencing_token, now);
                dealt.keep(&event, now);
                return self.granted(claim, event, now, false);
            }
            HotRow::Nothing if claims != Claims::Any => return left.unexpected.push(HotItem::Claim(claim)),
            HotRow::Nothing | HotRow::Marked { .. } | HotRow::Completed { .. } => return self.again(claim, Op::Claim),
        };
        met.known += 1;
        match transition::claim(Some(&event), claim_ended, &claim.request, now) {
            // One candidate per event. The next batch sees what has become of it; losing to another caller does not count
            // as a failed try.
            ClaimStep::Grant | ClaimStep::Bury if !left.candidates.insert(event.row) => {
                self.defer(Op::Claim(claim.request, claim.reply), claim.past);
            }
            ClaimStep::Grant => left.grants.push(Candidate { event, claim }),
            ClaimStep::Bury => left.burials.push(Candidate { event, claim }),
            ClaimStep::Keep(decision) => {
                dealt.keep(&event, now);
                let changed = event.payload_differs(&claim.request);
                self.answer(claim, decision, event, now, changed);
            }
            ClaimStep::Refuse(refusal) => {
                dealt.keep(&event, now);
                self.refuse(claim, refusal, now);
            }
            ClaimStep::Insert => self.again(claim, Op::Claim),
        }
    }

    fn mark_answered(
        &mut self,
        mark: Pending<Mark, Marked>,
        grant: Option<Box<Event>>,
        row: HotRow,
        dealt: &mut Dealt,
        left: &mut Left,
    ) {
        let (event, now) = match (row, grant) {
            (HotRow::Marked { event, now }, _) => (event, now),
            (HotRow::Completed { since, now }, Some(grant)) => (since.completed(*grant, &mark.request, now), now),
            (HotRow::Completed { .. } | HotRow::Fresh { .. } | HotRow::Seen { .. } | HotRow::Nothing, _) => {
                return left.unapplied.push(mark);
            }
        };
        dealt.keep(&event, now);
        self.marked(mark, event);
    }

    async fn grant_again(&mut self, mut candidates: Vec<Candidate>, dealt: &mut Dealt) {
        candidates.sort_unstable_by(|a, b| a.event.key.cmp(&b.event.key));
        for (candidates, rows) in self.run_for(&GrantAgain, candidates).await {
            self.apply(candidates, rows, |writer, candidate: Candidate, event, now| {
                let changed = candidate.event.payload_differs(&candidate.claim.request);
                dealt.keep(&event, now);
                writer.granted(candidate.claim, event, now, changed);
            });
        }
    }

    async fn bury(&mut self, mut candidates: Vec<Candidate>, dealt: &mut Dealt) {
        candidates.sort_unstable_by(|a, b| a.event.key.cmp(&b.event.key));
        for (candidates, rows) in self.run_for(&Bury, candidates).await {
            self.apply(candidates, rows, |writer, candidate: Candidate, event, now| {
                // With the attempt that is buried before it is archived: later claims are compared with none.
                let changed = candidate.event.payload_differs(&candidate.claim.request);
                dealt.keep(&event, now);
                writer.answer(candidate.claim, Decision::Refused, event, now, changed);
            });
        }
    }

    /// Answers the candidates of a conditional statement: those that it changed by `done`, the others ask again.
    fn apply(
        &mut self,
        candidates: Vec<Candidate>,
        rows: Vec<Applied>,
        mut done: impl FnMut(&mut Writer, Candidate, Event, Time),
    ) {
        for (candidate, row) in candidates.into_iter().zip(rows) {
            match row {
                Some((event, now)) => done(self, candidate, event, now),
                None => self.again(candidate.claim, Op::Claim),
            }
        }
    }

    /// Finds out why marks changed nothing (S3).
    async fn classify_marks(&mut self, marks: Vec<Pending<Mark, Marked>>, dealt: &mut Dealt) {
        for (mark, found) in self.classify(marks).await {
            if let Some(found) = &found {
                dealt.keep(&found.event, found.now);
            }
            let (event, archived) = match found {
                Some(found) => (Some(found.event), found.archived),
                None => (None, None),
            };
            match (transition::mark(event.as_ref(), archived.as_ref(), &mark.request), event) {
                (MarkStep::Repeated, Some(event)) => send(mark, Ok(Marked { event, repeated: true })),
                (MarkStep::Refuse(refusal), _) => send(mark, Err(refusal.into())),
                // The event has changed between the two statements, and would take the mark now.
                (MarkStep::Apply(_), _) | (MarkStep::Repeated, None) => self.again(mark, Op::Mark),
            }
        }
    }

    /// Reads the events of requests; answers those that could not be read.
    async fn classify<R: Tokened, A: Send>(
        &mut self,
        requests: Vec<Pending<R, A>>,
    ) -> Vec<(Pending<R, A>, Option<Classified>)> {
        let read = self.run_for(&Classify::default(), requests).await;
        read.into_iter().flat_map(|(requests, found)| requests.into_iter().zip(found)).collect()
    }

    // === Extensions and resolutions ===

    async fn extend(&mut self, extends: Vec<Pending<Extend, Lock>>, dealt: &mut Dealt) {
        let mut unapplied = Vec::new();
        for (extends, rows) in self.run_for(&ExtendLocks, extends).await {
            for (extend, row) in extends.into_iter().zip(rows) {
                match row.as_ref().and_then(|(event, now)| Some((event, event.latest.as_ref()?, *now))) {
                    Some((event, latest, now)) => {
                        dealt.keep(event, now);
                        send(extend, Ok(transition::lock_of(event, latest, now)));
                    }
                    None => unapplied.push(extend),
                }
            }
        }
        for (extend, found) in self.classify(unapplied).await {
            let event = found.map(|found| found.event);
            match transition::extend(event.as_ref(), &extend.request) {
                ExtendStep::Refuse(refusal) => send(extend, Err(refusal.into())),
                ExtendStep::Apply => self.again(extend, Op::Extend),
            }
        }
    }

    async fn resolve(&mut self, resolves: Vec<Pending<Resolve, Event>>) {
        let mut decided = Vec::new();
        for (resolve, found) in self.classify(resolves).await {
            let Some(found) = found else {
                send(resolve, Err(Refusal::NotFound.into()));
                continue;
            };
            let last = found.resolution.as_ref();
            match transition::resolve(Some(&found.event), last, &resolve.request, found.now) {
                ResolveStep::Apply => decided.push(Decided { event: found.event, resolve }),
                ResolveStep::Repeated => send(resolve, Ok(found.event)),
                // It was under way when the connection broke, and somebody has since built on what it may have changed.
                ResolveStep::Refuse(_) if resolve.past.uncertain => send(resolve, Err(Error::OutcomeUnknown)),
                ResolveStep::Refuse(refusal) => send(resolve, Err(refusal.into())),
            }
        }
        decided.sort_unstable_by(|a, b| a.event.key.cmp(&b.event.key));
        for (decided, rows) in self.run_for(&ApplyResolutions, decided).await {
            for (Decided { event, mut resolve }, row) in decided.into_iter().zip(rows) {
                match row {
                    Some((event, _)) => send(resolve, Ok(event)),
                    None => {
                        if resolve.past.uncertain {
                            // It may have been carried out, and what it was about be over since: without a token it would be
                            // carried out on the next completion too, which the operator has not seen.
                            resolve.request.fencing_token.get_or_insert(event.fencing_token);
                        }
                        self.again(resolve, Op::Resolve);
                    }
                }
            }
        }
    }

    // === Answers ===

    /// Runs a statement for callers. Those it could not serve are told why; returns the others' items with its output.
    async fn run_for<S>(&mut self, statement: &S, items: Vec<S::Item>) -> Vec<(Vec<S::Item>, S::Output)>
    where
        S: Statement<Item: Awaited>,
    {
        let mut served = Vec::new();
        for (items, result) in self.session.run(statement, items).await {
            match result {
                Ok(output) => served.push((items, output)),
                Err(error) => items.into_iter().for_each(|item| item.fail(error.clone())),
            }
        }
        served
    }

    /// Answers a claim that was granted nothing.
    fn answer(
        &mut self,
        claim: Pending<Claim, Claimed>,
        decision: Decision,
        event: Event,
        now: Time,
        payload_changed: bool,
    ) {
        self.count(&claim.request, Some((&event).into()), Ok(&decision), payload_changed, now);
        send(claim, Ok(Claimed { decision, granted: false, event, payload_changed, now }));
    }

    /// Refuses a claim of an event that exists.
    fn refuse(&mut self, claim: Pending<Claim, Claimed>, refusal: Refusal, now: Time) {
        self.count(&claim.request, None, Err(&refusal), false, now);
        send(claim, Err(refusal.into()));
    }

    /// Answers a claim that was granted.
    fn granted(&mut self, claim: Pending<Claim, Claimed>, event: Event, now: Time, payload_changed: bool) {
        let Some(latest) = &event.latest else {
            // A CHECK constraint.
            tracing::error!(row = event.row.0, "the ledger granted an attempt that is not on its row");
            return send(claim, Err(Error::Internal("granted without an attempt".into())));
        };
        let decision = Decision::Acquired(transition::lock_of(&event, latest, now));
        self.grants.keep(&event);
        self.count(&claim.request, Some((&event).into()), Ok(&decision), payload_changed, now);
        send(claim, Ok(Claimed { decision, granted: true, event, payload_changed, now }));
    }

    /// Answers a mark that was applied.
    fn marked(&self, mark: Pending<Mark, Marked>, event: Event) {
        self.counts.completed(&event);
        send(mark, Ok(Marked { event, repeated: false }));
    }

    fn count(
        &self,
        claim: &Claim,
        location: Option<Location>,
        answer: Result<&Decision, &Refusal>,
        payload_changed: bool,
        now: Time,
    ) {
        let Tallied { duplicate, mismatch } = transition::tallied(claim, answer, payload_changed);
        if duplicate {
            self.counts.tally.duplicate(&claim.key, location);
        }
        if mismatch {
            self.counts.tally.mismatch(&claim.key, now);
        }
    }

    /// Puts back a request whose event changed between two statements.
    fn again<R, A>(&mut self, pending: Pending<R, A>, op: impl FnOnce(R, crate::ledger::queue::Reply<A>) -> Op) {
        let Pending { request, reply, past } = pending;
        let past = Past { tries: past.tries + 1, ..past };
        self.deferred.push_back(Queued { op: Box::new(op(request, reply)), past });
    }
}

/// An item whose caller is waiting.
trait Awaited {
    /// Tells the caller that there is no answer.
    fn fail(self, error: Error);
}

impl<R, A> Awaited for Pending<R, A> {
    fn fail(self, error: Error) {
        send(self, Err(error));
    }
}

impl Awaited for HotItem {
    fn fail(self, error: Error) {
        match self {
            HotItem::Claim(claim) => claim.fail(error),
            HotItem::Mark(mark, _) => mark.fail(error),
        }
    }
}

impl Awaited for Candidate {
    fn fail(self, error: Error) {
        self.claim.fail(error);
    }
}

impl Awaited for Decided {
    fn fail(self, error: Error) {
        self.resolve.fail(error);
    }
}

fn send<R, A>(pending: Pending<R, A>, answer: Result<A, Error>) {
    let answer = answer.map_err(|error| pending.past.told(error));
    // A caller that has gone away does not want the answer.
    drop(pending.reply.send(answer));
}
