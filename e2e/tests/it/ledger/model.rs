//! Commands at random, on the ledger and on a model in memory that has nothing but the pure rules: every answer, and
//! all that is kept in the end, must be the same. And the same commands on both ledgers, side by side.

use std::{collections::BTreeMap, env, num::NonZeroU32};

use oncegate_e2e::chaos::seed::Seed;
use oncegate_sidecar::{
    event::{
        Attempt, Claim, Decision, Digest, Ending, Event, Extend, FailureKind, FencingToken, Key, Latest, Lock, Mark,
        Micros, Outcome, Refusal, Resolution, Resolve, Resolved, State, Time,
        transition::{self, ClaimStep, ExtendStep, MarkStep, ResolveStep},
    },
    ledger::{
        Error,
        filter::{CleanupProgress, CleanupScope, Counts},
    },
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{
    Fixture, HOUR, assert_attempts_in_order, comparable, conformance, result,
    stats::{assert_equal_a_recount, everything, total},
};

conformance!(the_ledger_answers_as_the_rules_do);

/// How many commands there are, 1,500 unless this says otherwise.
const COMMANDS: &str = "ONCEGATE_TEST_COMMANDS";

fn number_in<T: std::str::FromStr>(name: &str) -> Option<T> {
    env::var(name).ok().map(|number| number.parse().unwrap_or_else(|_| panic!("{name} is no number: {number}")))
}

/// How many commands there are.
pub(super) fn commands() -> usize {
    number_in(COMMANDS).unwrap_or(1_500)
}

// T03
async fn the_ledger_answers_as_the_rules_do(fixture: &Fixture) {
    run_commands(fixture, Seed::from_environment()).await;
}

/// What commands came to, without what only one ledger can have: its tokens and times.
#[derive(Debug, PartialEq)]
struct Story {
    /// After each command, how its event stands.
    steps: Vec<String>,
    /// How many of each, in the end.
    counts: Counts,
}

async fn run_commands(fixture: &Fixture, seed: Seed) -> Story {
    let mut random = StdRng::seed_from_u64(seed.0);
    let mut model = Model::default();
    let mut steps = Vec::new();
    for number in 0..commands() {
        let command = model.command(&mut random);
        println!("{number}: {command:?}");
        let key = command.key().cloned();
        model.run(fixture, command).await;
        steps.push(model.standing(number, key.as_ref()));
    }
    model.assert_kept(fixture).await;
    let report = assert_equal_a_recount(fixture, &everything()).await;
    Story { steps, counts: total(&report) }
}

// T03
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_ledgers_answer_alike() {
    let seed = Seed::from_environment();
    let (sqlite, postgres) = (Fixture::sqlite(), Fixture::postgres().await);
    let (on_sqlite, on_postgres) = (run_commands(&sqlite, seed).await, run_commands(&postgres, seed).await);
    for (sqlite, postgres) in on_sqlite.steps.iter().zip(&on_postgres.steps) {
        assert_eq!(sqlite, postgres);
    }
    assert_eq!(on_sqlite, on_postgres);
    sqlite.close().await;
    postgres.close().await;
}

#[derive(Clone, Debug)]
enum Command {
    Claim(Claim),
    Mark(Mark),
    Extend(Extend),
    Resolve(Resolve),
    /// Of all that has ended in these states.
    Cleanup(Vec<State>),
}

impl Command {
    fn key(&self) -> Option<&Key> {
        match self {
            Command::Claim(claim) => Some(&claim.key),
            Command::Mark(mark) => Some(&mark.key),
            Command::Extend(extend) => Some(&extend.key),
            Command::Resolve(resolve) => Some(&resolve.key),
            Command::Cleanup(_) => None,
        }
    }
}

/// An event as the rules make it, with times and tokens as the ledger answered them.
struct Modelled {
    event: Event,
    archive: Vec<Attempt>,
    resolutions: Vec<Resolution>,
    duplicates: i64,
    mismatches: i64,
}

#[derive(Default)]
struct Model {
    events: BTreeMap<Key, Modelled>,
    deliveries: BTreeMap<String, Digest>,
    /// The last token that was drawn.
    token: FencingToken,
}

impl Model {
    // === what is asked ===

    /// A command that has a good chance to meet something: few events, few claim ids, tokens that were given out.
    fn command(&self, random: &mut StdRng) -> Command {
        let key = Key {
            tenant: "default".into(),
            provider: "stripe".into(),
            event_id: format!("evt_{}", random.random_range(0..6)),
        };
        let digest = |random: &mut StdRng| Some([random.random_range(1..3); 32]);
        let maybe = |random: &mut StdRng, chance: u32| random.random_range(0..100) < chance;
        let attempts_max = NonZeroU32::new([0, 2, 3, 6][random.random_range(0..4)]);
        if random.random_range(0..500) == 0 {
            return Command::Cleanup(State::ALL.into_iter().filter(|_| random.random_range(0..2) == 0).collect());
        }
        match random.random_range(0..100) {
            0..50 => Command::Claim(Claim {
                key,
                event_type: "paid".into(),
                claim_id: format!("claim-{}", random.random_range(0..40)),
                holder: "pod".into(),
                lock_duration: lock_duration(random),
                fingerprint: if maybe(random, 8) { digest(random) } else { None },
                metadata: maybe(random, 30).then(|| r#"{"a":1,"b":{"c":[null,2]}}"#.into()),
                payload_digest: if maybe(random, 60) { digest(random) } else { None },
                delivery_id: maybe(random, 20).then(|| format!("d-{}", random.random_range(0..12))),
                attempts_max,
                waiting: maybe(random, 20),
            }),
            50..80 => Command::Mark(Mark {
                fencing_token: self.token_of(&key, random),
                claim_id: maybe(random, 30).then(|| self.claim_id_of(&key, random)),
                ending: ending(random),
                result: maybe(random, 50).then(|| result(random.random_range(100..600), b"body")),
                attempts_max,
                key,
            }),
            80..88 => Command::Extend(Extend {
                fencing_token: self.token_of(&key, random),
                claim_id: maybe(random, 30).then(|| self.claim_id_of(&key, random)),
                lock_duration: lock_duration(random),
                key,
            }),
            _ => Command::Resolve(Resolve {
                fencing_token: maybe(random, 40).then(|| self.token_of(&key, random)),
                to: [Resolved::Pending, Resolved::Completed, Resolved::Dead][random.random_range(0..3)],
                force: maybe(random, 40),
                reason: "looked at".into(),
                actor: "amara".into(),
                result: maybe(random, 50).then(|| result(1, b"by hand")),
                key,
            }),
        }
    }

    /// The event's token as a rule, else an earlier one or none that there ever was.
    fn token_of(&self, key: &Key, random: &mut StdRng) -> FencingToken {
        let Some(known) = self.events.get(key) else { return FencingToken(1) };
        match random.random_range(0..10) {
            0..7 => known.event.fencing_token,
            7..9 if !known.archive.is_empty() => {
                known.archive[random.random_range(0..known.archive.len())].fencing_token
            }
            _ => FencingToken(self.token.0 + 1),
        }
    }

    fn claim_id_of(&self, key: &Key, random: &mut StdRng) -> String {
        let latest = self.events.get(key).and_then(|known| known.event.latest.as_ref());
        match latest {
            Some(latest) if random.random_range(0..4) > 0 => latest.claim_id.clone(),
            Some(_) | None => format!("claim-{}", random.random_range(0..40)),
        }
    }

    // === what is answered ===

    async fn run(&mut self, fixture: &Fixture, command: Command) {
        // Locks and pauses last no time or an hour, so that a moment before and after the call see the same.
        let now = fixture.now().await;
        match command {
            Command::Claim(claim) => self.claim(fixture, claim, now).await,
            Command::Mark(mark) => self.mark(fixture, mark).await,
            Command::Extend(extend) => self.extend(fixture, extend).await,
            Command::Resolve(resolve) => self.resolve(fixture, resolve, now).await,
            Command::Cleanup(states) => self.cleanup(fixture, states, now).await,
        }
    }

    async fn claim(&mut self, fixture: &Fixture, claim: Claim, now: Time) {
        let answer = fixture.ledger.claim(claim.clone()).await;
        let known = self.events.get_mut(&claim.key);
        if let (Some(delivery), Some(digest)) = (&claim.delivery_id, claim.payload_digest)
            && *self.deliveries.entry(delivery.clone()).or_insert(digest) != digest
        {
            assert_refused(answer, &Refusal::DeliveryMismatch);
            if let Some(known) = known {
                known.duplicates += 1;
                known.mismatches += 1;
            }
            return;
        }
        let claim_ended =
            known.as_ref().is_some_and(|known| known.archive.iter().any(|attempt| attempt.claim_id == claim.claim_id));
        let step = transition::claim(known.as_ref().map(|known| &known.event), claim_ended, &claim, now);
        if let ClaimStep::Refuse(refusal) = step {
            assert_refused(answer, &refusal);
            let known = known.expect("an absent event is inserted");
            known.duplicates += 1;
            known.mismatches += i64::from(refusal == Refusal::FingerprintMismatch);
            return;
        }
        let answer = answer.unwrap();
        let at = answer.event.update_time;
        let lock_on = |event: &Event| {
            let lock = Lock {
                fencing_token: event.fencing_token,
                attempt: event.attempt_count,
                expire_time: event.latest.as_ref().unwrap().lock_expire_time,
                remaining: Micros::ZERO,
                claim_id: claim.claim_id.clone(),
            };
            Decision::Acquired(lock)
        };
        let Some(known) = known else {
            assert_eq!(step, ClaimStep::Insert);
            let event = inserted(&claim, &answer.event);
            self.token = drawn(self.token, event.fencing_token);
            assert_eq!(decided(&answer.decision), decided(&lock_on(&event)));
            assert!(!answer.payload_changed);
            assert_eq!(comparable(&answer.event), comparable(&event));
            let known = Modelled { event, archive: Vec::new(), resolutions: Vec::new(), duplicates: 0, mismatches: 0 };
            self.events.insert(claim.key, known);
            return;
        };
        let earlier = known.event.latest.as_ref().and_then(|latest| latest.payload_digest);
        let changed = earlier.is_some() && claim.payload_digest.is_some() && earlier != claim.payload_digest;
        let decision = match step {
            ClaimStep::Grant => {
                known.archive(at);
                known.event.latest = Some(attempt_of(&claim, at));
                known.event.fencing_token = answer.event.fencing_token;
                self.token = drawn(self.token, answer.event.fencing_token);
                known.event.attempt_count += 1;
                known.event.fingerprint = known.event.fingerprint.or(claim.fingerprint);
                known.event.result = None;
                known.event.enter(State::Processing, at);
                lock_on(&known.event)
            }
            ClaimStep::Bury => {
                if known.event.state == State::Failed {
                    known.archive(at);
                    known.event.latest = None;
                } else {
                    known.event.latest.as_mut().unwrap().outcome = Outcome::LockExpired;
                }
                known.event.enter(State::Dead, at);
                Decision::Refused
            }
            ClaimStep::Keep(decision) => decision,
            ClaimStep::Insert | ClaimStep::Refuse(_) => unreachable!("taken care of above"),
        };
        assert_eq!(decided(&answer.decision), decided(&decision));
        assert_eq!(answer.payload_changed, changed);
        assert_eq!(comparable(&answer.event), comparable(&known.event));
        let waits_on = claim.waiting && matches!(decision, Decision::InProgress { .. });
        if !waits_on {
            known.duplicates += i64::from(!matches!(decision, Decision::Acquired(_)));
            known.mismatches += i64::from(changed);
        }
    }

    async fn mark(&mut self, fixture: &Fixture, mark: Mark) {
        let answer = fixture.ledger.mark(mark.clone()).await;
        let known = self.events.get_mut(&mark.key);
        let archived = known
            .as_ref()
            .and_then(|known| known.archive.iter().find(|attempt| attempt.fencing_token == mark.fencing_token));
        let step = transition::mark(known.as_ref().map(|known| &known.event), archived, &mark);
        let state = match step {
            MarkStep::Refuse(refusal) => return assert_refused(answer, &refusal),
            MarkStep::Repeated => None,
            MarkStep::Apply(state) => Some(state),
        };
        let (answer, known) = (answer.unwrap(), known.expect("a mark that is not refused has an event"));
        assert_eq!(answer.repeated, state.is_none());
        if let Some(state) = state {
            let at = answer.event.update_time;
            let event = &mut known.event;
            event.enter(state, at);
            event.latest.as_mut().unwrap().outcome = mark.ending.outcome();
            event.result = mark.result;
            match mark.ending {
                Ending::Completed { metadata } => {
                    if let Some(addition) = metadata {
                        event.completion_metadata = Some(united(event.completion_metadata.as_deref(), &addition));
                    }
                }
                Ending::Failed { error, retry_after, .. } => {
                    event.last_error = error;
                    event.retry_time = transition::retry_time(state, retry_after, at);
                }
            }
        }
        assert_eq!(comparable(&answer.event), comparable(&known.event));
    }

    async fn extend(&mut self, fixture: &Fixture, extend: Extend) {
        let answer = fixture.ledger.extend(extend.clone()).await;
        let known = self.events.get_mut(&extend.key);
        if let ExtendStep::Refuse(refusal) = transition::extend(known.as_ref().map(|known| &known.event), &extend) {
            return assert_refused(answer, &refusal);
        }
        let (answer, event) = (answer.unwrap(), &mut known.expect("a lock is on an event").event);
        // The answer is a lock, and does not tell when it was given.
        let at = fixture.event(&extend.key).await.update_time;
        event.update_time = at;
        let latest = event.latest.as_mut().unwrap();
        latest.lock_expire_time = latest.lock_expire_time.max(at.plus(extend.lock_duration));
        assert_eq!(answer.expire_time, latest.lock_expire_time);
        assert_eq!((answer.fencing_token, answer.attempt), (event.fencing_token, event.attempt_count));
    }

    async fn resolve(&mut self, fixture: &Fixture, resolve: Resolve, now: Time) {
        let answer = fixture.ledger.resolve(resolve.clone()).await;
        let known = self.events.get_mut(&resolve.key);
        let last = known.as_ref().and_then(|known| known.resolutions.last());
        let step = transition::resolve(known.as_ref().map(|known| &known.event), last, &resolve, now);
        if let ResolveStep::Refuse(refusal) = step {
            return assert_refused(answer, &refusal);
        }
        let (answer, known) = (answer.unwrap(), known.expect("a decision that is not refused has an event"));
        if step == ResolveStep::Apply {
            let (at, to) = (answer.update_time, resolve.to.state());
            known.archive(at);
            let event = &mut known.event;
            known.resolutions.push(Resolution {
                from_state: event.state,
                to_state: to,
                from_fencing_token: event.fencing_token,
                fencing_token: answer.fencing_token,
                reason: resolve.reason,
                actor: resolve.actor,
                time: at,
            });
            self.token = drawn(self.token, answer.fencing_token);
            event.fencing_token = answer.fencing_token;
            event.latest = None;
            event.result = resolve.result;
            event.enter(to, at);
            if to == State::Pending {
                event.attempts_forgiven = event.attempt_count;
            }
        }
        assert_eq!(comparable(&answer), comparable(&known.event));
    }

    async fn cleanup(&mut self, fixture: &Fixture, mut states: Vec<State>, now: Time) {
        if fixture.is_cached {
            // Cleanup cannot undercut the minimum retention, which every entry of a completed event ends before (C2).
            states.retain(|state| *state != State::Completed);
        }
        let goes =
            |event: &Event| states.contains(&event.state) && !matches!(event.state, State::Pending | State::Processing);
        let going: Vec<Key> =
            self.events.values().filter(|known| goes(&known.event)).map(|known| known.event.key.clone()).collect();
        for key in &going {
            // Counts that are still in memory would go to the event that comes after it.
            let known = &self.events[key];
            fixture.counted(key, known.duplicates, known.mismatches).await;
        }
        let scope = CleanupScope {
            tenant: None,
            provider: None,
            // What has ended by now ended before this.
            before: now.plus(Micros(1)),
            states,
            dry_run: false,
            batch_size: 2,
        };
        let mut progress = CleanupProgress::default();
        while !progress.done {
            fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        }
        let deleted: i64 = progress.providers.values().map(|totals| totals.deleted).sum();
        assert_eq!(usize::try_from(deleted).unwrap(), going.len());
        self.events.retain(|key, _| !going.contains(key));
        self.deliveries.clear();
    }

    // === what is kept ===

    /// How an event stands, or how many there are.
    fn standing(&self, number: usize, key: Option<&Key>) -> String {
        let Some(key) = key else { return format!("{number}: {} events", self.events.len()) };
        let Some(known) = self.events.get(key) else { return format!("{number}: {key:?} is absent") };
        let Event { state, attempt_count, attempts_forgiven, result, last_error, fingerprint, .. } = &known.event;
        let outcomes: Vec<Outcome> =
            known.archive.iter().cloned().chain(known.event.latest_attempt()).map(|attempt| attempt.outcome).collect();
        let (duplicates, mismatches, resolutions) = (known.duplicates, known.mismatches, known.resolutions.len());
        format!(
            "{number}: {key:?} {state} {attempt_count} {attempts_forgiven} {outcomes:?} {result:?} {last_error:?} \
             {fingerprint:?} {duplicates} {mismatches} {resolutions}"
        )
    }

    async fn assert_kept(&self, fixture: &Fixture) {
        for (key, known) in &self.events {
            fixture.counted(key, known.duplicates, known.mismatches).await;
            let history = fixture.history_of(key).await;
            assert_attempts_in_order(&history);
            assert_eq!(comparable(&history.event), comparable(&known.event));
            let attempts: Vec<Attempt> = known.archive.iter().cloned().chain(known.event.latest_attempt()).collect();
            assert_eq!(history.attempts, attempts, "{key:?}");
            assert_eq!(history.resolutions, known.resolutions, "{key:?}");
        }
    }
}

impl Modelled {
    fn archive(&mut self, at: Time) {
        let Some(mut attempt) = self.event.latest_attempt() else { return };
        if attempt.outcome == Outcome::Running {
            attempt.outcome = Outcome::LockExpired;
            attempt.end_time = Some(at);
        }
        self.archive.push(attempt);
    }
}

trait Enter {
    /// Another state, with the times that go with it.
    fn enter(&mut self, state: State, at: Time);
}

impl Enter for Event {
    fn enter(&mut self, state: State, at: Time) {
        self.state = state;
        self.update_time = at;
        self.end_time = matches!(state, State::Completed | State::Unknown | State::Dead).then_some(at);
        self.retry_time = None;
    }
}

fn inserted(claim: &Claim, answered: &Event) -> Event {
    let at = answered.create_time;
    Event {
        row: answered.row,
        key: claim.key.clone(),
        event_type: claim.event_type.clone(),
        state: State::Processing,
        attempt_count: 1,
        attempts_forgiven: 0,
        duplicate_count: 0,
        mismatch_count: 0,
        last_mismatch_time: None,
        fencing_token: answered.fencing_token,
        create_time: at,
        update_time: at,
        end_time: None,
        retry_time: None,
        fingerprint: claim.fingerprint,
        metadata: claim.metadata.clone(),
        completion_metadata: None,
        result: None,
        last_error: None,
        latest: Some(attempt_of(claim, at)),
    }
}

fn attempt_of(claim: &Claim, at: Time) -> Latest {
    Latest {
        claim_id: claim.claim_id.clone(),
        holder: claim.holder.clone(),
        start_time: at,
        lock_expire_time: at.plus(claim.lock_duration),
        outcome: Outcome::Running,
        payload_digest: claim.payload_digest,
    }
}

fn lock_duration(random: &mut StdRng) -> Micros {
    if random.random_range(0..2) == 0 { Micros::ZERO } else { HOUR }
}

fn ending(random: &mut StdRng) -> Ending {
    let kind = match random.random_range(0..9) {
        0..3 => {
            let number: u32 = random.random_range(0..3);
            return Ending::Completed {
                metadata: (number > 0).then(|| format!(r#"{{"b":{number},"n{number}":null}}"#)),
            };
        }
        3..6 => FailureKind::Retryable,
        6 => FailureKind::Terminal,
        _ => FailureKind::Unknown,
    };
    Ending::Failed {
        kind,
        error: (random.random_range(0..2) == 0).then(|| "refused".into()),
        retry_after: [None, Some(Micros::ZERO), Some(HOUR)][random.random_range(0..3)],
    }
}

/// One object of both, the later one's values first.
fn united(earlier: Option<&str>, later: &str) -> String {
    let mut object: BTreeMap<String, serde_json::Value> =
        earlier.map(|earlier| serde_json::from_str(earlier).unwrap()).unwrap_or_default();
    object.extend(serde_json::from_str::<BTreeMap<_, _>>(later).unwrap());
    serde_json::to_string(&object).unwrap()
}

/// A decision without what depends on the moment.
fn decided(decision: &Decision) -> Decision {
    match decision {
        Decision::Acquired(lock) => Decision::Acquired(Lock { remaining: Micros::ZERO, ..lock.clone() }),
        Decision::InProgress { .. } => Decision::InProgress { retry_after: Micros::ZERO },
        Decision::AlreadyCompleted => Decision::AlreadyCompleted,
        Decision::Refused => Decision::Refused,
    }
}

fn drawn(last: FencingToken, token: FencingToken) -> FencingToken {
    assert!(token > last, "token {token} after {last}");
    token
}

fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Error>, refusal: &Refusal) {
    match answer {
        Err(Error::Refused(given)) => assert_eq!(given, *refusal),
        other => panic!("not refused as {refusal:?}: {other:?}"),
    }
}
