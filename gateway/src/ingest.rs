//! From a request to a verified event, the cheap checks first (G2, W11): size, encoding, signature headers, body,
//! signature, and only then the content of the body. A request that fails here leaves nothing behind but a count.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, header, request::Parts};
use http_body::Body;

use crate::{
    answer::{Answer, RetryAfter},
    body::{self, Budget, Stopped},
    config::BodyLimits,
    delivery::Event,
    failures::{FailureLimits, Failures, Origin},
    metrics::Metrics,
    providers::{Refusal, paypal},
    route::Route,
};
use oncegate_runtime::throttle::Throttle;

/// For how long, and how many bytes of, the rest of a refused request is read.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);
const DISCARD_BYTES_MAX: usize = 1024 * 1024;

/// Admits webhooks.
pub(crate) struct Ingest {
    limits: BodyLimits,
    budget: Budget,
    metrics: Arc<Metrics>,
    refusals: Throttle,
    shares: Throttle,
    failures: Failures,
}

impl Ingest {
    pub(crate) fn new(limits: BodyLimits, failures: FailureLimits, metrics: Arc<Metrics>) -> Self {
        Self {
            limits,
            budget: Budget::new(&limits),
            metrics,
            refusals: Throttle::default(),
            shares: Throttle::default(),
            failures: Failures::new(failures),
        }
    }

    /// The budget for bodies, in KiB.
    pub(crate) fn budget_kib(&self) -> usize {
        body::budget_kib(&self.limits)
    }

    /// What is left of the budget for bodies, in KiB.
    pub(crate) fn budget_left_kib(&self) -> usize {
        self.budget.left_kib()
    }

    /// Admits a request on `route` from `peer`, or says what to answer. Signatures are judged at `now`.
    pub(crate) async fn admit<B>(
        &self,
        route: &Arc<Route>,
        parts: Parts,
        mut body: B,
        peer: Option<SocketAddr>,
        now: SystemTime,
    ) -> Result<Event, Answer>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Send,
    {
        let checked = self.check(route, parts, &mut body, peer, now).await;
        checked.map_err(|(answer, unread)| {
            if unread == Unread::Rest {
                forget(body);
            }
            answer
        })
    }

    async fn check<B>(
        &self,
        route: &Arc<Route>,
        parts: Parts,
        body: &mut B,
        peer: Option<SocketAddr>,
        now: SystemTime,
    ) -> Result<Event, (Answer, Unread)>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let early = unread(&parts.headers);
        // The exact size where there is a Content-Length; says nothing of a chunked body.
        let announced = body.size_hint().lower();
        if usize::try_from(announced).unwrap_or(usize::MAX) > self.limits.bytes_max {
            return Err((Answer::TooLarge, early));
        }
        if is_encoded(&parts.headers) {
            return Err((Answer::Encoded, early));
        }
        let verification = route
            .provider
            .begin(&parts.headers)
            .map_err(|refusal| self.refuse(route, refusal, &parts.headers, peer, early))?;
        let origin = self.failures.origin(&parts.headers, peer);
        let read = body::read(body, &self.limits, &self.budget, origin.alone()).await;
        let mut received = read.map_err(|stopped| match stopped {
            Stopped::TooLarge => (Answer::TooLarge, Unread::Rest),
            Stopped::OverBudget => (Answer::Overloaded, Unread::Rest),
            Stopped::OverShare => {
                self.report_share(origin);
                (Answer::Overloaded, Unread::Rest)
            }
            Stopped::TimedOut => (Answer::TooSlow, Unread::Nothing),
            Stopped::Broken => (Answer::MalformedRequest, Unread::Nothing),
        })?;
        let signed = verification
            .sent_by(origin.source)
            .finish(&received.bytes, now)
            .await
            .map_err(|refusal| self.refuse(route, refusal, &parts.headers, peer, Unread::Nothing))?;
        self.metrics.verified(&route.provider, signed.secret);
        received.verified();
        let identity = route.provider.identify(&signed, &received.bytes, || *received.digest()).map_err(|error| {
            // Signed by the provider and yet no event: worth a line.
            tracing::warn!(provider = route.provider.name(), %error, "verified webhook is refused");
            (Answer::MalformedBody, Unread::Nothing)
        })?;
        self.metrics.admitted(&route.provider);
        let delivery_id = signed.delivery_id.unwrap_or_default();
        Ok(Event { route: route.clone(), identity, delivery_id, headers: parts.headers, body: received })
    }

    /// There may be room in the budget when somebody looks at it, so the log has to say why a webhook was sent away.
    /// Throttled, because strangers choose how often.
    fn report_share(&self, origin: Origin) {
        let (Some(source), Some(unreported)) = (origin.source, self.shares.pass()) else { return };
        tracing::warn!(%source, unreported, "a source has its share of the budget for bodies, webhook refused");
    }

    fn refuse(
        &self,
        route: &Arc<Route>,
        refusal: Refusal,
        headers: &HeaderMap,
        peer: Option<SocketAddr>,
        unread: Unread,
    ) -> (Answer, Unread) {
        self.metrics.refused(&route.provider, refusal);
        let counts = refusal.is_the_senders();
        if let Some(wait) = counts.then(|| self.failures.add(route, headers, peer)).flatten() {
            return (Answer::TooManyFailures(RetryAfter::after(wait)), Unread::Nothing);
        }
        // Providers disable an endpoint that refuses them for days, so an operator has to hear of it; but a stranger must
        // not be able to fill the log.
        if let Some(unreported) = self.refusals.pass() {
            tracing::warn!(
                provider = route.provider.name(),
                verdict = refusal.name(),
                unreported,
                "signature was refused"
            );
        }
        let answer = match refusal {
            // The one refusal that waiting mends (G6).
            Refusal::CertUnavailable(_) => Answer::Unavailable(RetryAfter::after(paypal::store::FAILURE_KEPT)),
            Refusal::MissingHeader
            | Refusal::MalformedHeader
            | Refusal::MalformedBody
            | Refusal::BadSignature
            | Refusal::TimestampOutOfTolerance
            | Refusal::MissingSecret
            | Refusal::UnsupportedAlgorithm
            | Refusal::UntrustedCertUrl
            | Refusal::UntrustedCertificate => Answer::Unauthorized,
        };
        (answer, unread)
    }
}

/// How much of a refused request is still to be read, so that its sender sees the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unread {
    Nothing,
    Rest,
}

/// What is still to be read of a request whose body nobody has begun to read.
fn unread(headers: &HeaderMap) -> Unread {
    // Its sender waits for a 100 and has sent nothing yet; reading would send that 100.
    if headers.contains_key(header::EXPECT) { Unread::Nothing } else { Unread::Rest }
}

/// Refuses a request by its path or method alone.
pub(crate) fn refuse_unread<B>(answer: Answer, headers: &HeaderMap, body: B) -> Answer
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Send,
{
    if unread(headers) == Unread::Rest {
        forget(body);
    }
    answer
}

/// Reads the rest in the background.
fn forget<B>(body: B)
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Send,
{
    if !body.is_end_stream() {
        tokio::spawn(body::discard(body, DISCARD_BYTES_MAX, DISCARD_TIMEOUT));
    }
}

/// Whether the body is something other than the bytes that were signed. `identity` is no encoding, and of the transfer
/// codings only `chunked`, once, is undone on the way here; below it the body is still coded.
fn is_encoded(headers: &HeaderMap) -> bool {
    let contents = headers.get_all(header::CONTENT_ENCODING).iter().any(|value| {
        let value = value.as_bytes().trim_ascii();
        !value.is_empty() && !value.eq_ignore_ascii_case(b"identity")
    });
    // Several lines are one list, whose empty elements do not count (RFC 9110, 5.3 and 5.6.1).
    let lines = headers.get_all(header::TRANSFER_ENCODING).iter();
    let mut codings = lines
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|coding| !coding.is_empty());
    contents
        || codings.next().is_some_and(|coding| !coding.eq_ignore_ascii_case(b"chunked"))
        || codings.next().is_some()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn only_identity_is_no_encoding() {
        for (value, encoded) in [
            ("identity", false),
            ("Identity", false),
            ("", false),
            ("gzip", true),
            ("identity, gzip", true),
            ("x", true),
        ] {
            let mut headers = HeaderMap::new();
            headers.append(header::CONTENT_ENCODING, HeaderValue::from_static(value));
            assert_eq!(is_encoded(&headers), encoded, "{value}");
        }
        assert!(!is_encoded(&HeaderMap::new()));
    }

    #[test]
    fn of_transfer_codings_only_a_single_chunked_is_no_encoding() {
        for (lines, encoded) in [
            (&["chunked"][..], false),
            (&["\tChunked "], false),
            (&[", chunked,"], false),
            (&["", "CHUNKED"], false),
            (&["gzip, chunked"], true),
            (&["gzip,chunked"], true),
            (&["gzip", "chunked"], true),
            (&["identity, chunked"], true),
            (&["chunked, chunked"], true),
            (&["chunked", "chunked"], true),
            (&["gzip"], true),
            (&["chunkedd"], true),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(header::TRANSFER_ENCODING, HeaderValue::from_static(line));
            }
            assert_eq!(is_encoded(&headers), encoded, "{lines:?}");
        }
    }
}
