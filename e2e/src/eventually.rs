//! Waiting for a condition, with a deadline, instead of sleeping.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long a test waits for something that should happen at once. Long, because only a failure ever uses it up.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// How often a condition is checked.
const INTERVAL: Duration = Duration::from_millis(10);

/// Polls `condition` until it is `Some`, and panics with `what` if that has not happened within [`DEADLINE`].
pub async fn eventually<T>(what: &str, condition: impl AsyncFnMut() -> Option<T>) -> T {
    match within(DEADLINE, condition).await {
        Some(value) => value,
        None => panic!("not within {DEADLINE:?}: {what}"),
    }
}

/// Polls `condition` until it is `Some`; `None` if that has not happened within `deadline`.
pub async fn within<T>(deadline: Duration, mut condition: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition().await {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        sleep(INTERVAL).await;
    }
}
