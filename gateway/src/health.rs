//! The health page: whether the gateway works, and what became of its events (G1).

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Response, StatusCode};
use oncegate_api::v1::{self, State};
use serde::Serialize;
use tokio::{sync::Mutex, time::Instant};

use crate::{
    answer::{self, json},
    sidecar::{CallError, Sidecar},
};

/// How long a failure is kept: shorter than a success, so that the page recovers with the sidecar, yet long enough that
/// readers who queued behind a call that timed out do not each wait for another one.
const FAILURE_KEPT: Duration = Duration::from_secs(1);

/// The page. Its statistics are kept for a while and shown to everybody.
pub(crate) struct Health {
    source: Arc<Source>,
    kept: Duration,
    /// Held during the call to the sidecar: readers that come meanwhile wait for the same answer, so that this public page
    /// causes at most one call at a time. The call holds it, not the reader that caused it: readers that hang up cause no
    /// further calls.
    latest: Arc<Mutex<Option<Latest>>>,
}

/// The sidecar to ask, and the tenants to ask for.
struct Source {
    sidecar: Sidecar,
    /// Those of the gateway's routes: other tenants' numbers do not belong on this public page (W21).
    tenants: Vec<String>,
}

#[derive(Clone, Copy)]
struct Latest {
    until: Instant,
    statistics: Option<Statistics>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct Statistics {
    total: i64,
    completed: i64,
    /// Failed, unknown and dead.
    failed: i64,
    processing: i64,
}

#[derive(Serialize)]
struct Page {
    status: &'static str,
    timestamp: String,
    statistics: Option<Statistics>,
}

impl Health {
    pub(crate) fn new(sidecar: Sidecar, tenants: Vec<String>, kept: Duration) -> Self {
        Self { source: Arc::new(Source { sidecar, tenants }), kept, latest: Arc::default() }
    }

    /// 200 with statistics, or 503 without them if the sidecar gives none.
    pub(crate) async fn page(&self) -> Response<answer::Body> {
        let statistics = self.statistics().await;
        let (code, status) = match statistics {
            Some(_) => (StatusCode::OK, "ok"),
            None => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        };
        let timestamp = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let page = Page { status, timestamp, statistics };
        let body = serde_json::to_vec(&page).expect("text and numbers can be written as JSON");
        json(code, Bytes::from(body))
    }

    async fn statistics(&self) -> Option<Statistics> {
        let mut latest = Arc::clone(&self.latest).lock_owned().await;
        if let Some(latest) = latest.filter(|latest| Instant::now() < latest.until) {
            return latest.statistics;
        }
        let (source, kept) = (Arc::clone(&self.source), self.kept);
        let asking = tokio::spawn(async move {
            let statistics = match source.ask().await {
                Ok(statistics) => Some(statistics),
                Err(error) => {
                    let status = &error.status as &dyn std::error::Error;
                    tracing::warn!(status, "sidecar gives no statistics");
                    None
                }
            };
            let kept = if statistics.is_some() { kept } else { FAILURE_KEPT };
            *latest = Some(Latest { until: Instant::now() + kept, statistics });
            statistics
        });
        // A panic has been reported, and gives no statistics.
        asking.await.unwrap_or_default()
    }
}

impl Source {
    async fn ask(&self) -> Result<Statistics, CallError> {
        let mut sum = Statistics::default();
        for tenant in &self.tenants {
            let stats = self.sidecar.stats(tenant).await?;
            sum = sum.and(summary(&stats.total.unwrap_or_default()));
        }
        Ok(sum)
    }
}

impl Statistics {
    fn and(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            completed: self.completed + other.completed,
            failed: self.failed + other.failed,
            processing: self.processing + other.processing,
        }
    }
}

fn summary(counts: &v1::Counts) -> Statistics {
    let of =
        |wanted: &[State]| counts.states.iter().filter(|row| wanted.contains(&row.state())).map(|row| row.count).sum();
    Statistics {
        total: counts.total,
        completed: of(&[State::Completed]),
        failed: of(&[State::Failed, State::Unknown, State::Dead]),
        processing: of(&[State::Processing]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_is_everything_that_ended_badly() {
        let states = [
            (State::Pending, 1),
            (State::Processing, 2),
            (State::Completed, 4),
            (State::Failed, 8),
            (State::Unknown, 16),
            (State::Dead, 32),
        ];
        let counts = v1::Counts {
            total: 63,
            states: states.map(|(state, count)| v1::StateCount { state: state.into(), count }).to_vec(),
            ..v1::Counts::default()
        };
        let wanted = Statistics { total: 63, completed: 4, failed: 56, processing: 2 };
        assert_eq!(summary(&counts), wanted);
    }
}
