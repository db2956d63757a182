//! Times and states as people write them on the command line.

use jiff::{SignedDuration, Timestamp};
use oncegate_api::v1::State;
use oncegate_runtime::config::{self, Problem};

/// A bound on the time at which events were created: a moment, or an age counted back from now.
pub(crate) fn bound(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let before = config::duration(text)
        .map_err(|_| "neither a time like 2026-11-24T15:00:00Z nor an age like 24h or 7d".to_owned())
        .and_then(|age| SignedDuration::try_from(age).map_err(|error| error.to_string()))?;
    Timestamp::now().checked_sub(before).map_err(|_| "before all time".to_owned())
}

/// The fields of requests that the bounds become, with the options that they were given as.
pub(crate) const OPTIONS: [(&str, &str); 2] = [("start_time", "--since"), ("end_time", "--until")];

/// Whether the bounds leave anything in between.
///
/// # Errors
///
/// What to change.
pub(crate) fn in_order(since: Option<Timestamp>, until: Option<Timestamp>) -> Result<(), Problem> {
    match (since, until) {
        (Some(since), Some(until)) if since > until => {
            Err(Problem::new("--until", format!("{until} given, must not be before --since, which is {since}")))
        }
        _ => Ok(()),
    }
}

/// A time as the API represents it.
pub(crate) fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    let (seconds, nanos) = (time.as_second(), time.subsec_nanosecond());
    // The API counts nanoseconds forwards from the second, even before 1970.
    if nanos < 0 {
        prost_types::Timestamp { seconds: seconds - 1, nanos: nanos + 1_000_000_000 }
    } else {
        prost_types::Timestamp { seconds, nanos }
    }
}

/// The states of an event, as options name them.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateName {
    /// Known, and nobody is at work on it
    Pending,
    /// Somebody holds the lock, or let it expire
    Processing,
    /// Done
    Completed,
    /// The last attempt failed, and the next may be granted
    Failed,
    /// It may or may not have taken effect: held
    Unknown,
    /// Refused for good, or out of attempts: held
    Dead,
}

impl From<StateName> for State {
    fn from(name: StateName) -> Self {
        match name {
            StateName::Pending => Self::Pending,
            StateName::Processing => Self::Processing,
            StateName::Completed => Self::Completed,
            StateName::Failed => Self::Failed,
            StateName::Unknown => Self::Unknown,
            StateName::Dead => Self::Dead,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_ages_are_understood() {
        assert_eq!(bound("2026-11-24T15:00:00+01:00").unwrap().to_string(), "2026-11-24T14:00:00Z");
        let before = bound("1d 2h").unwrap();
        let age = Timestamp::now().duration_since(before).as_secs();
        assert!((26 * 3600..26 * 3600 + 60).contains(&age), "{age}");
        for wrong in ["", "24", "yesterday", "2026-11-24", "-1h", "99999999999999y"] {
            assert!(bound(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_before_1970_count_forwards() {
        let time = |text: &str| timestamp(text.parse().unwrap());
        assert_eq!(time("1970-01-01T00:00:01.5Z"), prost_types::Timestamp { seconds: 1, nanos: 500_000_000 });
        assert_eq!(time("1969-12-31T23:59:59.75Z"), prost_types::Timestamp { seconds: -1, nanos: 750_000_000 });
    }
}
