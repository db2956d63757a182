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
    /// The processing times that are kept, of all hours.
    pub(crate) timings: BTreeMap<Provider, Timings>,
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
    /// What: a state, "duplicates", "retries", "p50", "p95", "p99", or a bucket of a day's processing times.
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
    /// Completions in the rows, and times in the histograms. They may differ: a Cleanup takes events before the times of their
    /// hour, and a process that is killed loses the times of a second. Percentiles may be off by as many ranks.
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

/// The ranks (from 1) of the rows' times, in order, between which a percentile has to lie when a histogram of `times` stands
/// for `completions` rows: as many ranks around it as they differ by.
pub(crate) fn ranks(share: f64, completions: i64, times: i64) -> (i64, i64) {
    // Exact up to 2^53 completions.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "ranks of rows")]
    let rank = (share * completions as f64).ceil() as i64;
    let off = (times - completions).abs();
    ((rank - off).clamp(1, completions.max(1)), (rank + off).clamp(1, completions.max(1)))
}

/// Compares the percentiles of one provider with the rows' times at [`ranks`].
pub(crate) fn percentiles(
    report: &mut Report,
    of: &Provider,
    timings: &Timings,
    completions: i64,
    exact: &[(Micros, Micros); SHARES.len()],
) {
    let times = i64::try_from(timings.count()).unwrap_or(i64::MAX);
    report.completions += completions;
    report.times += times;
    if completions == 0 || times == 0 {
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
        assert_eq!(ranks(0.99, 100, 97), (96, 100));
        assert_eq!(ranks(0.5, 1, 0), (1, 1));
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
}
