//! The cache of completed events: makes duplicates cheap, and can do nothing else (C1, I9).
//!
//! Two layers. The process's own is bounded and its entries live a minute at most. Redis, where it is configured, is
//! shared by all sidecars of one database. Both say one thing only: this event is completed, with this token and result.
//! Whatever else comes of a look-up (a miss, an error, a time-out, a value that does not verify, a claim that is not a
//! plain duplicate) means: ask the ledger.
//!
//! Why it cannot be wrong for long: an entry is written after the commit is acknowledged (C2), by compare-and-set on the
//! token; a completed event changes only by Resolve, which draws a higher token and writes a tombstone with it. Entries
//! are keyed by the database's identity and timeline and carry a MAC whose key lives in the database (C3), and answer only
//! while the ledger's connection stands on that identity (C6). What was replayed is read from the ledger again and again, and
//! no entry from before a replay is believed, wherever it comes from ([`replays`], C7).

pub mod entry;
mod memory;
mod redis;
mod replays;
pub mod stats;
mod worth;

use std::{
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::{Duration, Instant},
};

use tokio::sync::watch;

pub use self::{
    entry::Entry,
    redis::{RedisOptions, RedisOptionsError, RedisUrlError},
    replays::BEHIND_MAX,
};
use self::{
    entry::{Codec, Completion, DecodeError},
    memory::{Found, Memory},
    redis::Redis,
    replays::Replays,
    stats::CacheStats,
    worth::Worth,
};
use crate::{
    event::{Claim, Claimed, Decision, Event, FencingToken, Key, KeyDigest, Micros, Payload, State, Time},
    ledger::{Replayed, Standing, filter::RETENTION_MIN},
};

/// The longest that Redis keeps an entry (C2).
const REDIS_ENTRY_AGE_MAX: Micros = Micros(7 * Micros::DAY.0);
/// An entry ends this long before Cleanup may delete its event (C2).
const RETENTION_MARGIN: Micros = Micros::HOUR;

/// How often a tombstone that Redis did not take is tried again.
const TOMBSTONE_INTERVAL: Duration = Duration::from_millis(500);

/// How the cache works.
#[derive(Clone, Debug)]
pub struct CacheSettings {
    /// The most that the process's own layer holds, in bytes. 0: it holds nothing.
    pub memory_bytes_max: u64,
    /// Redis, if there is one.
    pub redis: Option<RedisOptions>,
    /// The minimum retention, which Cleanup cannot undercut.
    pub retention_min: Duration,
}

impl Default for CacheSettings {
    fn default() -> Self {
        CacheSettings { memory_bytes_max: 32 << 20, redis: None, retention_min: RETENTION_MIN }
    }
}

/// What the layers are keyed by now; another one when the ledger's connection is made anew.
struct Epoch {
    standing: Standing,
    codec: Codec,
    /// What was replayed in the database that it stands on.
    replays: RwLock<Replays>,
}

impl Epoch {
    fn new(standing: Standing) -> Epoch {
        Epoch { codec: Codec::new(&standing), standing, replays: RwLock::default() }
    }

    fn replays(&self) -> RwLockReadGuard<'_, Replays> {
        self.replays.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_replays(&self, change: impl FnOnce(&mut Replays)) {
        change(&mut self.replays.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A read of what was replayed, about to begin.
pub(crate) struct Reading {
    epoch: Arc<Epoch>,
    began: Instant,
}

impl Reading {
    /// What to read from.
    pub(crate) fn standing(&self) -> &Standing {
        &self.epoch.standing
    }

    /// Where to read on, as an earlier read has told.
    pub(crate) fn after(&self) -> Option<Arc<str>> {
        self.epoch.replays().bookmark()
    }
}

/// See the module.
pub struct Cache {
    memory: Memory,
    redis: Option<Redis>,
    /// Whether it is worth asking.
    worth: Worth,
    standing: watch::Receiver<Option<Standing>>,
    /// Read-locked while an entry is put into memory, write-locked while memory is emptied: no entry of an old epoch
    /// can slip in behind the emptying.
    epoch: RwLock<Option<Arc<Epoch>>>,
    /// How long after its event's end an entry may be believed (C2).
    entry_life: Micros,
    stats: Arc<CacheStats>,
}

/// A look-up that may be followed by a fill.
#[derive(Clone)]
pub struct Ticket {
    /// As it stood when the ledger was asked.
    epoch: Option<Arc<Epoch>>,
    digest: KeyDigest,
    /// Redis might have answered, but was not worth asking.
    unasked: bool,
}

impl Ticket {
    /// The digest of the event that it is about.
    pub fn digest(&self) -> KeyDigest {
        self.digest
    }
}

impl Cache {
    /// A cache for a ledger that stands on what `standing` tells.
    ///
    /// # Errors
    /// When the URL of Redis cannot be used. A Redis that cannot be reached is no error (C4).
    pub fn new(settings: &CacheSettings, standing: watch::Receiver<Option<Standing>>) -> Result<Cache, RedisUrlError> {
        let stats = Arc::new(CacheStats::default());
        let redis = match &settings.redis {
            Some(options) => Some(Redis::start(options, stats.clone())?),
            None => None,
        };
        Ok(Cache {
            memory: Memory::new(settings.memory_bytes_max),
            redis,
            worth: Worth::default(),
            standing,
            epoch: RwLock::new(None),
            entry_life: Micros(REDIS_ENTRY_AGE_MAX.0.min(Micros::from(settings.retention_min).0 - RETENTION_MARGIN.0)),
            stats,
        })
    }

    /// Whether there is a Redis that is not asked, because it does not answer.
    pub(crate) fn is_redis_left_alone(&self) -> bool {
        self.redis.as_ref().is_some_and(Redis::is_left_alone)
    }

    /// What the layers have done so far.
    pub fn stats(&self) -> Arc<CacheStats> {
        self.stats.clone()
    }

    /// The epoch of the ledger's connection as it stands; None while it is down, and then nothing is answered.
    fn epoch(&self) -> Option<Arc<Epoch>> {
        let standing = self.standing.borrow();
        {
            let known = self.epoch.read().unwrap_or_else(PoisonError::into_inner);
            if known.as_ref().map(|epoch| &epoch.standing) == standing.as_ref() {
                return known.clone();
            }
        }
        let standing = standing.clone();
        let mut epoch = self.epoch.write().unwrap_or_else(PoisonError::into_inner);
        if epoch.as_ref().map(|epoch| &epoch.standing) != standing.as_ref() {
            // The connection was made anew: whatever was cached may belong to a past that is no more (C6).
            self.memory.clear();
            *epoch = standing.map(|standing| Arc::new(Epoch::new(standing)));
        }
        epoch.clone()
    }

    /// Looks up whether a claim is a plain duplicate of a completed event. The ticket is for [`Cache::told`], when
    /// the ledger had to be asked.
    pub async fn look_up(&self, claim: &Claim) -> (Option<Completion>, Ticket) {
        let mut ticket = self.ticket(&claim.key);
        let Some(epoch) = &ticket.epoch else { return (None, ticket) };
        // A delivery id is compared by the ledger, whatever the event.
        if claim.delivery_id.is_some() {
            return (None, ticket);
        }
        // Before anything is looked up: what was acknowledged until shortly before this moment is known from here on (C7).
        let began = Instant::now();
        let Some(now) = epoch.replays().now(began) else {
            self.stats.unsure.add();
            return (None, ticket);
        };
        let digest = ticket.digest;
        match self.in_memory(epoch, digest, claim, began) {
            Found::Duplicate(completion) => return (Some(completion), ticket),
            Found::Referred => {
                self.stats.memory_referred.add();
                return (None, ticket);
            }
            Found::Nothing => self.stats.memory_misses.add(),
        }
        let Some(redis) = &self.redis else { return (None, ticket) };
        if !self.worth.is_enough() {
            self.stats.redis_unasked.add();
            ticket.unasked = true;
            return (None, ticket);
        }
        let answer = self.in_redis(redis, epoch, claim, digest, began, now).await;
        self.worth.saw(answer.is_some());
        // The connection may have gone while Redis was asked.
        let answer = answer.filter(|_| self.still(epoch));
        (answer, ticket)
    }

    /// What Redis has to say to a claim. `now` is `began` by the database's clock.
    async fn in_redis(
        &self,
        redis: &Redis,
        epoch: &Arc<Epoch>,
        claim: &Claim,
        digest: KeyDigest,
        began: Instant,
        now: Time,
    ) -> Option<Completion> {
        let value = redis.get(epoch.codec.name(digest), began).await?;
        let entry = match epoch.codec.decode(digest, &value) {
            Ok(entry) => entry,
            Err(error) => {
                self.not_ours(error);
                return None;
            }
        };
        let holds = entry.holds(epoch.replays().replayed(digest), now, self.entry_life);
        let answer = entry.answer(claim).filter(|_| holds);
        if answer.is_some() {
            self.stats.redis_hits.add();
            self.keep(epoch, digest, &entry);
        } else {
            self.stats.redis_misses.add();
            if entry.tombstone || !holds {
                self.stats.voided.add();
            }
        }
        answer
    }

    /// A value that is forged, stale, or of another version: a miss like any other, but one that somebody should see.
    fn not_ours(&self, error: DecodeError) {
        self.stats.redis_invalid.add();
        match error {
            DecodeError::Malformed => self.stats.redis_invalid_malformed.add(),
            DecodeError::Tag => self.stats.redis_invalid_unverified.add(),
            DecodeError::Version => self.stats.redis_invalid_version.add(),
        }
        tracing::debug!(error = &error as &dyn std::error::Error, "a value in Redis is not ours");
    }

    /// The same in the process's own layer alone, and at once, for a claim that says nothing but its payload. A miss is not
    /// counted: the look-up that follows it is.
    pub(crate) fn has_duplicate(&self, key: &Key, payload: Payload<'_>, now: Instant) -> bool {
        let Some(epoch) = self.epoch() else { return false };
        // C7, as above.
        if epoch.replays().now(now).is_none() {
            return false;
        }
        let digest = KeyDigest::of(key);
        self.memory.duplicated(digest, payload, now).is_some_and(|token| self.confirm(&epoch, digest, token))
    }

    /// What the process's own layer has to say to a claim, if it still stands.
    fn in_memory(&self, epoch: &Epoch, digest: KeyDigest, claim: &Claim, now: Instant) -> Found {
        match self.memory.answer(digest, claim, now) {
            // Redis may have a later one.
            Found::Duplicate(completion) if !self.confirm(epoch, digest, completion.fencing_token) => Found::Nothing,
            found => found,
        }
    }

    /// Whether what the process's own layer answers still stands: the event was not replayed after this token. Counts it as a
    /// hit, or drops it.
    fn confirm(&self, epoch: &Epoch, digest: KeyDigest, fencing_token: FencingToken) -> bool {
        let stands = fencing_token > epoch.replays().replayed(digest);
        if stands {
            self.stats.memory_hits.add();
        } else {
            self.stats.voided.add();
            self.memory.forget(digest);
        }
        stands
    }

    fn still(&self, epoch: &Epoch) -> bool {
        self.standing.borrow().as_ref() == Some(&epoch.standing)
    }

    /// What the ledger answered to a claim that was looked up before.
    pub fn told(&self, ticket: &Ticket, claimed: &Claimed) {
        let completed = claimed.decision == Decision::AlreadyCompleted;
        if ticket.unasked {
            self.worth.saw(completed);
        }
        if completed {
            self.fill(ticket, &claimed.event, claimed.now);
        }
    }

    /// Keeps a completed event, as the ledger told it at `now` of its clock, after the commit was acknowledged.
    pub fn fill(&self, ticket: &Ticket, event: &Event, now: Time) {
        let Some(epoch) = &ticket.epoch else { return };
        if event.state != State::Completed || !self.still(epoch) {
            return;
        }
        let Some(entry) = Entry::completed(event) else { return };
        let life = Micros(self.entry_life.0.saturating_sub(now.since(entry.end_time).0));
        if life.0 <= 0 {
            // Cleanup may soon delete the event. The process's own layer asks for no age when it answers: its entries live for
            // a minute, and the margin is an hour.
            return;
        }
        let digest = ticket.digest;
        if let Some(redis) = &self.redis {
            redis.put(epoch.codec.name(digest), epoch.codec.encode(digest, &entry), life);
        }
        self.keep(epoch, digest, &entry);
    }

    /// A ticket for a fill without a look-up before it: a Mark's.
    pub fn ticket(&self, key: &Key) -> Ticket {
        Ticket { epoch: self.epoch(), digest: KeyDigest::of(key), unasked: false }
    }

    /// An operator has decided on the event: this process answers nothing from before any more. Others hear of it, or read it
    /// within [`BEHIND_MAX`]; until then a tombstone in Redis keeps them from believing what stands there. Waits for that, for
    /// 200 ms at most; where it fails it is tried in the background until nobody needs it any more.
    pub async fn resolved(self: &Arc<Self>, event: &Event) {
        let digest = KeyDigest::of(&event.key);
        self.void(digest, event.fencing_token);
        let (Some(redis), Some(epoch)) = (&self.redis, self.epoch()) else { return };
        // With the higher token, and never a DEL: a slow writer could put the old entry back (C2).
        let entry = Entry::tombstone(event.fencing_token, event.update_time);
        let (name, value) = (epoch.codec.name(digest), epoch.codec.encode(digest, &entry));
        if redis.put_now(&name, &value, REDIS_ENTRY_AGE_MAX).await {
            return;
        }
        tracing::warn!("redis does not take the tombstone of a resolved event; trying for as long as it matters");
        let (cache, until) = (self.clone(), Instant::now() + BEHIND_MAX);
        tokio::spawn(async move {
            let Some(redis) = &cache.redis else { return };
            while Instant::now() < until && !redis.is_closing() {
                tokio::time::sleep(TOMBSTONE_INTERVAL).await;
                if redis.put_now(&name, &value, REDIS_ENTRY_AGE_MAX).await {
                    return;
                }
            }
        });
    }

    /// An operator has decided on the event, here or in another process: what is known of it up to this token is void.
    pub fn void(&self, digest: KeyDigest, fencing_token: FencingToken) {
        // Without a connection nothing is answered, and what is read with the next one has it.
        if let Some(epoch) = self.epoch() {
            epoch.change_replays(|replays| replays.raise(digest, fencing_token));
        }
        self.memory.forget(digest);
    }

    /// Begins to read what was replayed; None while the ledger's connection is down.
    pub(crate) fn reading(&self) -> Option<Reading> {
        let began = Instant::now();
        Some(Reading { epoch: self.epoch()?, began })
    }

    /// What was read. The cache answers for [`BEHIND_MAX`] from the moment when that began.
    pub(crate) fn read(&self, reading: &Reading, replayed: Replayed) {
        reading.epoch.change_replays(|replays| replays.add(reading.began, replayed));
    }

    /// Empties the process's own layer.
    pub fn clear(&self) {
        self.memory.clear();
    }

    fn keep(&self, epoch: &Arc<Epoch>, digest: KeyDigest, entry: &Entry) {
        let current = self.epoch.read().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, epoch)) {
            self.memory.put(digest, entry);
        }
    }

    /// Ends the connections to Redis.
    pub async fn close(&self) {
        if let Some(redis) = &self.redis {
            redis.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::{
        cache::stats::Counter,
        event::{RowId, fixture::claim},
    };

    const NOW: Time = Time(1_700_000_000_000_000);
    const HOUR: Micros = RETENTION_MARGIN;

    /// An event that was completed so long ago, as the ledger answers a duplicate of it.
    fn completed(event_id: &str, age: Micros) -> Claimed {
        let end_time = NOW.minus(age);
        let event = Event {
            state: State::Completed,
            end_time: Some(end_time),
            ..Event::inserted(&claim(event_id, "first"), RowId(1), FencingToken(1), end_time)
        };
        Claimed { decision: Decision::AlreadyCompleted, granted: false, event, payload_changed: false, now: NOW }
    }

    /// A cache that has not read what was replayed.
    fn unread(retention_min: Duration) -> Cache {
        let standing = Standing { identity: "here".into(), generation: 1, cache_key: [7].as_slice().into() };
        let (_, standing) = watch::channel(Some(standing));
        Cache::new(&CacheSettings { retention_min, ..CacheSettings::default() }, standing).unwrap()
    }

    /// A cache that has, and will not again for long.
    fn cache(retention_min: Duration) -> Cache {
        let cache = unread(retention_min);
        let reading = cache.reading().unwrap();
        cache.read(&reading, Replayed { now: NOW, events: Vec::new(), floor: FencingToken::NONE, bookmark: None });
        cache
    }

    /// C7: it is the same question, without the layer that has to be waited for.
    #[test]
    fn what_is_at_hand_is_what_a_look_up_answers() {
        let second = claim("evt_1", "second");
        let filled = |cache: &Cache| {
            let (_, ticket) = cache.look_up(&second).now_or_never().expect("nobody else is asked");
            cache.told(&ticket, &completed("evt_1", Micros(0)));
        };
        let agree = |cache: &Cache, claim: &Claim, known: bool| {
            // First: the look-up lets go of what is void.
            let payload = Payload { bytes: b"payload", digest: &|| [3; 32] };
            let at_hand = cache.has_duplicate(&claim.key, payload, Instant::now());
            let (looked_up, _) = cache.look_up(claim).now_or_never().expect("nobody else is asked");
            assert_eq!((at_hand, looked_up.is_some()), (known, known), "{claim:?}");
        };
        let cache = cache(Duration::from_secs(6 * 86_400));
        agree(&cache, &second, false);
        filled(&cache);
        agree(&cache, &second, true);
        agree(&cache, &claim("evt_2", "second"), false);
        cache.void(KeyDigest::of(&second.key), FencingToken(1));
        filled(&cache);
        agree(&cache, &second, false);
        // Nothing is read of what was replayed.
        let unread = unread(Duration::from_secs(6 * 86_400));
        filled(&unread);
        agree(&unread, &second, false);
    }

    #[test]
    fn a_look_up_of_a_known_event_that_only_the_ledger_can_answer_is_counted_as_referred() {
        let cache = cache(Duration::from_secs(6 * 86_400));
        let look_up = |claim: &Claim| cache.look_up(claim).now_or_never().expect("nobody else is asked");
        let (_, ticket) = look_up(&claim("evt_1", "second"));
        cache.told(&ticket, &completed("evt_1", Micros(0)));
        let counts =
            || [&cache.stats.memory_hits, &cache.stats.memory_misses, &cache.stats.memory_referred].map(Counter::get);
        assert_eq!(counts(), [0, 1, 0]);
        // A late copy of the call that completed it.
        assert!(look_up(&claim("evt_1", "first")).0.is_none());
        assert_eq!(counts(), [0, 1, 1]);
        assert!(look_up(&claim("evt_1", "second")).0.is_some());
        assert_eq!(counts(), [1, 1, 1]);
        // It has none of its own to compare with.
        assert!(look_up(&Claim { fingerprint: Some([9; 32]), ..claim("evt_1", "second") }).0.is_some());
        // Which delivery it is is compared by the ledger, whatever is known of the event.
        assert!(look_up(&Claim { delivery_id: Some("d".into()), ..claim("evt_1", "second") }).0.is_none());
        assert_eq!(counts(), [2, 1, 1]);
    }

    /// C2: what the process itself holds is bound by it too, or a sidecar would call completed for a minute what Cleanup has
    /// deleted.
    #[test]
    fn an_event_that_cleanup_may_delete_soon_is_not_kept_in_memory() {
        let day = Micros::DAY;
        for (event_id, age, is_kept) in [
            ("new", Micros(0), true),
            ("of_an_hour", HOUR, true),
            ("almost", Micros(6 * day.0 - HOUR.0 - 1), true),
            ("at_the_margin", Micros(6 * day.0 - HOUR.0), false),
            ("at_the_end", Micros(6 * day.0), false),
            ("old", Micros(30 * day.0), false),
        ] {
            let cache = cache(Duration::from_secs(6 * 86_400));
            let look_up = |claim_id| {
                let claim = claim(event_id, claim_id);
                let (found, ticket) = cache.look_up(&claim).now_or_never().expect("nobody else is asked");
                (found.is_some(), ticket)
            };
            let (found, ticket) = look_up("second");
            assert!(!found, "{event_id}");
            cache.told(&ticket, &completed(event_id, age));
            assert_eq!(look_up("third").0, is_kept, "{event_id}");
        }
    }
}
