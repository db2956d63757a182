//! Work that outlives the caller that waits for it.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::runtime::Handle;
use tokio_util::task::task_tracker::TrackedFuture;

use crate::shutdown::Drain;

/// A future that continues in a task of its own if it is dropped unfinished: a delivery outlives the provider's request, a mark
/// its caller. While somebody waits for it, it runs in the waiter's task, so the common short one costs no extra task and no
/// hop between threads.
///
/// If it panics, it is gone, and its waiter with it.
pub struct Detach<F: Future<Output: Send> + Send + 'static> {
    /// Empty once finished, or after it panicked.
    future: Option<Pin<Box<TrackedFuture<F>>>>,
    runtime: Handle,
}

impl<F: Future<Output: Send> + Send + 'static> Detach<F> {
    /// Has to be called inside a tokio runtime, which takes the future over. From now on `drain` waits for it, whoever runs it.
    pub fn new(future: F, drain: &Drain) -> Self {
        Self { future: Some(Box::pin(drain.track(future))), runtime: Handle::current() }
    }
}

impl<F: Future<Output: Send> + Send + 'static> fmt::Debug for Detach<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detach").field("finished", &self.future.is_none()).finish_non_exhaustive()
    }
}

impl<F: Future<Output: Send> + Send + 'static> Future for Detach<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        let mut future = this.future.take().expect("a future is not polled after it finished");
        // Taken out while it is polled, so that one that panics is dropped instead of being polled again.
        let polled = future.as_mut().poll(cx);
        if polled.is_pending() {
            this.future = Some(future);
        }
        polled
    }
}

impl<F: Future<Output: Send> + Send + 'static> Drop for Detach<F> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            self.runtime.spawn(future);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use tokio::{sync::Notify, time::timeout};

    use super::*;

    #[tokio::test]
    async fn a_dropped_future_goes_on_and_the_drain_waits_for_it() {
        let (drain, go, done) = (Drain::new(), Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (wait, tell) = (go.clone(), done.clone());
        let detached = Detach::new(
            async move {
                wait.notified().await;
                tell.notify_one();
            },
            &drain,
        );
        assert_eq!(drain.under_way(), 1);
        assert!(timeout(Duration::from_millis(1), detached).await.is_err());
        assert_eq!(drain.under_way(), 1);
        go.notify_one();
        assert_eq!(drain.within(Duration::from_secs(10)).await, 0);
        done.notified().await;
    }

    #[tokio::test]
    async fn a_finished_future_leaves_nothing_behind() {
        let drain = Drain::new();
        assert_eq!(Detach::new(async { 7 }, &drain).await, 7);
        assert_eq!(drain.under_way(), 0);
    }
}
