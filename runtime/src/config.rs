//! Types that configuration is parsed into, and the list of everything that is wrong with it.
//!
//! A service reports all problems of its configuration at once: an operator who fixes one and restarts to see the
//! next loses a deployment each time.

use std::{borrow::Cow, error::Error as StdError, fmt, time::Duration};

use crate::chain::Chain;

/// One thing that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The setting, under the name that an operator knows: the environment variable, or the option.
    pub setting: Cow<'static, str>,
    /// What was given, what is permitted and why. Never holds a secret; the code that builds it has to make sure of
    /// that.
    pub message: String,
}

impl Problem {
    /// A problem with `setting`.
    pub fn new(setting: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { setting: setting.into(), message: message.into() }
    }

    /// A problem with `setting`, described by an error and its sources.
    pub fn from_error(setting: impl Into<Cow<'static, str>>, error: &(dyn StdError + 'static)) -> Self {
        Self::new(setting, Chain(error).to_string())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.message)
    }
}

/// Everything that is wrong with the configuration; never empty. `Display` prints one problem per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    first: Problem,
    rest: Vec<Problem>,
}

impl Problems {
    /// The problems in the order in which they were found.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// Adds the problems of another part, so that one message covers every component of a process.
    #[must_use]
    pub fn and(mut self, other: Problems) -> Self {
        self.rest.push(other.first);
        self.rest.extend(other.rest);
        self
    }
}

impl From<Problem> for Problems {
    fn from(first: Problem) -> Self {
        Self { first, rest: Vec::new() }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration cannot be used")?;
        for problem in self.iter() {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Collects problems while a configuration is checked.
#[derive(Debug, Default)]
pub struct Checks {
    found: Vec<Problem>,
}

impl Checks {
    /// Nothing found so far.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Records a problem with `setting`.
    pub fn problem(&mut self, setting: impl Into<Cow<'static, str>>, message: impl Into<String>) {
        self.found.push(Problem::new(setting, message));
    }

    /// Records a problem found elsewhere.
    pub fn push(&mut self, problem: Problem) {
        self.found.push(problem);
    }

    /// Keeps a value, or records why there is none.
    pub fn take<T>(&mut self, parsed: Result<T, Problem>) -> Option<T> {
        parsed.map_err(|problem| self.found.push(problem)).ok()
    }

    /// Keeps what another part parsed, or records all that is wrong with it.
    pub fn take_all<T>(&mut self, parsed: Result<T, Problems>) -> Option<T> {
        parsed
            .map_err(|problems| {
                self.found.push(problems.first);
                self.found.extend(problems.rest);
            })
            .ok()
    }

    /// `smaller` has to be less than `larger` (the order of the time and size budgets). The message names both
    /// settings and both values, because either may be the one to change.
    pub fn less<T: PartialOrd + fmt::Display>(
        &mut self,
        smaller: (&'static str, T),
        larger: (&'static str, T),
        why: &str,
    ) {
        if smaller.1 >= larger.1 {
            let (name, value) = larger;
            self.problem(
                smaller.0,
                format!("{} given, has to be less than {name}, which is {value}: {why}", smaller.1),
            );
        }
    }

    /// `value` has to lie in `range`.
    pub fn within<T: PartialOrd + fmt::Display>(
        &mut self,
        setting: &'static str,
        value: T,
        range: std::ops::RangeInclusive<T>,
    ) {
        if !range.contains(&value) {
            self.problem(setting, format!("{value} given, permitted is {} to {}", range.start(), range.end()));
        }
    }

    /// Ok when nothing was found.
    ///
    /// # Errors
    ///
    /// Everything that was found, in order.
    pub fn finish(self) -> Result<(), Problems> {
        let mut found = self.found.into_iter();
        match found.next() {
            None => Ok(()),
            Some(first) => Err(Problems { first, rest: found.collect() }),
        }
    }
}

/// Prints a duration the way it may be written in the configuration: `4m`, `2s 500ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShownDuration(pub Duration);

impl fmt::Display for ShownDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// Prints a number of bytes the way it may be written in the configuration, in the largest unit that divides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShownSize(pub u64);

impl fmt::Display for ShownSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, bytes) in UNITS.iter().rev() {
            if self.0 >= *bytes && self.0.is_multiple_of(*bytes) {
                return write!(f, "{}{unit}", self.0 / bytes);
            }
        }
        write!(f, "{}B", self.0)
    }
}

const UNITS: [(&str, u64); 4] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

/// Why a value with a unit was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UnitError {
    /// A bare number: it means seconds in one program and milliseconds in another, so it is not accepted here.
    #[error("a unit is missing: write {0}")]
    NoUnit(String),
    /// Not a duration.
    #[error("not a duration; write for example 250ms, 30s, 5m or 24h")]
    NotADuration(#[source] humantime::DurationError),
    /// Not a size.
    #[error("not a size; write for example 512B, 256KiB or 64MiB")]
    NotASize,
}

/// The scheme of a URL that may hold a secret: the part before `://` if that can be a scheme, and so can be shown.
#[must_use]
pub fn scheme(url: &str) -> Option<&str> {
    let (scheme, _) = url.split_once("://")?;
    let permitted = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    (scheme.starts_with(|first: char| first.is_ascii_alphabetic()) && scheme.bytes().all(permitted)).then_some(scheme)
}

/// Parses a duration with its unit: `250ms`, `30s`, `5m`, `1h 30m`. For clap's `value_parser`.
///
/// # Errors
///
/// A bare number ([`UnitError::NoUnit`], which asks for the unit) and anything that is not a duration.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    let text = text.trim();
    if is_bare_number(text) {
        return Err(UnitError::NoUnit(format!("{text}s, {text}ms or {text}m")));
    }
    humantime::parse_duration(text).map_err(UnitError::NotADuration)
}

/// Parses a number of bytes with its unit: `512B`, `256KiB`, `64MiB`, `1GiB`. For clap's `value_parser`.
///
/// # Errors
///
/// A bare number ([`UnitError::NoUnit`]), and anything that is not a whole number of one of these units or does not
/// fit in 64 bits. `KB` and `MB` are refused, since half the world means 1,000 by them.
pub fn byte_size(text: &str) -> Result<u64, UnitError> {
    let text = text.trim();
    if is_bare_number(text) {
        return Err(UnitError::NoUnit(format!("{text}B, {text}KiB or {text}MiB")));
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let number: u64 = number.parse().map_err(|_| UnitError::NotASize)?;
    let (_, bytes) = UNITS.iter().find(|(name, _)| *name == unit).ok_or(UnitError::NotASize)?;
    number.checked_mul(*bytes).ok_or(UnitError::NotASize)
}

fn is_bare_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        for (text, wanted) in [
            ("300s", Duration::from_secs(300)),
            ("5m", Duration::from_secs(300)),
            ("250ms", Duration::from_millis(250)),
            (" 1h 30m ", Duration::from_secs(5_400)),
            ("2.5s", Duration::from_millis(2_500)),
        ] {
            assert_eq!(duration(text), Ok(wanted), "{text}");
        }
        let refused = duration("300").unwrap_err();
        assert_eq!(refused.to_string(), "a unit is missing: write 300s, 300ms or 300m");
        for text in ["", "0", "1.5", "s", "-5s", "5 parsecs", "99999999999999999999s"] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_scheme_is_shown_and_nothing_else_of_a_url() {
        for (url, shown) in [
            ("https://user:hunter2@host", Some("https")),
            ("redis-cluster://host", Some("redis-cluster")),
            ("user:hunter2@host", None),
            ("user:hunter2@host://", None),
            ("://host", None),
        ] {
            assert_eq!(scheme(url), shown, "{url}");
        }
    }

    #[test]
    fn sizes_need_a_unit() {
        for (text, wanted) in [("512B", 512), ("256KiB", 262_144), ("64 MiB", 67_108_864), ("1GiB", 1_073_741_824)] {
            assert_eq!(byte_size(text), Ok(wanted), "{text}");
            assert_eq!(ShownSize(wanted).to_string(), text.replace(' ', ""));
        }
        assert_eq!(ShownSize(1_500).to_string(), "1500B");
        for text in ["", "256", "256KB", "1.5MiB", "-1B", "KiB", "99999999999GiB"] {
            assert!(byte_size(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn every_problem_is_listed_with_both_values() {
        let mut checks = Checks::new();
        checks.less(
            ("UPSTREAM_TIMEOUT", ShownDuration(Duration::from_secs(300))),
            ("LOCK_DURATION", ShownDuration(Duration::from_secs(240))),
            "two attempts could be alive",
        );
        checks.within("BODY_BYTES_MAX", ShownSize(0), ShownSize(1)..=ShownSize(1 << 20));
        assert_eq!(checks.take::<()>(Err(Problem::new("UPSTREAM_URL", "missing"))), None);
        let problems = checks.finish().unwrap_err();
        assert_eq!(problems.iter().count(), 3);
        let text = problems.to_string();
        assert!(text.contains("UPSTREAM_TIMEOUT: 5m given, has to be less than LOCK_DURATION, which is 4m"), "{text}");
        assert!(text.contains("BODY_BYTES_MAX: 0B given, permitted is 1B to 1MiB"), "{text}");
        assert!(text.contains("UPSTREAM_URL: missing"), "{text}");
        assert!(Checks::new().finish().is_ok());
    }
}
