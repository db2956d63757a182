//! The clock of an HTTP/2 connection.
//!
//! For its keep-alive hyper asks when each frame came. The clock is read once for each time that the connection is polled, which
//! reads many frames; read for each of them it took 1.5 % of a call.

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

    /// Reads the time. It stands still until the next one.
    pub(super) fn tick(&self) {
        // Of 64 bits it is over in 584 years.
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
