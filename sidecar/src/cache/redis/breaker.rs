//! When Redis is left alone, and what is said of it.

use std::{
    fmt, mem,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use super::LOOK_UP_TIME_MAX;

/// Failures with no look-up answered in between after which Redis is left alone.
pub(super) const FAILURES_MAX: u32 = 5;

/// Open: Redis is left alone.
#[derive(Default)]
pub(super) struct Breaker {
    open: AtomicBool,
    failures: AtomicU32,
    told: Mutex<Vec<&'static str>>,
}

/// Why Redis is left alone.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reason<'e> {
    /// It does not answer in time, and nothing else is known.
    Silent,
    /// It, or the connection to it, says why.
    Said(&'e fred::error::Error),
}

impl Reason<'_> {
    /// What kind of trouble it is: the same trouble has many texts.
    fn kind(self) -> &'static str {
        match self {
            Reason::Silent => "silent",
            Reason::Said(error) => error.kind().to_str(),
        }
    }
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Silent => write!(f, "no answer within {LOOK_UP_TIME_MAX:?}"),
            Reason::Said(error) => error.fmt(f),
        }
    }
}

impl Breaker {
    pub(super) fn opened() -> Breaker {
        Breaker { open: AtomicBool::new(true), ..Breaker::default() }
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Judges a look-up.
    pub(super) fn look_up(&self) -> LookUp<'_> {
        LookUp { breaker: self, late: false }
    }

    pub(super) fn failed(&self, reason: Reason<'_>) {
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX && !self.open.swap(true, Ordering::Relaxed)
        {
            self.tell(reason);
        }
    }

    /// Says why Redis is left alone: each kind of reason once until it answers again, for they may take turns.
    pub(super) fn tell(&self, reason: Reason<'_>) {
        if self.is_news(reason.kind()) {
            tracing::warn!(%reason, "redis does not answer and is left alone; duplicates are answered by the ledger");
        }
    }

    /// The library has given up its connection, which is made anew: until a probe gets through, nothing that is sent is
    /// answered. Said once until then, for it may be given up each time.
    pub(super) fn given_up(&self, reason: &dyn fmt::Display) {
        self.open.store(true, Ordering::Relaxed);
        if self.is_news("given up") {
            tracing::warn!(%reason, "the connection to redis was given up and is made anew");
        }
    }

    fn is_news(&self, kind: &'static str) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !told.contains(&kind);
        if news {
            told.push(kind);
        }
        news
    }

    pub(super) fn succeeded(&self) {
        self.failures.store(0, Ordering::Relaxed);
        if self.open.swap(false, Ordering::Relaxed) {
            self.told.lock().unwrap_or_else(PoisonError::into_inner).clear();
            tracing::info!("redis answers");
        }
    }
}

/// One look-up, however many wait for it: a crowd must not make five failures of one that is late, and that some could wait for
/// it is no success. Otherwise Redis would be left alone and asked again by turns, and keep everybody waiting.
pub(super) struct LookUp<'b> {
    breaker: &'b Breaker,
    late: bool,
}

impl LookUp<'_> {
    /// Somebody could not wait for it.
    pub(super) fn is_late(&mut self) {
        if !mem::replace(&mut self.late, true) {
            self.breaker.failed(Reason::Silent);
        }
    }

    /// It was answered.
    pub(super) fn answered(self) {
        if !self.late {
            self.breaker.succeeded();
        }
    }

    /// It came to nothing.
    pub(super) fn failed(self, reason: Reason<'_>) {
        if !self.late {
            self.breaker.failed(reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Breaker, FAILURES_MAX, Reason};

    #[test]
    fn each_kind_of_reason_is_told_once_until_it_answers() {
        let breaker = Breaker::default();
        (0..FAILURES_MAX).for_each(|_| breaker.failed(Reason::Silent));
        assert!(!breaker.is_news(Reason::Silent.kind()), "told when it was left alone");
        assert!(breaker.is_news("IO Error"));
        // They may take turns.
        assert!(!breaker.is_news(Reason::Silent.kind()) && !breaker.is_news("IO Error"));
        breaker.succeeded();
        assert!(breaker.is_news("IO Error"));
    }

    #[test]
    fn a_late_look_up_is_one_failure_and_no_success() {
        let breaker = Breaker::default();
        for late in 1..=FAILURES_MAX {
            assert!(!breaker.is_open(), "after {} late ones", late - 1);
            let mut look_up = breaker.look_up();
            (0..100).for_each(|_| look_up.is_late());
            look_up.answered();
        }
        assert!(breaker.is_open());
        breaker.look_up().answered();
        assert!(!breaker.is_open());
    }
}
