//! The timer of an HTTP/1 connection: a single alarm, moved when it rings too early.
//!
//! hyper waits for each head with a separate timer, which is set and cancelled with every request. Each one ends later than
//! the one before, so an alarm already set rings early enough for it.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::rt::{Sleep, Timer};
use tokio::time::Instant;

/// Clones are the same alarm. Only for one kind of wait at a time, all of the same length.
#[derive(Debug, Clone, Default)]
pub(super) struct Alarm(Arc<Mutex<Option<Pin<Box<tokio::time::Sleep>>>>>);

impl Timer for Alarm {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until((Instant::now() + duration).into())
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(Wait { deadline: deadline.into(), alarm: self.clone() })
    }

    fn now(&self) -> std::time::Instant {
        Instant::now().into()
    }
}

/// Until its deadline.
struct Wait {
    deadline: Instant,
    alarm: Alarm,
}

impl Sleep for Wait {}

impl Future for Wait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut alarm = self.alarm.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sleep = alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(self.deadline)));
        loop {
            ready!(sleep.as_mut().poll(cx));
            // It may have been set for a wait that is over.
            if Instant::now() >= self.deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(self.deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_wait_ends_at_its_own_deadline_and_not_at_that_of_one_before() {
        let (alarm, second) = (Alarm::default(), Duration::from_secs(1));
        let began = Instant::now();
        for waited in 1..5 {
            // A wait that is over before it rings, as when a head has arrived.
            let heard = tokio::time::timeout(second / 2, alarm.sleep(10 * second)).await;
            assert!(heard.is_err());
            assert_eq!(began.elapsed(), waited * second / 2);
        }
        // The alarm rings for the first of them meanwhile.
        alarm.sleep(10 * second).await;
        assert_eq!(began.elapsed().as_secs(), 12);
        alarm.sleep(10 * second).await;
        assert_eq!(began.elapsed().as_secs(), 22);
    }
}
