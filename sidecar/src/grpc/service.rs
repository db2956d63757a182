//! The eight RPCs: validate, ask the coordinator, convert.

use std::{mem, sync::Arc, time::Instant};

use oncegate_api::v1::{self, idempotency_service_server::IdempotencyService};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::Span;

use super::{
    access,
    audit::{self, Who},
    convert,
    observe::tell,
    page_token,
    quota::TenantQuota,
    validate,
};
use crate::{
    config::Policy,
    coordinator::{Answer, Coordinator},
    event::{Decision, Event, Key, Payload, Refusal},
    ledger::{
        Error,
        filter::{CleanupProgress, CleanupScope, Cursor, Page},
    },
    maintenance::cleanup,
    method::Method,
    metrics::{ClaimLabel, CleanupEnd, Metrics, Told},
};

pub(super) struct Api {
    coordinator: Arc<Coordinator>,
    policy: Arc<Policy>,
    metrics: Arc<Metrics>,
    quota: Option<TenantQuota>,
}

impl Api {
    pub(super) fn new(coordinator: Arc<Coordinator>, policy: Arc<Policy>, metrics: Arc<Metrics>) -> Api {
        let quota = policy.tenant_calls_per_second.map(TenantQuota::new);
        Api { coordinator, policy, metrics, quota }
    }

    /// Takes a call from the tenant's quota, if quotas are configured.
    fn within_quota(&self, tenant: &str) -> Result<(), Status> {
        match &self.quota {
            None => Ok(()),
            Some(quota) => quota.take(tenant).inspect_err(|_| self.metrics.quota_exceeded.add()),
        }
    }

    /// Whether there are quotas at all.
    pub(super) fn has_quotas(&self) -> bool {
        self.quota.is_some()
    }

    /// As [`Coordinator::is_duplicate`].
    pub(super) fn is_duplicate(&self, key: &Key, payload: Payload<'_>, now: Instant) -> bool {
        self.coordinator.is_duplicate(key, payload, now)
    }

    /// An event for its holder; metadata keys left out because of the limit are counted.
    fn marked(&self, event: Event) -> v1::Event {
        let (event, left_out) = convert::event(event);
        self.left_out(left_out);
        event
    }

    fn left_out(&self, keys: usize) {
        if keys > 0 {
            self.metrics.metadata_left_out.add_many(keys as u64);
            tracing::warn!(keys, "metadata of a completion is left out: too large, or not to be kept as JSON");
        }
    }
}

/// Requests for the events of all tenants have a quota of their own, under this name, which no tenant can have.
const ALL_TENANTS: &str = "*";

/// As much of a page as fits a message, and where the next page begins. The ledger already limits a page by its stored size;
/// here it is measured as sent, because metadata takes several times the size of its text.
fn fitting(page: Page) -> (Vec<v1::EventHistory>, Option<Cursor>) {
    let (mut events, mut bytes, mut last) = (Vec::with_capacity(page.events.len()), 0, None);
    for event in page.events {
        let cursor = Cursor::of(&event);
        let event = convert::listed(event);
        bytes += event.encoded_len();
        if bytes > Page::BYTES_MAX && !events.is_empty() {
            return (events, last);
        }
        events.push(event);
        last = Some(cursor);
    }
    (events, page.next)
}

#[tonic::async_trait]
impl IdempotencyService for Api {
    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        access::event(&request, Method::CheckAndLock, |request| request.key.as_ref())?;
        let (claim, wait) = validate::check_and_lock(request.into_inner(), &self.policy)?;
        self.within_quota(&claim.key.tenant)?;
        let claimed = match self.coordinator.claim(claim, wait).await? {
            Answer::Decided(claimed) => claimed,
            Answer::Completed(key, completion) => {
                tell(Told::Claimed(ClaimLabel::Duplicate));
                return Ok(Response::new(convert::completed(key, completion)));
            }
        };
        let decided = match claimed.decision {
            Decision::Acquired(_) => ClaimLabel::Acquired,
            Decision::AlreadyCompleted => ClaimLabel::Duplicate,
            Decision::InProgress { .. } => ClaimLabel::InProgress,
            Decision::Refused => ClaimLabel::Rejected,
        };
        if claimed.granted {
            self.metrics.granted(claimed.event.attempt_count);
        }
        if claimed.payload_changed {
            self.metrics.payload_changes.add();
            tracing::info!(
                provider = claimed.event.key.provider,
                fencing_token = claimed.event.fencing_token.0,
                "a known event came with another payload"
            );
        }
        tell(Told::Claimed(decided));
        Ok(Response::new(convert::claimed(claimed)))
    }

    async fn extend_lock(
        &self,
        request: Request<v1::ExtendLockRequest>,
    ) -> Result<Response<v1::ExtendLockResponse>, Status> {
        access::event(&request, Method::ExtendLock, |request| request.key.as_ref())?;
        let extend = validate::extend_lock(request.into_inner(), &self.policy)?;
        let lock = self.coordinator.extend(extend).await?;
        Ok(Response::new(v1::ExtendLockResponse { lock: Some(convert::lock(lock)) }))
    }

    async fn mark_completed(
        &self,
        request: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        access::event(&request, Method::MarkCompleted, |request| request.key.as_ref())?;
        let (mark, left_out) = validate::mark_completed(request.into_inner(), &self.policy)?;
        self.left_out(left_out);
        let marked = self.coordinator.mark(mark).await?;
        tell(self.metrics.marked(&marked.event, marked.repeated));
        let event = Some(self.marked(marked.event));
        Ok(Response::new(v1::MarkCompletedResponse { event, repeated: marked.repeated }))
    }

    async fn mark_failed(
        &self,
        request: Request<v1::MarkFailedRequest>,
    ) -> Result<Response<v1::MarkFailedResponse>, Status> {
        access::event(&request, Method::MarkFailed, |request| request.key.as_ref())?;
        let mark = validate::mark_failed(request.into_inner(), &self.policy)?;
        let marked = self.coordinator.mark(mark).await?;
        tell(self.metrics.marked(&marked.event, marked.repeated));
        let event = Some(self.marked(marked.event));
        Ok(Response::new(v1::MarkFailedResponse { event, repeated: marked.repeated }))
    }

    async fn history(&self, mut request: Request<v1::HistoryRequest>) -> Result<Response<v1::HistoryResponse>, Status> {
        match &request.get_ref().key {
            Some(_) => access::event(&request, Method::History, |request| request.key.as_ref())?,
            None => access::listing(&mut request, Method::History, |request| &mut request.tenant)?,
        }
        match validate::history(request.into_inner())? {
            validate::History::Event(key) => {
                self.within_quota(&key.tenant)?;
                let history =
                    self.coordinator.ledger().history_of(key).await?.ok_or(Error::Refused(Refusal::NotFound))?;
                Ok(Response::new(v1::HistoryResponse {
                    events: vec![convert::event_history(history)],
                    next_page_token: String::new(),
                }))
            }
            validate::History::Page(filter) => {
                self.within_quota(filter.tenant.as_deref().unwrap_or(ALL_TENANTS))?;
                let (events, next) = fitting(self.coordinator.ledger().history(filter.clone()).await?);
                let next_page_token = next.map(|next| page_token::encode(next, &filter)).unwrap_or_default();
                Ok(Response::new(v1::HistoryResponse { events, next_page_token }))
            }
        }
    }

    async fn resolve(&self, request: Request<v1::ResolveRequest>) -> Result<Response<v1::ResolveResponse>, Status> {
        access::event(&request, Method::Resolve, |request| request.key.as_ref())?;
        let who = Who::of(&request);
        let resolve = validate::resolve(request.into_inner())
            .inspect_err(|status| audit::refused(&who, Method::Resolve, status))?;
        let (to, decision) = (resolve.to, audit::Decision::new(who, &resolve));
        let span = Span::current();
        let event = self.coordinator.resolve(resolve, move |answer| span.in_scope(|| decision.ended(answer))).await?;
        self.metrics.resolved(to);
        Ok(Response::new(v1::ResolveResponse { event: Some(convert::event(event).0) }))
    }

    async fn stats(&self, mut request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        access::listing(&mut request, Method::Stats, |request| &mut request.tenant)?;
        let filter = validate::stats(request.into_inner())?;
        self.within_quota(filter.tenant.as_deref().unwrap_or(ALL_TENANTS))?;
        let bucket = filter.bucket;
        let report = self.coordinator.ledger().stats(filter).await?;
        validate::counts_within_limit(report.counts.len(), bucket.is_some())?;
        if let Some(bucket) = bucket
            && let (Some((first, _)), Some((last, _))) = (report.counts.keys().next(), report.counts.keys().next_back())
        {
            validate::buckets_within_limit(*first, *last, bucket)?;
        }
        let answer = convert::stats(report, bucket.is_some());
        validate::stats_within_limit(answer.encoded_len(), bucket.is_some())?;
        Ok(Response::new(answer))
    }

    type CleanupStream = ReceiverStream<Result<v1::CleanupResponse, Status>>;

    async fn cleanup(&self, mut request: Request<v1::CleanupRequest>) -> Result<Response<Self::CleanupStream>, Status> {
        access::listing(&mut request, Method::Cleanup, |request| &mut request.tenant)?;
        let who = Who::of(&request);
        let wanted = validate::cleanup(request.into_inner(), &self.policy)
            // Asking for something that would delete too much deserves a log line more than any other caller's mistake.
            .inspect_err(|status| audit::refused(&who, Method::Cleanup, status))?;
        let now = self.coordinator.ledger().cleanup_now().await?;
        let scope = CleanupScope {
            tenant: wanted.tenant,
            provider: wanted.provider,
            before: now.minus(wanted.older_than),
            states: wanted.states,
            dry_run: wanted.dry_run,
            batch_size: wanted.batch_size,
        };
        // One message is buffered: a client that reads slowly slows the Cleanup down, and one that goes away ends it.
        let (progress, stream) = mpsc::channel(1);
        let coordinator = self.coordinator.clone();
        let mut counting = Counting::new(self.metrics.clone(), &scope);
        // Run as a task of the coordinator, so that what it deleted is recorded even if the service ends meanwhile.
        self.coordinator.spawn(async move {
            let tell = |update: cleanup::Update<'_>| {
                let message = match update {
                    cleanup::Update::Progress(totals) => {
                        counting.goes_on(totals);
                        Ok(cleanup_response(totals))
                    }
                    cleanup::Update::Failed(error) => {
                        let stopping = coordinator.closing().is_cancelled();
                        counting.end(if stopping { CleanupEnd::Stopping } else { CleanupEnd::Failed });
                        Err(Status::from(error))
                    }
                };
                let progress = progress.clone();
                async move { progress.send(message).await.is_ok() }
            };
            let (totals, end) = cleanup::run(&coordinator, &scope, tell).await;
            counting.ended(&totals, &end);
            audit::cleanup(&who, &scope, &totals, &end);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Reports a Cleanup to the metrics; a dry run reports nothing.
struct Counting {
    metrics: Option<Arc<Metrics>>,
    deleted: i64,
    ended: bool,
}

impl Counting {
    fn new(metrics: Arc<Metrics>, scope: &CleanupScope) -> Self {
        Self { metrics: (!scope.dry_run).then_some(metrics), deleted: 0, ended: false }
    }

    /// Called before the caller hears of it.
    fn goes_on(&mut self, progress: &CleanupProgress) {
        let Some(metrics) = &self.metrics else { return };
        let deleted = progress.providers.values().map(|totals| totals.deleted).sum();
        metrics.cleaned(deleted - self.deleted);
        self.deleted = deleted;
        if progress.done {
            self.end(CleanupEnd::Done);
        }
    }

    /// Only the first call counts.
    fn end(&mut self, end: CleanupEnd) {
        if let (Some(metrics), false) = (&self.metrics, mem::replace(&mut self.ended, true)) {
            metrics.cleanup_ended(end);
        }
    }

    /// Including what was deleted since the last message, whether or not anybody received it.
    fn ended(&mut self, progress: &CleanupProgress, end: &cleanup::End) {
        self.goes_on(progress);
        self.end(match end {
            cleanup::End::Done => CleanupEnd::Done,
            cleanup::End::CallerGone => CleanupEnd::CallerGone,
            cleanup::End::Stopping => CleanupEnd::Stopping,
            cleanup::End::Failed(_) => CleanupEnd::Failed,
        });
    }
}

fn cleanup_response(progress: &CleanupProgress) -> v1::CleanupResponse {
    let providers: Vec<v1::ProviderCleanup> = progress
        .providers
        .iter()
        .map(|(provider, totals)| v1::ProviderCleanup {
            provider: provider.clone(),
            matched_count: totals.matched,
            deleted_count: totals.deleted,
            oldest_end_time: totals.oldest_end_time.map(convert::timestamp),
        })
        .collect();
    v1::CleanupResponse {
        matched_count: providers.iter().map(|provider| provider.matched_count).sum(),
        deleted_count: providers.iter().map(|provider| provider.deleted_count).sum(),
        providers,
        done: progress.done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::stats::CacheStats,
        event::{Claim, FencingToken, RowId, Time, fixture::claim},
        ledger::filter::CleanupTotals,
        metrics::Gauges,
    };

    /// With 8 KiB of metadata, which are 45 in a message.
    fn event(row: i64) -> Event {
        let claim = Claim {
            metadata: Some(format!("{{\"numbers\":[{}]}}", ["1"; 4_000].join(","))),
            ..claim(&format!("evt_{row}"), "claim")
        };
        Event::inserted(&claim, RowId(row), FencingToken(row), Time(row))
    }

    #[test]
    fn a_cleanup_is_counted_once_with_all_that_it_deleted_however_it_ends() {
        use cleanup::End::{CallerGone, Done, Failed};
        let progress = |deleted, done| CleanupProgress {
            providers: [("stripe".to_owned(), CleanupTotals { deleted, ..CleanupTotals::default() })].into(),
            done,
            ..CleanupProgress::default()
        };
        let failed = || Failed(Error::OutcomeUnknown);
        for (dry_run, told, last, end, counted) in [
            (false, progress(3, false), progress(5, false), CallerGone, ("caller_gone", 5)),
            (false, progress(3, false), progress(5, false), failed(), ("failed", 5)),
            (false, progress(5, true), progress(5, true), Done, ("done", 5)),
            // Nothing was left to do when nobody was there to receive the last message.
            (false, progress(5, true), progress(5, true), CallerGone, ("done", 5)),
            (true, progress(0, false), progress(0, true), Done, ("", 0)),
        ] {
            let metrics = Arc::new(Metrics::default());
            let scope = CleanupScope {
                tenant: None,
                provider: None,
                before: Time(0),
                states: Vec::new(),
                dry_run,
                batch_size: 1,
            };
            let mut counting = Counting::new(metrics.clone(), &scope);
            counting.goes_on(&told);
            counting.ended(&last, &end);
            let page = metrics.render(&CacheStats::default(), &Gauges::default());
            let row = |name: &str| page.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
            assert_eq!(row("oncegate_cleanup_events_deleted_total "), Some(counted.1.to_string()), "{end:?}");
            for result in ["done", "failed", "caller_gone"] {
                let runs = u64::from(result == counted.0);
                let name = format!("oncegate_cleanup_runs_total{{result=\"{result}\"}} ");
                assert_eq!(row(&name), Some(runs.to_string()), "{result} after {end:?}");
            }
        }
    }

    #[test]
    fn a_page_fits_in_a_message_and_the_next_begins_where_it_ended() {
        let events: Vec<_> = (0..200).rev().map(event).collect();
        let (fitting, next) = fitting(Page { events: events.clone(), next: None });
        let count = fitting.len();
        assert!(count > 50, "{count}");
        let message = v1::HistoryResponse { events: fitting, next_page_token: "x".repeat(200) };
        // What clients accept by default.
        assert!(message.encoded_len() < 4 << 20, "{}", message.encoded_len());
        assert_eq!(next, Some(Cursor::of(&events[count - 1])));
        let whole = super::fitting(Page { events: events[..count].to_vec(), next: None });
        assert_eq!((whole.0.len(), whole.1), (count, None));
    }
}
