//! Metrics in Prometheus' text form, without a registry: each part of the process keeps its numbers in a struct of
//! atomics, and writes them to a page on request. Counting is one relaxed addition; nothing is looked up by name.
//!
//! Labels are closed lists ([`labels!`]) or names from the configuration, so that no request can create a series.

pub mod certificates;
pub mod process;

use std::{
    fmt::Write as _,
    marker::PhantomData,
    sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until the process restarts.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// As Prometheus writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric: its name (with the unit at its end, by Prometheus' rules), its kind, and its labels.
#[derive(Debug)]
pub struct Family {
    /// The name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// One sentence for people.
    pub help: &'static str,
    /// The names of its labels, in the order of the values.
    pub labels: &'static [&'static str],
    /// The upper bounds of a histogram's buckets; empty for the others.
    pub buckets: &'static [f64],
}

impl Family {
    /// A counter.
    #[must_use]
    pub const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, help, labels, buckets: &[] }
    }

    /// A gauge.
    #[must_use]
    pub const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, help, labels, buckets: &[] }
    }

    /// A histogram.
    #[must_use]
    pub const fn histogram(
        name: &'static str,
        labels: &'static [&'static str],
        buckets: &'static [f64],
        help: &'static str,
    ) -> Self {
        Self { name, kind: Kind::Histogram, help, labels, buckets }
    }
}

/// A closed list of values of a label, or of several labels together.
pub trait Label: Copy {
    /// How many there are.
    const COUNT: usize;

    /// The index of this one, below [`Label::COUNT`].
    fn index(self) -> usize;

    /// The values at an index, one for each label.
    fn values(index: usize, add: &mut dyn FnMut(&'static str));
}

impl<A: Label, B: Label> Label for (A, B) {
    const COUNT: usize = A::COUNT * B::COUNT;

    fn index(self) -> usize {
        self.0.index() * B::COUNT + self.1.index()
    }

    fn values(index: usize, add: &mut dyn FnMut(&'static str)) {
        A::values(index / B::COUNT, add);
        B::values(index % B::COUNT, add);
    }
}

/// Makes an enum whose values are those of a label.
#[macro_export]
macro_rules! labels {
    ($(#[$attribute:meta])* $visibility:vis enum $name:ident {
        $($(#[$doc:meta])* $variant:ident => $text:literal,)+
    }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name {
            $($(#[$doc])* $variant,)+
        }

        impl $name {
            /// All, in their order.
            $visibility const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The label's value.
            #[must_use]
            $visibility const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }

        impl $crate::metrics::Label for $name {
            const COUNT: usize = Self::ALL.len();

            fn index(self) -> usize {
                self as usize
            }

            fn values(index: usize, add: &mut dyn FnMut(&'static str)) {
                add(Self::ALL[index].name());
            }
        }
    };
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// At 0.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more.
    pub fn add(&self) {
        self.add_many(1);
    }

    /// Adds this many.
    pub fn add_many(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// So far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Sets the value.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// Adds to the value, or subtracts from it.
    pub fn add(&self, by: i64) {
        self.0.fetch_add(by, Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Counters, one for each value of a label.
#[derive(Debug)]
pub struct Counters<L> {
    counts: Box<[AtomicU64]>,
    label: PhantomData<fn(L)>,
}

impl<L: Label> Default for Counters<L> {
    fn default() -> Self {
        Self { counts: (0..L::COUNT).map(|_| AtomicU64::new(0)).collect(), label: PhantomData }
    }
}

impl<L: Label> Counters<L> {
    /// Adds one for this label.
    pub fn add(&self, label: L) {
        self.counts[label.index()].fetch_add(1, Relaxed);
    }

    /// The count so far, by the label's index.
    #[must_use]
    pub fn at(&self, index: usize) -> u64 {
        self.counts[index].load(Relaxed)
    }

    /// All of them together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().map(|count| count.load(Relaxed)).sum()
    }

    /// So far.
    #[must_use]
    pub fn get(&self, label: L) -> u64 {
        self.counts[label.index()].load(Relaxed)
    }
}

/// Counts by size. The sum is kept in millionths, exactly.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// By bucket, not cumulative; the last one is for values above all bounds.
    counts: Box<[AtomicU64]>,
    sum_millionths: AtomicU64,
}

impl Histogram {
    /// An empty one, with the buckets of a family.
    #[must_use]
    pub fn new(family: &Family) -> Self {
        let counts = (0..=family.buckets.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds: family.buckets, counts, sum_millionths: AtomicU64::new(0) }
    }

    /// Takes up a duration, in seconds.
    pub fn observe(&self, duration: Duration) {
        self.take(duration.as_secs_f64(), u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// Takes up a number of things.
    pub fn observe_count(&self, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        #[expect(clippy::cast_precision_loss, reason = "compared with bounds far below 2^52")]
        self.take(count as f64, count.saturating_mul(1_000_000));
    }

    fn take(&self, value: f64, millionths: u64) {
        // A dozen comparisons of adjacent values: cheaper than a binary search.
        let place = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.counts[place].fetch_add(1, Relaxed);
        self.sum_millionths.fetch_add(millionths, Relaxed);
    }
}

/// A page in the text format 0.0.4.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
}

impl Page {
    /// An empty page.
    #[must_use]
    pub fn new() -> Self {
        Self { text: String::with_capacity(8_192) }
    }

    /// The page.
    #[must_use]
    pub fn finish(self) -> String {
        self.text
    }

    /// Begins a metric; its rows follow.
    pub fn family<'p>(&'p mut self, family: &'p Family) -> Rows<'p> {
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.text,
            "# HELP {} {}\n# TYPE {} {}",
            family.name,
            family.help,
            family.name,
            family.kind.name()
        );
        Rows { text: &mut self.text, family }
    }

    /// A metric without labels.
    pub fn single(&mut self, family: &Family, value: impl Into<Value>) {
        self.family(family).row(&[], value);
    }

    /// A counter for each value of a label.
    pub fn counters<L: Label>(&mut self, family: &Family, counters: &Counters<L>) {
        self.family(family).counters(&[], counters);
    }
}

/// A number on a page.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// A count.
    Whole(u64),
    /// A gauge.
    Signed(i64),
    /// Seconds, mostly.
    Real(f64),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Whole(u64::try_from(value).unwrap_or(u64::MAX))
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Whole(value.into())
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Signed(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl From<&Counter> for Value {
    fn from(value: &Counter) -> Self {
        Self::Whole(value.get())
    }
}

impl From<&Gauge> for Value {
    fn from(value: &Gauge) -> Self {
        Self::Signed(value.get())
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole(value) => value.fmt(f),
            Self::Signed(value) => value.fmt(f),
            Self::Real(value) => value.fmt(f),
        }
    }
}

/// The rows of one metric.
#[derive(Debug)]
pub struct Rows<'p> {
    text: &'p mut String,
    family: &'p Family,
}

impl Rows<'_> {
    /// One row, with the values of the labels in their order.
    pub fn row(&mut self, labels: &[&str], value: impl Into<Value>) {
        self.line("", labels, None, value.into());
    }

    /// A row for each value of the labels after `labels`. For combinations, only those that have occurred.
    pub fn counters<L: Label>(&mut self, labels: &[&str], counters: &Counters<L>) {
        let mut values = Vec::with_capacity(self.family.labels.len());
        for (index, count) in counters.counts.iter().enumerate() {
            values.clear();
            values.extend_from_slice(labels);
            L::values(index, &mut |value| values.push(value));
            let count = count.load(Relaxed);
            if count > 0 || values.len() < 2 + labels.len() {
                self.row(&values, count);
            }
        }
    }

    /// The rows of a histogram.
    pub fn histogram(&mut self, labels: &[&str], histogram: &Histogram) {
        let mut count = 0;
        for (bound, bucket) in histogram.bounds.iter().zip(&histogram.counts) {
            count += bucket.load(Relaxed);
            self.line("_bucket", labels, Some(&bound.to_string()), Value::Whole(count));
        }
        count += histogram.counts[histogram.bounds.len()].load(Relaxed);
        self.line("_bucket", labels, Some("+Inf"), Value::Whole(count));
        #[expect(clippy::cast_precision_loss, reason = "a sum of hundreds of years is still exact enough")]
        let sum = histogram.sum_millionths.load(Relaxed) as f64 / 1e6;
        self.line("_sum", labels, None, Value::Real(sum));
        self.line("_count", labels, None, Value::Whole(count));
    }

    fn line(&mut self, suffix: &str, labels: &[&str], bound: Option<&str>, value: Value) {
        debug_assert_eq!(labels.len(), self.family.labels.len(), "{}", self.family.name);
        self.text.push_str(self.family.name);
        self.text.push_str(suffix);
        let mut separator = '{';
        for (name, value) in
            self.family.labels.iter().copied().zip(labels.iter().copied()).chain(bound.map(|bound| ("le", bound)))
        {
            self.text.push(separator);
            separator = ',';
            self.text.push_str(name);
            self.text.push_str("=\"");
            for character in value.chars() {
                match character {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    other => self.text.push(other),
                }
            }
            self.text.push('"');
        }
        if separator == ',' {
            self.text.push('}');
        }
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    labels! {
        enum Colour {
            Red => "red",
            Blue => "blue",
        }
    }

    #[test]
    fn a_page_is_in_the_text_format() {
        const COUNT: Family = Family::counter("x_total", &["route", "colour"], "Things.");
        const TIME: Family = Family::histogram("x_seconds", &[], &[0.5, 1.0], "Time.");
        let counters = Counters::<Colour>::default();
        counters.add(Colour::Blue);
        let times = Histogram::new(&TIME);
        for millis in [100, 500, 700, 3_000] {
            times.observe(Duration::from_millis(millis));
        }
        let mut page = Page::new();
        page.family(&COUNT).counters(&["a\"b"], &counters);
        page.family(&TIME).histogram(&[], &times);
        assert_eq!(
            page.finish(),
            "# HELP x_total Things.\n# TYPE x_total counter\n\
             x_total{route=\"a\\\"b\",colour=\"red\"} 0\nx_total{route=\"a\\\"b\",colour=\"blue\"} 1\n\
             # HELP x_seconds Time.\n# TYPE x_seconds histogram\n\
             x_seconds_bucket{le=\"0.5\"} 2\nx_seconds_bucket{le=\"1\"} 3\nx_seconds_bucket{le=\"+Inf\"} 4\n\
             x_seconds_sum 4.3\nx_seconds_count 4\n"
        );
    }

    #[test]
    fn combinations_have_a_place_each() {
        let pairs = Counters::<(Colour, Colour)>::default();
        pairs.add((Colour::Red, Colour::Blue));
        pairs.add((Colour::Blue, Colour::Red));
        const PAIRS: Family = Family::counter("p_total", &["a", "b"], "Pairs.");
        let mut page = Page::new();
        page.counters(&PAIRS, &pairs);
        let text = page.finish();
        assert!(text.ends_with("p_total{a=\"red\",b=\"blue\"} 1\np_total{a=\"blue\",b=\"red\"} 1\n"), "{text}");
        assert_eq!(text.lines().count(), 4, "those that never happened have no row");
    }
}
