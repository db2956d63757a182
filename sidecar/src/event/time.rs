//! Times and durations in whole microseconds, the resolution of both ledgers.

use std::time::Duration;

/// A length of time in microseconds. What comes of arithmetic may be less than zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Micros(pub i64);

impl Micros {
    /// No time at all.
    pub const ZERO: Micros = Micros(0);
    /// 60 minutes.
    pub const HOUR: Micros = Micros(3_600_000_000);
    /// 24 hours.
    pub const DAY: Micros = Micros(86_400_000_000);

    /// As the standard library has it; less than zero is zero.
    pub fn to_std(self) -> Duration {
        Duration::from_micros(self.0.max(0).unsigned_abs())
    }
}

impl From<Duration> for Micros {
    /// Rounds up to the next microsecond, so that a lock or pause is never shorter than asked for.
    fn from(duration: Duration) -> Self {
        let micros = duration.as_nanos().div_ceil(1_000);
        Micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }
}

/// A moment of the database's clock (S5), in microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time(pub i64);

impl Time {
    /// This much later.
    pub fn plus(self, duration: Micros) -> Time {
        Time(self.0.saturating_add(duration.0))
    }

    /// This much earlier.
    pub fn minus(self, duration: Micros) -> Time {
        Time(self.0.saturating_sub(duration.0))
    }

    /// How long from `earlier` until this moment; zero if it is not after it.
    pub fn since(self, earlier: Time) -> Micros {
        Micros(self.0.saturating_sub(earlier.0).max(0))
    }

    /// Lowered to the full hour, as counts are kept (L5).
    pub fn hour(self) -> Time {
        Time(self.0.div_euclid(Micros::HOUR.0) * Micros::HOUR.0)
    }

    /// Lowered to the full day (UTC), as processing times are kept as well (L5).
    pub fn day(self) -> Time {
        Time(self.0.div_euclid(Micros::DAY.0) * Micros::DAY.0)
    }
}
