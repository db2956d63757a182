//! How long events took from lock to completion, as a histogram that can be added up (L5).
//!
//! 32 buckets a doubling: the middle of a bucket is never further than 1/64 (1.6 %) from any value in it. A bucket's number
//! is fixed by two constants, so that what is stored is plain numbers, which the ledgers add up themselves.

use std::{
    collections::{BTreeMap, HashMap},
    sync::LazyLock,
};

use histogram::{Config, Histogram};

use super::place::Place;
use crate::event::{Event, Micros, Outcome, State, Time};

/// Buckets a doubling, as a power of two.
const GROUPING_POWER: u8 = 5;
/// Times from this power of two on, in microseconds (12.7 days), count as just below it.
const MAX_POWER: u8 = 40;

static CONFIG: LazyLock<Config> =
    LazyLock::new(|| Config::new(GROUPING_POWER, MAX_POWER).expect("the constants make a valid histogram"));

/// The processing time of a completion that was just recorded on an event: from the grant of the attempt that completed it.
/// None: the event is not completed, or was completed by hand.
pub(crate) fn processing_time(event: &Event) -> Option<Micros> {
    let latest = event.latest.as_ref().filter(|latest| latest.outcome == Outcome::Completed)?;
    let end = event.end_time.filter(|_| event.state == State::Completed)?;
    Some(end.since(latest.start_time))
}

/// A histogram of processing times.
#[derive(Clone, Debug, PartialEq)]
pub struct Timings(Histogram);

impl Default for Timings {
    fn default() -> Self {
        Timings(Histogram::with_config(&CONFIG))
    }
}

impl Timings {
    /// The most that a percentile differs from the time that it stands for, as a share of it. Below 64 µs times are exact.
    pub const ERROR_MAX: f64 = 1.0 / 64.0;

    /// Adds one time.
    pub fn record(&mut self, time: Micros) {
        let most = (1 << MAX_POWER) - 1;
        // In range, so that it cannot fail.
        let _ = self.0.increment(time.0.clamp(0, most).unsigned_abs());
    }

    /// Adds times to a bucket; nothing, where there is no such bucket or the number is negative.
    pub fn add(&mut self, bucket: i16, count: i64) {
        let place = usize::try_from(bucket).ok().and_then(|bucket| self.0.as_mut_slice().get_mut(bucket));
        if let (Some(place), Ok(count)) = (place, u64::try_from(count)) {
            *place += count;
        }
    }

    /// Adds the other's times.
    pub fn merge(&mut self, other: &Timings) {
        // Both have the same buckets, and nobody counts to 2^64: it cannot fail.
        let _ = self.0.checked_add_assign(&other.0);
    }

    /// Adds all times of a sparse one.
    pub fn add_all(&mut self, times: &Sparse) {
        times.buckets.iter().for_each(|(bucket, count)| self.add(*bucket, *count));
    }

    fn clear(&mut self) {
        self.0.as_mut_slice().fill(0);
    }

    /// How many times there are.
    pub fn count(&self) -> u64 {
        self.0.as_slice().iter().sum()
    }

    /// The buckets that have something, in order.
    pub fn buckets(&self) -> impl Iterator<Item = (i16, i64)> {
        (0_i16..)
            .zip(self.0.as_slice())
            .filter(|(_, count)| **count > 0)
            .map(|(bucket, count)| (bucket, i64::try_from(*count).unwrap_or(i64::MAX)))
    }

    /// Their percentiles; None without times.
    pub fn percentiles(&self) -> Option<Percentiles> {
        Some(Percentiles { p50: self.percentile(0.5)?, p95: self.percentile(0.95)?, p99: self.percentile(0.99)? })
    }

    /// The time that this share (0 to 1) of all stays within; None without times.
    pub fn percentile(&self, share: f64) -> Option<Micros> {
        let bucket = self.0.quantile_bucket(share).ok()??;
        Some(Micros(i64::try_from(bucket.start().midpoint(bucket.end())).unwrap_or(i64::MAX)))
    }
}

/// The percentiles of a histogram that are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percentiles {
    /// What half of all times stay within.
    pub p50: Micros,
    /// What 95 % do.
    pub p95: Micros,
    /// What 99 % do.
    pub p99: Micros,
}

/// A histogram of which only buckets that have something take memory, in their order: most have a few dozen of 1,152.
#[derive(Clone, Debug, Default)]
pub struct Sparse {
    buckets: Vec<(i16, i64)>,
    /// Where the last one was added.
    last: usize,
}

impl PartialEq for Sparse {
    fn eq(&self, other: &Self) -> bool {
        self.buckets == other.buckets
    }
}

impl Sparse {
    /// Adds times to a bucket.
    pub fn add(&mut self, bucket: i16, count: i64) {
        // They come in their order, again and again: the place is at the last one or soon after it.
        let from = self.buckets.get(self.last).filter(|(last, _)| *last <= bucket).map_or(0, |_| self.last);
        let later = self.buckets[from..].iter().position(|(later, _)| *later >= bucket);
        self.last = later.map_or(self.buckets.len(), |later| from + later);
        match self.buckets.get_mut(self.last).filter(|(known, _)| *known == bucket) {
            Some((_, known)) => *known += count,
            None => self.buckets.insert(self.last, (bucket, count)),
        }
    }

    /// Adds the other's times to these.
    fn merge(&mut self, other: &Sparse) {
        other.buckets.iter().filter(|(_, count)| *count > 0).for_each(|(bucket, count)| self.add(*bucket, *count));
    }
}

impl From<&Sparse> for Timings {
    fn from(times: &Sparse) -> Self {
        let mut timings = Timings::default();
        timings.add_all(times);
        timings
    }
}

/// The times of a report while they are read. Of a bucket that has all its times only the percentiles are kept: a report may
/// have 1,000 buckets of dozens of providers. Whole histograms are made one at a time: providers are whatever callers name, and
/// there may be tens of thousands.
#[derive(Debug, Default)]
pub(crate) struct Folding {
    open: BTreeMap<(Time, String), Sparse>,
    percentiles: BTreeMap<(Time, String), Percentiles>,
    providers: BTreeMap<String, Sparse>,
    /// The one that is being closed.
    closing: Timings,
}

impl Folding {
    /// The times of a provider in a bucket, to add to.
    pub(crate) fn at(&mut self, bucket: Time, provider: String) -> &mut Sparse {
        self.open.entry((bucket, provider)).or_default()
    }

    /// How many histograms are held, as such or as their percentiles.
    pub(crate) fn len(&self) -> usize {
        self.open.len() + self.percentiles.len()
    }

    /// Closes the buckets before this one, of which no more times come.
    pub(crate) fn close_before(&mut self, bucket: Time) {
        while let Some(first) = self.open.first_entry().filter(|first| first.key().0 < bucket) {
            let (place, times) = first.remove_entry();
            self.close(place, &times);
        }
    }

    fn close(&mut self, place: (Time, String), times: &Sparse) {
        self.closing.clear();
        self.closing.add_all(times);
        let Some(percentiles) = self.closing.percentiles() else { return };
        match self.providers.get_mut(&place.1) {
            Some(all) => all.merge(times),
            None => self.providers.entry(place.1.clone()).or_default().merge(times),
        }
        self.percentiles.insert(place, percentiles);
    }

    /// The percentiles by bucket and provider, and the times of all buckets by provider.
    pub(crate) fn end(mut self) -> (BTreeMap<(Time, String), Percentiles>, BTreeMap<String, Sparse>) {
        while let Some((place, times)) = self.open.pop_first() {
            self.close(place, &times);
        }
        (self.percentiles, self.providers)
    }
}

/// Times that wait to be written, for a ledger that writes them each second. A crash loses that second's.
#[derive(Debug, Default)]
pub(crate) struct PendingTimings {
    /// By tenant and provider, so that the common case looks up without a copy of the names.
    places: HashMap<String, HashMap<String, BTreeMap<Time, Timings>>>,
    count: usize,
}

impl PendingTimings {
    /// The most places that are kept, so that memory stays bounded while the ledger is away. What comes beyond them is lost. A
    /// hundred tenants and providers that catch up on a day take 2,400.
    const PLACES_MAX: usize = 4_096;

    /// Counts the completion that was just recorded on an event, if it was one.
    pub(crate) fn record(&mut self, event: &Event) {
        let Some(time) = processing_time(event) else { return };
        let (tenant, provider, hour) = (&event.key.tenant, &event.key.provider, event.create_time.hour());
        let known = self
            .places
            .get_mut(tenant)
            .and_then(|providers| providers.get_mut(provider))
            .and_then(|hours| hours.get_mut(&hour));
        if let Some(timings) = known {
            timings.record(time);
        } else if self.count < Self::PLACES_MAX {
            self.count += 1;
            let providers = self.places.entry(tenant.clone()).or_default();
            providers.entry(provider.clone()).or_default().entry(hour).or_default().record(time);
        }
    }

    /// Takes everything, in the order of the places (unsorted ones deadlock, L3).
    pub(crate) fn take(&mut self) -> Vec<(Place, Timings)> {
        self.count = 0;
        let mut taken: Vec<(Place, Timings)> = self
            .places
            .drain()
            .flat_map(|(tenant, providers)| {
                providers.into_iter().flat_map(move |(provider, hours)| {
                    let tenant = tenant.clone();
                    hours.into_iter().map(move |(hour, timings)| {
                        (Place { tenant: tenant.clone(), provider: provider.clone(), hour }, timings)
                    })
                })
            })
            .collect();
        taken.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        taken
    }

    /// Puts back what could not be written, as far as there is room.
    pub(crate) fn restore(&mut self, taken: Vec<(Place, Timings)>) {
        for (Place { tenant, provider, hour }, timings) in taken {
            let hours = self.places.entry(tenant).or_default().entry(provider).or_default();
            match hours.get_mut(&hour) {
                Some(known) => known.merge(&timings),
                None if self.count < Self::PLACES_MAX => {
                    self.count += 1;
                    hours.insert(hour, timings);
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_the_stated_error() {
        let mut timings = Timings::default();
        // Every order of magnitude, and more than the most.
        let mut times: Vec<i64> = (0..4_000).map(|n: i64| (1.007_f64.powf(n as f64)) as i64).collect();
        for time in &times {
            timings.record(Micros(*time));
        }
        times.sort_unstable();
        for share in [0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99] {
            let exact = times[((times.len() as f64 * share).ceil() as usize).max(1) - 1] as f64;
            let found = timings.percentile(share).unwrap().0 as f64;
            assert!((found - exact).abs() <= exact * Timings::ERROR_MAX + 1.0, "{share}: {found} for {exact}");
        }
        assert_eq!(timings.count(), 4_000);
    }

    #[test]
    fn adding_up_buckets_is_adding_up_times() {
        let (mut one, mut other, mut both) = (Timings::default(), Timings::default(), Timings::default());
        for time in [0, 1, 63, 64, 65, 1_000, 999_999, i64::MAX] {
            one.record(Micros(time));
            other.record(Micros(time / 3));
            both.record(Micros(time));
            both.record(Micros(time / 3));
        }
        let mut read = Timings::default();
        for (bucket, count) in one.buckets().chain(other.buckets()) {
            read.add(bucket, count);
        }
        assert_eq!(read, both);
        one.merge(&other);
        assert_eq!(one, both);
        // Nothing that a damaged row could hold does harm.
        for (bucket, count) in [(-1, 1), (i16::MAX, 1), (3, -1)] {
            read.add(bucket, count);
        }
        assert_eq!(read, both);
        assert_eq!(Timings::default().percentile(0.5), None);
    }

    #[test]
    fn a_bucket_that_has_all_its_times_is_kept_as_its_percentiles() {
        let times = |number: i64| {
            let mut timings = Timings::default();
            (1..=number).for_each(|time| timings.record(Micros(time * 1_000)));
            timings
        };
        let mut folding = Folding::default();
        for hour in 0..100 {
            for provider in ["paypal", "stripe"] {
                folding.close_before(Time(hour));
                let open = folding.at(Time(hour), provider.into());
                times(hour).buckets().for_each(|(bucket, count)| open.add(bucket, count));
            }
            assert!(folding.open.len() <= 2, "{folding:?}");
        }
        let (percentiles, providers) = folding.end();
        let mut all = Timings::default();
        for hour in 0..100 {
            all.merge(&times(hour));
            let found = percentiles.get(&(Time(hour), "stripe".into())).copied();
            assert_eq!(found, times(hour).percentiles(), "{hour}");
        }
        assert_eq!(percentiles.len(), 2 * 99, "none of those without times");
        assert_eq!(providers.keys().collect::<Vec<_>>(), ["paypal", "stripe"]);
        providers.values().for_each(|times| assert_eq!(Timings::from(times), all));
    }

    #[test]
    fn what_a_provider_takes_is_what_its_times_need() {
        let mut folding = Folding::default();
        for number in 0..28_000 {
            let times = folding.at(Time(0), format!("provider_{number}"));
            // In any order, and twice.
            [509, 190, 771, 190].into_iter().for_each(|bucket| times.add(bucket, 1));
        }
        let (percentiles, providers) = folding.end();
        assert_eq!((percentiles.len(), providers.len()), (28_000, 28_000));
        let expected = Sparse { buckets: vec![(190, 2), (509, 1), (771, 1)], last: 0 };
        let bytes: usize =
            providers.values().map(|times| times.buckets.capacity() * size_of_val(&times.buckets[0])).sum();
        assert!(providers.values().all(|times| *times == expected), "{:?}", providers.first_key_value());
        assert!(bytes <= 28_000 * 64, "{bytes} bytes");
        assert!(percentiles.values().all(|found| Some(*found) == Timings::from(&expected).percentiles()));
    }

    /// The numbers of buckets are stored: were they to change, old rows would mean something else.
    #[test]
    fn the_numbers_of_buckets_never_change() {
        let bucket = |time: i64| {
            let mut timings = Timings::default();
            timings.record(Micros(time));
            timings.buckets().next().unwrap().0
        };
        let times = [0, 63, 64, 1_000, 1_000_000, 300_000_000, 86_400_000_000, i64::MAX];
        assert_eq!(times.map(bucket), [0, 63, 64, 190, 509, 771, 1_032, 1_151]);
    }
}
