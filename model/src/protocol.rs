//! The search: what can happen in a world, and what must hold in every one.

use std::num::NonZeroU32;

use oncegate_sidecar::event::{FencingToken, Resolved, State, Time};
use stateright::{Model, Property};

use crate::{
    broken::Broken,
    history::{History, Violation},
    world::{Action, Call, Doing, Holder, Row, Spent, World},
};

/// A small world: how much of everything it has.
#[derive(Clone, Debug)]
pub struct Protocol {
    /// How many holders.
    pub holders: usize,
    /// How many events.
    pub events: usize,
    /// How many claims are sent in all, copies not counted.
    pub asks: u8,
    /// How far the database's clock goes; a lock lasts one.
    pub ticks: i64,
    /// How many times an operator decides.
    pub resolutions: u8,
    /// How many events Cleanup takes.
    pub cleanups: u8,
    /// How many crashes and flushes there are.
    pub crashes: u8,
    /// The cap on attempts.
    pub attempts_max: Option<NonZeroU32>,
    /// The rule that does not hold, if any.
    pub broken: Option<Broken>,
}

impl Model for Protocol {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            now: Time(0),
            token: FencingToken::NONE,
            rows: vec![Row::default(); self.events],
            holders: vec![Holder { doing: vec![Doing::Nothing; self.events] }; self.holders],
            sent: Default::default(),
            redis: vec![None; self.events],
            earlier: vec![None; self.events],
            lost: vec![false; self.events],
            fills: Vec::new(),
            tombstones: vec![None; self.events],
            spent: Spent::default(),
            history: vec![History::default(); self.events],
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (index, holder) in world.holders.iter().enumerate() {
            for (event, doing) in holder.doing.iter().enumerate() {
                match doing {
                    Doing::Nothing if world.spent.asks < self.asks => actions.push(Action::Ask(index, event)),
                    Doing::Nothing | Doing::Asks(_) => {}
                    Doing::Holds { .. } => {
                        actions.push(Action::End(index, event, true));
                        actions.push(Action::End(index, event, false));
                    }
                }
            }
        }
        for &call in &world.sent {
            actions.push(Action::Arrive { call, answered: true });
            match call {
                Call::Claim { holder, event, claim } => {
                    // Whether an answer gets through matters only while somebody waits for it.
                    if world.holders[holder].doing[event] == Doing::Asks(claim) {
                        actions.push(Action::Arrive { call, answered: false });
                    }
                    // Both only where their knowledge makes a difference, not where both give the same answer.
                    let [known, unknown] = [true, false].map(|informed| self.answer(world, event, claim, informed));
                    if known.is_some() {
                        actions.push(Action::FromCache { call, informed: true });
                    } else if unknown.is_some() {
                        actions.push(Action::FromCache { call, informed: false });
                    }
                }
                Call::Mark { .. } => actions.push(Action::Fails(call)),
            }
        }
        actions.extend((0..world.fills.len()).map(Action::Fill));
        for event in 0..self.events {
            if world.spent.resolutions < self.resolutions && world.rows[event].event.is_some() {
                // To the other two, force makes no difference.
                let decisions = [
                    (Resolved::Pending, false),
                    (Resolved::Pending, true),
                    (Resolved::Completed, false),
                    (Resolved::Dead, false),
                ];
                actions.extend(decisions.map(|(to, force)| Action::Resolve { event, to, force }));
            }
            if world.tombstones[event].is_some() {
                actions.push(Action::Tombstone(event));
            }
            if world.spent.cleanups < self.cleanups && self.cleans(world, event) {
                actions.push(Action::Clean(event));
            }
        }
        if world.now.0 < self.ticks {
            actions.push(Action::Tick);
        }
        if world.spent.crashes < self.crashes {
            actions.extend((0..self.holders).map(Action::CrashHolder));
            actions.extend([Action::CrashSidecar, Action::FlushRedis]);
            let had = (0..self.events).filter(|event| world.earlier[*event].is_some());
            actions.extend(had.map(Action::RedisGoesBack));
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        match action {
            Action::Ask(holder, event) => {
                let claim = world.spent.asks;
                world.spent.asks += 1;
                world.holders[holder].doing[event] = Doing::Asks(claim);
                world.sent.insert(Call::Claim { holder, event, claim });
            }
            Action::End(holder, event, completed) => {
                let doing = std::mem::take(&mut world.holders[holder].doing[event]);
                if let Doing::Holds { claim, token } = doing {
                    world.sent.insert(Call::Mark { event, claim, token, completed });
                }
            }
            Action::Arrive { call: Call::Claim { holder, event, claim }, answered } => {
                self.claim(&mut world, (holder, event, claim), answered);
            }
            Action::Arrive { call: Call::Mark { event, claim, token, completed }, .. } => {
                self.mark(&mut world, event, claim, token, completed);
            }
            Action::Fails(Call::Mark { event, claim, token, completed }) => {
                self.failed_mark(&mut world, event, claim, token, completed);
            }
            Action::Fails(Call::Claim { .. }) | Action::FromCache { call: Call::Mark { .. }, .. } => {}
            Action::FromCache { call: Call::Claim { holder, event, claim }, informed } => {
                let told = self.answer(&world, event, claim, informed)?;
                // Where Redis has lost a tombstone, a sidecar that has not read about the replay yet may be wrong for a
                // moment. No other ever may.
                if informed || !world.lost[event] {
                    world.history[event].told_from_cache(told.fencing_token);
                }
                let doing = &mut world.holders[holder].doing[event];
                if *doing == Doing::Asks(claim) {
                    *doing = Doing::Nothing;
                }
            }
            Action::Fill(index) => {
                let fill = world.fills.remove(index);
                self.take(&mut world, fill);
            }
            Action::Resolve { event, to, force } => {
                world.spent.resolutions += 1;
                self.resolve(&mut world, event, to, force);
            }
            Action::Tombstone(event) => self.write_tombstone(&mut world, event),
            Action::Clean(event) => {
                world.spent.cleanups += 1;
                self.clean(&mut world, event);
            }
            Action::Tick => {
                world.now = Time(world.now.0 + 1);
                let now = world.now;
                for entry in &mut world.redis {
                    entry.take_if(|(_, until)| *until <= now);
                }
                world.fills.retain(|fill| fill.until > now);
            }
            Action::CrashHolder(holder) => {
                world.spent.crashes += 1;
                world.holders[holder].doing.fill(Doing::Nothing);
            }
            Action::CrashSidecar => {
                world.spent.crashes += 1;
                world.fills.clear();
                world.tombstones.fill(None);
            }
            Action::FlushRedis => {
                world.spent.crashes += 1;
                world.redis.fill(None);
                world.lost.fill(true);
            }
            Action::RedisGoesBack(event) => {
                world.spent.crashes += 1;
                // Manual interference gives it no expiry.
                world.redis[event] = Some((world.earlier[event].clone()?, Time(i64::MAX)));
                world.lost[event] = true;
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn never(world: &World, violation: Violation) -> bool {
            world.history.iter().all(|history| !history.has(violation))
        }
        fn some(world: &World, happened: fn(&History) -> bool) -> bool {
            world.history.iter().any(happened)
        }
        vec![
            Property::always("I1 token order", |_, world| never(world, Violation::TokenOrder)),
            Property::always("I2 one live holder", |_, world| never(world, Violation::TwoHolders)),
            Property::always("I3 no stale completion", |_, world| never(world, Violation::StaleMark)),
            Property::always("I4 one completion", |_, world| never(world, Violation::SecondCompletion)),
            Property::always("I9 told completed only when completed", |_, world| {
                never(world, Violation::ToldCompleted)
            }),
            Property::always("I10 attempts are dense", |_, world: &World| {
                world.rows.iter().zip(&world.history).all(|(row, history)| history.attempts_are_dense(row))
            }),
            Property::always("S4 no ghost lock", |_, world| never(world, Violation::GhostLock)),
            Property::always("open events are not deleted", |_, world| never(world, Violation::OpenDeleted)),
            Property::always("the row is completed as the history is", |_, world: &World| {
                world.rows.iter().zip(&world.history).all(|(row, history)| {
                    row.event.as_ref().is_some_and(|event| event.state == State::Completed) == history.is_completed()
                })
            }),
            Property::sometimes("completed", |_, world: &World| world.history.iter().all(History::is_completed)),
            Property::sometimes("taken over", |_, world| some(world, |history| history.takeover)),
            Property::sometimes("marked after the expiry", |_, world| some(world, |history| history.late_mark)),
            Property::sometimes("replayed and completed again", |_, world| some(world, |history| history.replay)),
            Property::sometimes("granted again after a cleanup", |_, world| some(world, |history| history.reborn)),
            Property::sometimes("answered by the cache", |_, world| some(world, |history| history.cached)),
            Property::sometimes("buried at the cap", |_, world| some(world, |history| history.buried)),
        ]
    }
}
