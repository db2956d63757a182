//! Rate limits per second or minute for each of many keys: a bucket each, in bounded memory.

use std::{
    borrow::Borrow,
    collections::HashMap,
    hash::Hash,
    num::NonZeroU32,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A full table is searched for buckets that have filled up again at most this often: it is full because somebody makes
/// up keys, and otherwise each of those would cost a scan of the whole table.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);

/// The buckets. Each is full at first, holds what may be taken in one period, and refills evenly.
///
/// Those that have filled up again are dropped when room is needed. If that is not enough, new keys share one bucket, so
/// that made-up keys take no memory; keys that have a bucket keep it.
#[derive(Debug)]
pub struct Buckets<K> {
    /// How long a bucket takes to fill by one.
    interval: Duration,
    /// How long it takes to fill.
    period: Duration,
    keys_max: usize,
    table: Mutex<Table<K>>,
}

#[derive(Debug)]
struct Table<K> {
    /// When each bucket will be full; one that is full needs no entry.
    full_at: HashMap<K, Instant>,
    /// The same for the bucket that new keys share.
    shared_full_at: Option<Instant>,
    swept: Option<Instant>,
    #[cfg(test)]
    sweeps: usize,
}

impl<K: Hash + Eq> Buckets<K> {
    /// Allows `count` per period, and as many at once, for each of `keys_max` keys.
    #[must_use]
    pub fn new(count: NonZeroU32, period: Duration, keys_max: usize) -> Self {
        let table = Table {
            full_at: HashMap::new(),
            shared_full_at: None,
            swept: None,
            #[cfg(test)]
            sweeps: 0,
        };
        let interval = period / count.get();
        // Not the period given: if it does not divide evenly, a bucket would be larger or smaller than stated.
        Self { interval, period: interval * count.get(), keys_max, table: Mutex::new(table) }
    }

    /// Takes one from the key's bucket.
    ///
    /// # Errors
    ///
    /// The bucket is empty; holds the time until one can be taken.
    pub fn take<Q>(&self, key: &Q) -> Result<(), Duration>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        self.take_at(key, Instant::now())
    }

    fn take_at<Q>(&self, key: &Q, now: Instant) -> Result<(), Duration>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        let mut table = self.table();
        if let Some(full_at) = table.full_at.get_mut(key) {
            *full_at = self.taken(*full_at, now)?;
        } else if table.has_room(self.keys_max, now) {
            let full_at = self.taken(now, now)?;
            table.full_at.insert(key.to_owned(), full_at);
        } else {
            let full_at = table.shared_full_at.unwrap_or(now);
            table.shared_full_at = Some(self.taken(full_at, now)?);
        }
        Ok(())
    }

    /// When the bucket will be full if one is taken now.
    fn taken(&self, full_at: Instant, now: Instant) -> Result<Instant, Duration> {
        let full_at = full_at.max(now) + self.interval;
        let missing = full_at - now;
        if missing > self.period { Err(missing - self.period) } else { Ok(full_at) }
    }

    fn table(&self) -> MutexGuard<'_, Table<K>> {
        // Nothing is left half done where it could panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq> Table<K> {
    fn has_room(&mut self, keys_max: usize, now: Instant) -> bool {
        if self.full_at.len() < keys_max {
            return true;
        }
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP_PAUSE) {
            return false;
        }
        self.swept = Some(now);
        #[cfg(test)]
        {
            self.sweeps += 1;
        }
        self.full_at.retain(|_, full_at| *full_at > now);
        self.full_at.len() < keys_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(count: u32, keys_max: usize) -> Buckets<String> {
        Buckets::new(NonZeroU32::new(count).unwrap(), Duration::from_secs(60), keys_max)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_key_uses_up_its_own_bucket_which_fills_evenly_and_nobody_elses() {
        let (buckets, now) = (buckets(3, 10), Instant::now());
        assert!((0..3).all(|_| buckets.take_at("eager", now).is_ok()));
        assert_eq!(buckets.take_at("eager", now), Err(20 * SECOND));
        assert_eq!(buckets.take_at("other", now), Ok(()));
        // A refusal takes nothing.
        assert_eq!(buckets.take_at("eager", now + 15 * SECOND), Err(5 * SECOND));
        assert_eq!(buckets.take_at("eager", now + 20 * SECOND), Ok(()));
        assert_eq!(buckets.take_at("eager", now + 20 * SECOND), Err(20 * SECOND));
        // No more than a bucket holds, however long it was left alone.
        assert!((0..3).all(|_| buckets.take_at("eager", now + 900 * SECOND).is_ok()));
        assert_eq!(buckets.take_at("eager", now + 900 * SECOND), Err(20 * SECOND));
        // A time read earlier than another caller's.
        assert_eq!(buckets.take_at("other", now - SECOND), Ok(()));
    }

    #[test]
    fn a_known_key_keeps_its_bucket_when_made_up_ones_fill_the_table() {
        let (buckets, now) = (buckets(2, 100), Instant::now());
        assert_eq!(buckets.take_at("known", now), Ok(()));
        let refused = (0..1_000).filter(|number| buckets.take_at(&format!("{number}"), now).is_err()).count();
        // 99 have a bucket of their own; the others share one of two.
        assert_eq!((refused, buckets.table().full_at.len()), (1_000 - 99 - 2, 100));
        assert_eq!(buckets.take_at("known", now), Ok(()), "the shared bucket is empty, its own is not");
        assert_eq!(buckets.take_at("known", now), Err(30 * SECOND));
        assert_eq!(buckets.take_at("0", now), Ok(()));
        assert_eq!(buckets.take_at("new", now), Err(30 * SECOND));
        // Most have filled up again: there is room.
        let later = now + 30 * SECOND;
        assert!((0..2).all(|_| buckets.take_at("new", later).is_ok()));
        assert_eq!(buckets.table().full_at.len(), 3);
    }

    #[test]
    fn a_full_table_is_searched_once_a_second_and_not_for_whom_it_knows() {
        let (buckets, now) = (buckets(1, 100), Instant::now());
        for number in 0..100 {
            assert_eq!(buckets.take_at(&format!("{number}"), now), Ok(()));
        }
        assert_eq!(buckets.table().sweeps, 0);
        for call in 0..1_000 {
            let _ = buckets.take_at(&format!("{call}"), now + SECOND / 2);
        }
        assert_eq!(buckets.table().sweeps, 1);
        for call in 0..1_000 {
            let _ = buckets.take_at(&format!("{call}"), now + SECOND / 2 + SECOND * (call / 500));
        }
        assert_eq!(buckets.table().sweeps, 2);
    }
}
