//! Compares what Stats answers from with a recount of the rows: counts have to be equal, percentiles within the stated error
//! of the histograms. Both sides are read from one snapshot, beside a running service.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::{filter::Counts, place::Place, timings::Timings};
use crate::event::{Micros, State, Time};

/// What one snapshot says.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// The counts that are kept.
    pub(crate) kept: BTreeMap<Place, Counts>,
    /// The counts that the rows give.
    pub(crate) recounted: BTreeMap<Place, Counts>,
    /// Completions in the rows, and how many processing times are kept of them.
    pub(crate) completions: BTreeMap<Place, Completions>,
    /// The processing times that are kept, of the hours that no Cleanup has passed.
    pub(crate) timings: BTreeMap<Provider, Timings>,
    /// The latest hour that a Cleanup has passed.
    pub(crate) passed_until: Option<Time>,
    /// How many times may be missing.
    pub(crate) missing_max: BTreeMap<Provider, i64>,
}

impl Snapshot {
    /// Takes up the times that are kept of a place, as buckets and how many are in each.
    pub(crate) fn add_times(&mut self, place: Place, buckets: impl IntoIterator<Item = (i16, i64)>) {
        let compared = !self.is_passed(place.hour);
        let mut times = 0_i64;
        for (bucket, count) in buckets {
            times = times.saturating_add(count);
            if compared {
                let of = Provider { tenant: place.tenant.clone(), name: place.provider.clone() };
                self.timings.entry(of).or_default().add(bucket, count);
            }
        }
        let found = self.completions.entry(place).or_default();
        found.times = found.times.saturating_add(times);
    }

    /// Whether a Cleanup has passed the hour. It deletes events and leaves their times until nothing completed is left of the
    /// hour; then it takes all of them, those of completions before a replay included.
    pub(crate) fn is_passed(&self, hour: Time) -> bool {
        self.passed_until.is_some_and(|until| hour <= until)
    }
}

/// Completions of one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Completions {
    /// In the rows, those in the archive included.
    pub(crate) all: i64,
    /// Those of events that are completed by their latest attempt.
    pub(crate) latest: i64,
    /// Their times in the histograms.
    pub(crate) times: i64,
}

/// A provider of a tenant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Provider {
    pub(crate) tenant: String,
    pub(crate) name: String,
}

/// The percentiles that are compared: those of the API.
pub(crate) const SHARES: [f64; 3] = [0.5, 0.95, 0.99];

/// Something that is not as the rows say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Whose.
    pub tenant: String,
    /// Whose.
    pub provider: String,
    /// The hour of creation, or the first one of the day; None for percentiles, which are compared over all hours.
    pub hour: Option<Time>,
    /// What: a state, "duplicates", "retries", "times" (how many processing times there are), "p50", "p95", "p99", or a bucket of
    /// a day's processing times.
    pub what: String,
    /// What Stats says. Microseconds for percentiles.
    pub kept: i64,
    /// What the rows say.
    pub recounted: i64,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} {}: {} kept, {} recounted", self.tenant, self.provider, self.what, self.kept, self.recounted)
    }
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Events in the rows.
    pub events: i64,
    /// Tenants, providers and hours that were compared.
    pub places: usize,
    /// Completions in the rows, and times in the histograms. They may differ without a difference: a Cleanup takes events before
    /// the times of their hour, and on Postgres a process that is killed loses the times of a second.
    pub completions: i64,
    /// See `completions`.
    pub times: i64,
    /// What is not as the rows say. Empty: all is well.
    pub differences: Vec<Difference>,
}

/// Compares the counts, place by place.
pub(crate) fn counts(snapshot: &Snapshot) -> Report {
    let mut report = Report::default();
    let places: BTreeSet<&Place> = snapshot.kept.keys().chain(snapshot.recounted.keys()).collect();
    report.places = places.len();
    for place in places {
        let of = |counts: &BTreeMap<Place, Counts>| counts.get(place).copied().unwrap_or_default();
        let (kept, recounted) = (of(&snapshot.kept), of(&snapshot.recounted));
        report.events += recounted.total();
        let states = State::ALL.iter().zip(kept.states.iter().zip(recounted.states));
        let numbers = states.map(|(state, (kept, recounted))| (state.as_str(), *kept, recounted)).chain([
            ("duplicates", kept.duplicates, recounted.duplicates),
            ("retries", kept.retries, recounted.retries),
        ]);
        report.differences.extend(numbers.filter(|(_, kept, recounted)| kept != recounted).map(
            |(what, kept, recounted)| Difference {
                tenant: place.tenant.clone(),
                provider: place.provider.clone(),
                hour: Some(place.hour),
                what: what.to_owned(),
                kept,
                recounted,
            },
        ));
    }
    report
}

/// A bucket of the processing times of a day that are not the sum of its hours.
pub(crate) fn day(of: Provider, day: Time, bucket: i16, kept: i64, recounted: i64) -> Difference {
    Difference {
        tenant: of.tenant,
        provider: of.name,
        hour: Some(day),
        what: format!("times of the day in bucket {bucket}"),
        kept,
        recounted,
    }
}

/// Compares how many times there are with the completions, place by place.
pub(crate) fn times(report: &mut Report, snapshot: &Snapshot) {
    let mut missing: BTreeMap<Provider, (i64, Vec<Difference>)> = BTreeMap::new();
    for (place, found) in &snapshot.completions {
        report.completions = report.completions.saturating_add(found.all);
        report.times = report.times.saturating_add(found.times);
        let is_passed = snapshot.is_passed(place.hour);
        let least = if is_passed { found.latest } else { found.all };
        // What a Cleanup could not remove because somebody had it in hand is left to the next, with no event and no count.
        let is_left = [&snapshot.recounted, &snapshot.kept]
            .iter()
            .all(|of| of.get(place).is_none_or(|counts| counts.total() == 0));
        let difference = |recounted| Difference {
            tenant: place.tenant.clone(),
            provider: place.provider.clone(),
            hour: Some(place.hour),
            what: "times".to_owned(),
            kept: found.times,
            recounted,
        };
        if found.times > found.all && !is_passed && !is_left {
            report.differences.push(difference(found.all));
        } else if found.times < least {
            let of = Provider { tenant: place.tenant.clone(), name: place.provider.clone() };
            let (count, differences) = missing.entry(of).or_default();
            *count = count.saturating_add(least.saturating_sub(found.times));
            differences.push(difference(least));
        }
    }
    for (of, (count, differences)) in missing {
        if count > snapshot.missing_max.get(&of).copied().unwrap_or_default() {
            report.differences.extend(differences);
        }
    }
}

/// The ranks (from 1) of the rows' times, in order, between which a percentile has to lie when a histogram has `times` of
/// `completions`: those that it lacks may be all the shortest, or all the longest.
pub(crate) fn ranks(share: f64, completions: i64, times: i64) -> (i64, i64) {
    let times = times.min(completions);
    // Exact up to 2^53 completions.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "ranks of rows")]
    let rank = (share * times as f64).ceil() as i64;
    (rank.clamp(1, completions.max(1)), (rank + completions - times).clamp(1, completions.max(1)))
}

/// Compares the percentiles of one provider with the rows' times at [`ranks`], both of the hours that no Cleanup has passed.
pub(crate) fn percentiles(
    report: &mut Report,
    of: &Provider,
    timings: &Timings,
    completions: i64,
    exact: &[(Micros, Micros); SHARES.len()],
) {
    // Without either there is nothing to compare; that one of them is missing, [`times`] says.
    if completions == 0 {
        return;
    }
    for ((share, (lowest, highest)), name) in SHARES.into_iter().zip(exact).zip(["p50", "p95", "p99"]) {
        let Some(kept) = timings.percentile(share) else { continue };
        #[expect(clippy::cast_precision_loss, reason = "an error of a part in 2^53 is nothing")]
        let within = kept.0 as f64 >= lowest.0 as f64 * (1.0 - Timings::ERROR_MAX) - 1.0
            && kept.0 as f64 <= highest.0 as f64 * (1.0 + Timings::ERROR_MAX) + 1.0;
        if !within {
            report.differences.push(Difference {
                tenant: of.tenant.clone(),
                provider: of.name.clone(),
                hour: None,
                what: name.to_owned(),
                kept: kept.0,
                recounted: if kept < *lowest { lowest.0 } else { highest.0 },
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(hour: i64) -> Place {
        Place::at("default", "stripe", Time(hour * Micros::HOUR.0))
    }

    #[test]
    fn a_count_that_differs_is_named() {
        let counts_of = |completed: i64| Counts { states: [0, 0, completed, 0, 0, 0], ..Counts::default() };
        let mut snapshot = Snapshot::default();
        snapshot.kept.insert(place(1), counts_of(5));
        snapshot.recounted.insert(place(1), counts_of(5));
        assert_eq!(counts(&snapshot).differences, []);
        snapshot.kept.insert(place(2), counts_of(3));
        snapshot.recounted.insert(place(3), Counts { retries: 2, ..Counts::default() });
        let report = counts(&snapshot);
        let named: Vec<String> = report.differences.iter().map(ToString::to_string).collect();
        assert_eq!(
            named,
            ["default/stripe completed: 3 kept, 0 recounted", "default/stripe retries: 0 kept, 2 recounted"]
        );
        assert_eq!((report.events, report.places), (5, 3));
    }

    #[test]
    fn lost_times_widen_what_is_tolerated_and_nothing_else_does() {
        assert_eq!(ranks(0.5, 100, 100), (50, 50));
        assert_eq!(ranks(0.99, 100, 97), (97, 100));
        assert_eq!(ranks(0.5, 100, 90), (45, 55));
        assert_eq!(ranks(0.5, 1, 0), (1, 1));
        // More times than completions are a difference, and excuse nothing else.
        assert_eq!(ranks(0.5, 100, 100_100), (50, 50));
        let mut timings = Timings::default();
        timings.record(Micros(1_000_000));
        let of = Provider { tenant: "a".into(), name: "b".into() };
        let compare = |lowest, highest| {
            let mut report = Report::default();
            let exact = [(Micros(lowest), Micros(highest)); 3];
            percentiles(&mut report, &of, &timings, 1, &exact);
            report.differences.len()
        };
        assert_eq!(compare(1_000_000, 1_000_000), 0);
        assert_eq!(compare(1_030_000, 1_030_000), 3);
        assert_eq!(compare(960_000, 960_000), 3);
        assert_eq!(compare(960_000, 1_030_000), 0);
    }

    /// What is complained about of places with so many completions (in all, of latest attempts) and times.
    fn complaints(
        passed_until: Option<i64>,
        missing_max: i64,
        places: &[(i64, (i64, i64), i64)],
    ) -> Vec<(i64, i64, i64)> {
        let mut snapshot = Snapshot { passed_until: passed_until.map(|hour| place(hour).hour), ..Snapshot::default() };
        snapshot.missing_max.insert(Provider { tenant: "default".into(), name: "stripe".into() }, missing_max);
        for (hour, (all, latest), times) in places {
            if *all > 0 {
                let counts = Counts { states: [0, 0, *latest, 0, 0, all - latest], ..Counts::default() };
                snapshot.recounted.insert(place(*hour), counts);
            }
            snapshot.completions.insert(place(*hour), Completions { all: *all, latest: *latest, times: 0 });
            snapshot.add_times(place(*hour), [(7, *times)]);
        }
        let mut report = Report::default();
        times(&mut report, &snapshot);
        let hour = |difference: &Difference| difference.hour.unwrap().0 / Micros::HOUR.0;
        report.differences.iter().map(|found| (hour(found), found.kept, found.recounted)).collect()
    }

    #[test]
    fn no_time_is_missing_or_too_many_but_for_a_reason() {
        assert_eq!(complaints(None, 0, &[(1, (5, 4), 5), (2, (3, 3), 3)]), []);
        // One too many does not make up for one too few.
        assert_eq!(complaints(None, 0, &[(1, (5, 5), 6), (2, (3, 3), 2)]), [(1, 6, 5), (2, 2, 3)]);
        assert_eq!(complaints(None, 0, &[(1, (5, 5), 0)]), [(1, 0, 5)]);
        // So many may be missing of all hours.
        assert_eq!(complaints(None, 2, &[(1, (5, 5), 4), (2, (3, 3), 2)]), []);
        assert_eq!(complaints(None, 1, &[(1, (5, 5), 4), (2, (3, 3), 2)]), [(1, 4, 5), (2, 2, 3)]);
        assert_eq!(complaints(None, 100, &[(1, (5, 5), 6)]), [(1, 6, 5)]);
        // Up to where Cleanups came there may be times of events that are gone, and none of those before a replay.
        assert_eq!(complaints(Some(1), 0, &[(0, (1, 1), 1_000), (1, (5, 3), 3), (2, (5, 3), 3)]), [(2, 3, 5)]);
        assert_eq!(complaints(Some(1), 0, &[(1, (5, 3), 2)]), [(1, 2, 3)]);
        // Of an hour without events they are left to the next Cleanup.
        assert_eq!(complaints(None, 0, &[(1, (0, 0), 7)]), []);
    }
}
