//! Waiting for a condition, with a deadline, instead of sleeping.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

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

/// Polls `condition` until it is `Some`; `None` if that has not happened within `deadline`, even if the condition itself
/// hangs.
pub async fn within<T>(deadline: Duration, mut condition: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = timeout_at(end, condition()).await.ok()? {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_condition_that_hangs_holds_nobody_up_past_the_deadline() {
        let given_up = timeout(DEADLINE, within(INTERVAL, async || pending::<Option<()>>().await)).await;
        assert_eq!(given_up, Ok(None));
    }

    #[tokio::test]
    async fn a_condition_is_asked_until_it_holds() {
        let mut asked = 0;
        let third = async || {
            asked += 1;
            (asked == 3).then_some(asked)
        };
        assert_eq!(within(DEADLINE, third).await, Some(3));
        assert_eq!(within(INTERVAL, async || None::<()>).await, None);
    }
}
