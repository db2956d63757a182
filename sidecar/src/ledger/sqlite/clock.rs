//! The clock that decides (S5): the system's, kept from going back.
//!
//! There is one process on the file (L7), so its clock is the database's. A machine's clock that is set back must not
//! make an expired lock live again, nor put a later event before an earlier one.

use std::{
    sync::{Mutex, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use crate::event::{Micros, Time};

/// Never before an earlier reading, and never slower than the steady clock since the last one: were it to stand
/// still until a clock that was set back has caught up, no lock would expire meanwhile.
#[derive(Debug)]
pub(super) struct Clock {
    last: Mutex<(Time, Instant)>,
}

impl Clock {
    /// A clock that is at `floor`, the last reading that the database knows of, or later.
    pub(super) fn from(floor: Time) -> Self {
        Self { last: Mutex::new((floor.max(system()), Instant::now())) }
    }

    /// This moment.
    pub(super) fn now(&self) -> Time {
        // Nothing can panic while it is held; were it so, the pair would still be whole.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        advance(&mut last, system(), Instant::now())
    }

    /// How far it is ahead of the system's, which was set back.
    pub(super) fn ahead(&self) -> Micros {
        Micros(self.now().since(system()).0.max(0))
    }
}

fn advance(last: &mut (Time, Instant), system: Time, steady: Instant) -> Time {
    let elapsed = steady.saturating_duration_since(last.1).as_micros();
    let at_least = last.0.plus(Micros(i64::try_from(elapsed).unwrap_or(i64::MAX)));
    if system <= at_least {
        // Taking up this reading would lose the part of a microsecond that it cuts off.
        return at_least;
    }
    *last = (system, steady);
    system
}

fn system() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn goes_on_at_the_steady_pace_when_the_system_clock_is_set_back() {
        let (start, steady) = (Time(1_700_000_000_000_000), Instant::now());
        let mut last = (start, steady);
        let ahead = start.plus(Micros(10_000_000));
        let steady = steady + Duration::from_secs(1);
        assert_eq!(advance(&mut last, ahead, steady), ahead, "the system clock leads");
        let back = start.minus(Micros::HOUR);
        let later = advance(&mut last, back, steady + Duration::from_micros(7));
        assert_eq!(later, ahead.plus(Micros(7)), "and an hour back changes nothing");
    }

    #[test]
    fn is_never_before_what_the_database_knows_of() {
        let floor = Time(system().0 + 60_000_000);
        let clock = Clock::from(floor);
        let first = clock.now();
        assert!(first >= floor);
        assert!(clock.now() >= first);
        let ahead = clock.ahead();
        assert!(ahead > Micros(50_000_000) && ahead <= Micros(60_000_000), "{ahead:?}");
        assert_eq!(Clock::from(Time(0)).ahead(), Micros(0));
    }
}
