//! The clock of an HTTP/2 connection.
//!
//! For its keep-alive, hyper asks when each frame arrived. The clock is read once per poll of the connection, which reads many
//! frames; reading it for each frame took 1.5 % of a call.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper::rt::{Sleep, Timer};
use hyper_util::rt::TokioTimer;
use tokio::time::Instant;

/// Clones are the same clock.
#[derive(Debug, Clone)]
pub(super) struct Clock {
    began: Instant,
    nanos: Arc<AtomicU64>,
    timer: TokioTimer,
}

impl Clock {
    pub(super) fn new() -> Clock {
        Clock { began: Instant::now(), nanos: Arc::default(), timer: TokioTimer::new() }
    }

    /// Reads the time. The clock stands still until the next tick.
    pub(super) fn tick(&self) {
        // 64 bits last for 584 years.
        self.nanos.store(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }
}

impl Timer for Clock {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.timer.sleep(duration)
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn Sleep>> {
        self.timer.sleep_until(deadline)
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn Sleep>>, new_deadline: std::time::Instant) {
        self.timer.reset(sleep, new_deadline);
    }

    fn now(&self) -> std::time::Instant {
        (self.began + Duration::from_nanos(self.nanos.load(Relaxed))).into()
    }
}
