//! What a call does when it arrives: the sidecar's own rules, one step at a time (S1), surrounded by what may be
//! broken.

use oncegate_sidecar::{
    cache::{Entry, entry::Completion},
    event::{
        Claim, Decision, Ending, Event, FailureKind, FencingToken, Key, Mark, Micros, Resolve, Resolved, RowId, State,
        Time, apply,
        transition::{self, ClaimStep, MarkStep, ResolveStep},
    },
};

use crate::{
    Broken, Protocol,
    world::{Doing, EventIndex, Fill, HolderIndex, World},
};

/// How long a lock lasts.
const LOCK: Micros = Micros(1);
/// How long Redis keeps an entry. Less than the retention, as in C2.
pub(crate) const ENTRY_LIFE: Micros = Micros(1);
/// What Cleanup cannot undercut.
const RETENTION_MIN: Micros = Micros(2);

fn key(event: EventIndex) -> Key {
    Key { tenant: String::new(), provider: String::new(), event_id: event.to_string() }
}

impl Protocol {
    pub(crate) fn request(&self, event: EventIndex, claim: u8) -> Claim {
        Claim {
            key: key(event),
            event_type: String::new(),
            claim_id: claim.to_string(),
            holder: String::new(),
            lock_duration: LOCK,
            fingerprint: None,
            metadata: None,
            payload_digest: None,
            delivery_id: None,
            attempts_max: self.attempts_max,
            waiting: false,
        }
    }

    fn draw(&self, world: &mut World, before: Option<&Event>) -> FencingToken {
        if self.broken == Some(Broken::TokenPerRow) {
            return FencingToken(before.map_or(1, |event| event.fencing_token.0 + 1));
        }
        world.token.0 += 1;
        world.token
    }

    pub(crate) fn claim(
        &self,
        world: &mut World,
        (holder, event, claim): (HolderIndex, EventIndex, u8),
        answered: bool,
    ) {
        let request = self.request(event, claim);
        let now = world.now;
        let before = world.rows[event].event.clone();
        let ended = self.broken != Some(Broken::ForgetsEndedClaims)
            && world.rows[event].archive.iter().any(|attempt| attempt.claim_id == request.claim_id);
        let mut step = transition::claim(before.as_ref(), ended, &request, now);
        match self.broken {
            Some(Broken::GrantBeforeExpiry) => {
                step = transition::claim(before.as_ref(), ended, &request, Time(i64::MAX));
            }
            // As SET NX would do.
            Some(Broken::GrantFromCache)
                if world.redis[event].is_none() && matches!(step, ClaimStep::Keep(Decision::InProgress { .. })) =>
            {
                step = ClaimStep::Grant;
            }
            _ => {}
        }
        let granted = match (step, before) {
            (ClaimStep::Insert, _) => {
                let token = self.draw(world, None);
                Some(Event::inserted(&request, RowId(token.0), token, now))
            }
            (ClaimStep::Grant, Some(before)) => {
                let token = self.draw(world, Some(&before));
                self.archive(world, event, &before);
                Some(apply::granted(&before, &request, token, now))
            }
            (ClaimStep::Bury, Some(before)) => {
                let buried = apply::buried(&before, now);
                if buried.latest.is_none() {
                    self.archive(world, event, &before);
                }
                world.rows[event].event = Some(buried);
                world.history[event].buried = true;
                None
            }
            (ClaimStep::Keep(Decision::Acquired(_)), Some(before)) => Some(before),
            (ClaimStep::Keep(Decision::AlreadyCompleted), Some(before)) => {
                world.history[event].told_completed();
                self.fill(world, event, &before);
                None
            }
            (ClaimStep::Keep(_) | ClaimStep::Refuse(_), _) | (ClaimStep::Grant | ClaimStep::Bury, None) => None,
        };
        let mut doing = Doing::Nothing;
        if let Some(granted) = granted {
            let token = granted.fencing_token;
            let until = granted.latest.as_ref().map_or(now, |latest| latest.lock_expire_time);
            world.history[event].granted(claim, token, until, now);
            world.rows[event].event = Some(granted);
            doing = Doing::Holds { claim, token };
        }
        let holder = &mut world.holders[holder].doing[event];
        if answered && *holder == Doing::Asks(claim) {
            *holder = doing;
        }
    }

    pub(crate) fn mark(&self, world: &mut World, event: EventIndex, claim: u8, token: FencingToken, completed: bool) {
        let Some((mark, state)) = self.judged(world, event, claim, token, completed) else { return };
        let now = world.now;
        let Some(before) = world.rows[event].event.take() else { return };
        let after = apply::marked(&before, &mark, state, now);
        world.history[event].marked(claim, token, completed, now);
        self.fill(world, event, &after);
        world.rows[event].event = Some(after);
    }

    /// A Mark whose transaction fails: nothing happens, unless the cache was written first.
    pub(crate) fn failed_mark(
        &self,
        world: &mut World,
        event: EventIndex,
        claim: u8,
        token: FencingToken,
        completed: bool,
    ) {
        if self.broken == Some(Broken::CachedBeforeCommit)
            && let Some((mark, state)) = self.judged(world, event, claim, token, completed)
            && let Some(before) = &world.rows[event].event
        {
            let after = apply::marked(before, &mark, state, world.now);
            self.fill(world, event, &after);
        }
    }

    fn judged(
        &self,
        world: &World,
        event: EventIndex,
        claim: u8,
        token: FencingToken,
        completed: bool,
    ) -> Option<(Mark, State)> {
        let ending = if completed {
            Ending::Completed { metadata: None }
        } else {
            Ending::Failed { kind: FailureKind::Retryable, error: None, retry_after: None }
        };
        let mut mark = Mark {
            key: key(event),
            fencing_token: token,
            claim_id: Some(claim.to_string()),
            ending,
            result: None,
            attempts_max: self.attempts_max,
        };
        let row = &world.rows[event];
        if let (Some(Broken::MarkIgnoresToken), Some(known)) = (self.broken, &row.event) {
            (mark.fencing_token, mark.claim_id) = (known.fencing_token, None);
        }
        let archived = row.archive.iter().find(|attempt| attempt.fencing_token == mark.fencing_token);
        match transition::mark(row.event.as_ref(), archived, &mark) {
            MarkStep::Apply(state) => Some((mark, state)),
            MarkStep::Repeated | MarkStep::Refuse(_) => None,
        }
    }

    /// The sidecar begins to write a completed event to Redis (C2).
    fn fill(&self, world: &mut World, event: EventIndex, known: &Event) {
        if known.state != State::Completed {
            return;
        }
        let Some(entry) = Entry::completed(known) else { return };
        let until = known.end_time.unwrap_or(known.update_time).plus(ENTRY_LIFE);
        let fill = Fill { event, entry, until };
        if until > world.now && !world.fills.contains(&fill) {
            world.fills.push(fill);
        }
    }

    /// Redis accepts an entry, unless it has one with a higher token.
    pub(crate) fn take(&self, world: &mut World, fill: Fill) {
        let newer = world.redis[fill.event].as_ref().is_some_and(|(held, _)| token_of(held) > token_of(&fill.entry));
        if fill.until > world.now && (!newer || self.broken == Some(Broken::CacheIgnoresToken)) {
            // Tombstones have no end.
            if fill.until < Time(i64::MAX) {
                world.earlier[fill.event].get_or_insert_with(|| fill.entry.clone());
            }
            world.redis[fill.event] = Some((fill.entry, fill.until));
        }
    }

    /// What the cache answers to a claim from the content of Redis.
    pub(crate) fn answer(&self, world: &World, event: EventIndex, claim: u8, informed: bool) -> Option<Completion> {
        let (entry, _) = world.redis[event].as_ref()?;
        let forgets = !informed || self.broken == Some(Broken::ForgetsReplays);
        let replayed = if forgets { FencingToken::NONE } else { world.rows[event].replayed };
        let life = if self.broken == Some(Broken::EntriesLiveForEver) { Micros(i64::MAX) } else { ENTRY_LIFE };
        entry.answer(&self.request(event, claim)).filter(|_| entry.holds(replayed, world.now, life))
    }

    pub(crate) fn resolve(&self, world: &mut World, event: EventIndex, to: Resolved, force: bool) {
        let request = Resolve {
            key: key(event),
            // What the operator has seen: without it, the same decision is made only once.
            fencing_token: world.rows[event].event.as_ref().map(|event| event.fencing_token),
            to,
            // Only the judge is made to believe it: the history knows what the operator said.
            force: force || self.broken == Some(Broken::ReplayWithoutForce),
            reason: String::new(),
            actor: String::new(),
            result: None,
        };
        let now = world.now;
        let row = &mut world.rows[event];
        let step = transition::resolve(row.event.as_ref(), row.resolution.as_ref(), &request, now);
        let Some(before) = row.event.clone() else { return };
        match step {
            ResolveStep::Apply => {
                let token = if self.broken == Some(Broken::ResolutionKeepsToken) {
                    before.fencing_token
                } else {
                    self.draw(world, Some(&before))
                };
                self.archive(world, event, &before);
                let after = apply::resolved(&before, &request, token, now);
                world.history[event].resolved(before.state, &after, force);
                world.rows[event].resolution = Some(apply::resolution(&before, &request, token, now));
                if before.state == State::Completed {
                    world.rows[event].replayed = token;
                }
                world.tombstones[event] = Some(Entry::tombstone(token, now));
                world.rows[event].event = Some(after);
            }
            // The operator asks again after getting no answer.
            ResolveStep::Repeated => world.tombstones[event] = Some(Entry::tombstone(before.fencing_token, now)),
            ResolveStep::Refuse(_) => {}
        }
    }

    pub(crate) fn write_tombstone(&self, world: &mut World, event: EventIndex) {
        let Some(tombstone) = world.tombstones[event].take() else { return };
        let token = token_of(&tombstone);
        if self.broken == Some(Broken::DeleteInsteadOfTombstone) {
            world.redis[event] = None;
        } else {
            // Tombstones outlive every entry that may be under way.
            self.take(world, Fill { event, entry: tombstone, until: Time(i64::MAX) });
        }
        world.history[event].told_of_resolution(token);
    }

    /// Whether Cleanup may take an event now.
    pub(crate) fn cleans(&self, world: &World, event: EventIndex) -> bool {
        let Some(known) = &world.rows[event].event else { return false };
        let open = match known.state {
            State::Pending | State::Processing => self.broken != Some(Broken::CleanupTakesOpen),
            State::Completed | State::Failed | State::Unknown | State::Dead => false,
        };
        let old = known.end_time.unwrap_or(known.update_time).plus(RETENTION_MIN) < world.now;
        !open && (old || self.broken == Some(Broken::CleanupUndercutsRetention))
    }

    pub(crate) fn clean(&self, world: &mut World, event: EventIndex) {
        let row = std::mem::take(&mut world.rows[event]);
        if let Some(known) = row.event {
            world.history[event].deleted(known.state);
        }
    }

    fn archive(&self, world: &mut World, event: EventIndex, before: &Event) {
        if self.broken != Some(Broken::AttemptNotArchived) {
            world.rows[event].archive.extend(apply::archived(before, world.now));
        }
    }
}

/// The token of an entry. Of a tombstone too.
pub(crate) fn token_of(entry: &Entry) -> FencingToken {
    entry.fencing_token()
}
