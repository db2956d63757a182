//! The targets: the one list of P1 to P14, and of what is asked beside them.

use serde::{Deserialize, Serialize};

/// A bound on a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    pub(crate) fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

/// One figure with its target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// P1 to P14, with a letter if it has several parts; or E1.
    pub(crate) id: &'static str,
    pub(crate) what: &'static str,
    pub(crate) bound: Bound,
    pub(crate) unit: Unit,
}

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Of two rates or times.
    Ratio,
    Mebibytes,
    Bytes,
    RowsPerSecond,
    /// A loss of rate.
    Percent,
    /// Storms that did not have exactly one winner.
    Storms,
    Milliseconds,
}

impl Unit {
    pub(crate) fn show(self, value: f64) -> String {
        self.show_with(value, 0)
    }

    /// With so many more digits than usual.
    fn show_with(self, value: f64, more: usize) -> String {
        let (one, two) = (1 + more, 2 + more);
        match self {
            Self::Ratio => format!("{value:.two$}"),
            Self::Mebibytes => format!("{value:.one$} MiB"),
            Self::Bytes => format!("{value:.more$} B"),
            Self::RowsPerSecond => format!("{:.more$}k rows/s", value / 1_000.0),
            Self::Percent => format!("{value:.one$} %"),
            Self::Storms => format!("{value:.more$}"),
            Self::Milliseconds => format!("{value:.two$} ms"),
        }
    }
}

impl Asked {
    /// A measured value, with as many digits as it takes to see that it misses the bound.
    pub(crate) fn show(&self, value: f64) -> String {
        let (Bound::AtLeast(bound) | Bound::AtMost(bound)) = self.bound;
        (0..3)
            .map(|more| self.unit.show_with(value, more))
            .zip((0..3).map(|more| self.unit.show_with(bound, more)))
            .find(|(value_text, bound_text)| self.bound.is_met(value) || value_text != bound_text)
            .map_or_else(|| self.unit.show_with(value, 3), |(text, _)| text)
    }
}

use Bound::{AtLeast, AtMost};

const fn asked(id: &'static str, what: &'static str, bound: Bound, unit: Unit) -> Asked {
    Asked { id, what, bound, unit }
}

/// All of them, in order.
pub(crate) const ALL: &[Asked] = &[
    asked("P1", "durable gRPC cycle at c=64, over pgbench's plain cycle at c=64", AtLeast(2.3), Unit::Ratio),
    asked("P2", "the same at c=256, on two connections, over pgbench at c=64", AtLeast(3.2), Unit::Ratio),
    asked("P3a", "the same at c=16, over pgbench at c=16", AtLeast(1.0), Unit::Ratio),
    asked("P3b", "p50 of the cycle at c=1, over pgbench's mean at c=1", AtMost(1.9), Unit::Ratio),
    asked("P4a", "duplicate from the process's own cache, c=64, over bare tonic", AtLeast(0.85), Unit::Ratio),
    asked("P4b", "the same, over redis-benchmark's GET, not pipelined", AtLeast(1.0), Unit::Ratio),
    asked("P5", "duplicate from Redis, c=64, over bare tonic", AtLeast(0.65), Unit::Ratio),
    asked("P6", "duplicate with Redis down, c=64, over bare tonic", AtLeast(0.25), Unit::Ratio),
    asked(
        "P7",
        "gateway and sidecar in one process, new events, c=64, over the first version's design",
        AtLeast(10.0),
        Unit::Ratio,
    ),
    asked("P8", "duplicates there, c=64, over bare hyper with HMAC", AtLeast(0.80), Unit::Ratio),
    asked("P9a", "p50 of a new event there at c=1, over the first version's", AtMost(0.5), Unit::Ratio),
    asked("P9b", "p50 of a duplicate there at c=1, over the first version's", AtMost(0.25), Unit::Ratio),
    asked("P10a", "memory of an idle sidecar", AtMost(16.0), Unit::Mebibytes),
    asked("P10b", "memory after a load at c=1024, with an empty cache", AtMost(40.0), Unit::Mebibytes),
    asked("P10c", "memory of a key in the cache, which is bounded", AtMost(100.0), Unit::Bytes),
    asked("P11a", "insert into a large table, over a small one", AtLeast(0.85), Unit::Ratio),
    asked("P11b", "cycle in a large table, over a small one", AtLeast(0.88), Unit::Ratio),
    asked("P11c", "look-up in a large table, over a small one", AtLeast(0.65), Unit::Ratio),
    asked("P12a", "cleanup while nothing else happens", AtLeast(150_000.0), Unit::RowsPerSecond),
    asked("P12b", "loss of the cycle's rate at c=64 while cleanup runs", AtMost(10.0), Unit::Percent),
    asked("P13a", "storms of 100 callers on one event that did not have exactly one winner", AtMost(0.0), Unit::Storms),
    asked("P13b", "p99 of such a caller", AtMost(5.0), Unit::Milliseconds),
    asked("P14a", "cycle at c=64 in a fresh table, over the warm one", AtLeast(0.9), Unit::Ratio),
    asked("P14b", "the same with 100,000 open rows after an ANALYZE in a quiet moment", AtLeast(0.9), Unit::Ratio),
    asked("E1", "durable cycle at c=64 on the embedded store, over P1's on Postgres", AtLeast(1.0), Unit::Ratio),
];

/// The one of this name.
pub(crate) fn find(id: &str) -> Option<&'static Asked> {
    ALL.iter().find(|asked| asked.id == id)
}

/// Whether there is a target with this number.
pub(crate) fn is_known(name: &str) -> bool {
    ALL.iter().any(|asked| number(asked.id) == name)
}

/// The name without the letter of its part.
pub(crate) fn number(id: &str) -> &str {
    id.trim_end_matches(|c: char| c.is_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p1_to_p14_are_there_in_order_and_the_embedded_store_after_them() {
        let mut numbers: Vec<&str> = ALL.iter().map(|asked| number(asked.id)).collect();
        numbers.dedup();
        let expected: Vec<String> = (1..=14).map(|n| format!("P{n}")).chain(["E1".to_owned()]).collect();
        assert_eq!(numbers, expected);
        assert!(is_known("P3") && !is_known("P3a") && !is_known("P15") && find("P3a").is_some());
    }

    #[test]
    fn a_value_that_misses_its_bound_is_seen_to() {
        let [ratio, memory] = ["P11a", "P10a"].map(|id| find(id).unwrap());
        assert_eq!([0.85, 0.8497, 0.84, 0.8512].map(|value| ratio.show(value)), ["0.85", "0.8497", "0.84", "0.85"]);
        assert_eq!(memory.show(16.04), "16.04 MiB");
    }

    #[test]
    fn a_bound_includes_its_own_value() {
        assert!(AtLeast(1.0).is_met(1.0) && !AtLeast(1.0).is_met(0.99));
        assert!(AtMost(1.0).is_met(1.0) && !AtMost(1.0).is_met(1.01) && !AtMost(1.0).is_met(f64::NAN));
    }
}
