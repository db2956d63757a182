//! Further callers of a key in the batch are judged by what the first one left, without a statement of their own as long as
//! they change nothing.

use std::collections::{BTreeMap, HashSet, btree_map::Entry};

use super::{Queued, Writer, dealt::Dealt, send};
use crate::{
    event::{
        Claim, Claimed, Extend, Key, Lock, Mark, Marked,
        transition::{self, ClaimStep, ExtendStep, MarkStep},
    },
    ledger::{
        Error,
        postgres::hot::{HotItem, Past, Pending},
        queue::Op,
    },
};

/// Further callers that only the ledger can answer.
pub(super) struct Unanswered {
    /// Claims with an archive to look into or a delivery id to compare. Sorted by key.
    pub(super) claims: Vec<HotItem>,
    /// Marks of an earlier attempt.
    pub(super) marks: Vec<Pending<Mark, Marked>>,
}

impl Writer {
    /// Judges further claims and marks of a key against the event as this batch left it, and returns those that the ledger has
    /// to be asked about. The first operation that changes something, and all of the same key after it, go into the next batch
    /// in the same order.
    pub(super) fn follow(&mut self, followers: Vec<Queued>, dealt: &Dealt) -> Unanswered {
        let mut held: HashSet<Key> = HashSet::new();
        // By key and claim id: two copies of one call ask one after the other.
        let mut asking: BTreeMap<(Key, String), HotItem> = BTreeMap::new();
        let mut late: Vec<Pending<Mark, Marked>> = Vec::new();
        for Queued { op, past } in followers {
            let left = match *op {
                op if op.key().is_some_and(|key| held.contains(key)) => Some(op),
                Op::Claim(request, reply) => {
                    self.follow_claim(Pending { request, reply, past }, dealt, &mut asking).map(Op::from)
                }
                Op::Mark(request, reply) => {
                    follow_mark(Pending { request, reply, past }, dealt, &mut late).map(Op::from)
                }
                Op::Extend(request, reply) => follow_extend(Pending { request, reply, past }, dealt)
                    .map(|Pending { request, reply, .. }| Op::Extend(request, reply)),
                op @ (Op::Resolve(..) | Op::Flush | Op::Close(_)) => Some(op),
            };
            if let Some(op) = left {
                if let Some(key) = op.key() {
                    held.insert(key.clone());
                }
                self.defer(op, past);
            }
        }
        // Sorted by key, as the statement requires.
        Unanswered { claims: asking.into_values().collect(), marks: late }
    }

    /// Answers a claim, adds it to those that ask the ledger, or returns it.
    fn follow_claim(
        &mut self,
        claim: Pending<Claim, Claimed>,
        dealt: &Dealt,
        asking: &mut BTreeMap<(Key, String), HotItem>,
    ) -> Option<Pending<Claim, Claimed>> {
        let Some((event, now)) = dealt.get(&claim.request.key) else { return Some(claim) };
        if event.archived_count() > 0 || claim.request.delivery_id.is_some() {
            let name = (claim.request.key.clone(), claim.request.claim_id.clone());
            match asking.entry(name) {
                Entry::Vacant(place) => {
                    place.insert(HotItem::Claim(claim));
                }
                // It does not hold up anybody else.
                Entry::Occupied(_) => self.defer(Op::Claim(claim.request, claim.reply), claim.past),
            }
            return None;
        }
        match transition::claim(Some(event), false, &claim.request, now) {
            ClaimStep::Keep(decision) => {
                let changed = event.payload_differs(&claim.request);
                self.answer(claim, decision, event.clone(), now, changed);
            }
            ClaimStep::Refuse(refusal) => self.refuse(claim, refusal, now),
            ClaimStep::Grant | ClaimStep::Bury | ClaimStep::Insert => return Some(claim),
        }
        None
    }

    /// Defers an operation to the next batch. As many may wait here as the queue holds; any beyond that have not happened, and
    /// are refused as they would be by a full queue. Marks are never refused: one may be the only record of an effect, and only
    /// one per key and token would change anything.
    pub(super) fn defer(&mut self, op: Op, past: Past) {
        if self.deferred.len() < self.deferred_max || matches!(op, Op::Mark(..)) {
            self.deferred.push_back(Queued { op: Box::new(op), past });
        } else {
            self.session.metrics.refused.add();
            op.refuse(past.told(Error::overloaded()));
        }
    }
}

/// Answers a mark, adds it to the late ones, which their own attempt's record decides (S3), or returns it. A caller that keeps
/// repeating an unanswered mark may have hundreds queued: at one per batch they would arrive faster than they are answered.
fn follow_mark(
    mark: Pending<Mark, Marked>,
    dealt: &Dealt,
    late: &mut Vec<Pending<Mark, Marked>>,
) -> Option<Pending<Mark, Marked>> {
    let Some((event, _)) = dealt.get(&mark.request.key) else { return Some(mark) };
    if event.is_archived(mark.request.fencing_token) {
        late.push(mark);
        return None;
    }
    match transition::mark(Some(event), None, &mark.request) {
        MarkStep::Repeated => send(mark, Ok(Marked { event: event.clone(), repeated: true })),
        MarkStep::Refuse(refusal) => send(mark, Err(refusal.into())),
        MarkStep::Apply(_) => return Some(mark),
    }
    None
}

/// Answers an extension that asks for no more than the lock already has, or returns it. Otherwise a caller that extends one
/// lock from many places would get only one of them through per batch.
fn follow_extend(extend: Pending<Extend, Lock>, dealt: &Dealt) -> Option<Pending<Extend, Lock>> {
    let Some((event, now)) = dealt.get(&extend.request.key) else { return Some(extend) };
    let Some(latest) = &event.latest else { return Some(extend) };
    let is_within = now.plus(extend.request.lock_duration) <= latest.lock_expire_time;
    match transition::extend(Some(event), &extend.request) {
        ExtendStep::Apply if is_within => send(extend, Ok(transition::lock_of(event, latest, now))),
        ExtendStep::Apply => return Some(extend),
        ExtendStep::Refuse(refusal) => send(extend, Err(refusal.into())),
    }
    None
}

impl From<Pending<Claim, Claimed>> for Op {
    fn from(Pending { request, reply, .. }: Pending<Claim, Claimed>) -> Op {
        Op::Claim(request, reply)
    }
}

impl From<Pending<Mark, Marked>> for Op {
    fn from(Pending { request, reply, .. }: Pending<Mark, Marked>) -> Op {
        Op::Mark(request, reply)
    }
}
