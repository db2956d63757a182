//! What the provider is told: the one table that maps outcomes to status, word and `Retry-After` (G6).
//!
//! Success is exactly 200. Nothing of the request is reflected (W16), and every refusal of a signature looks the same.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;

use oncegate_runtime::labels;

use crate::config::{HeldStatus, InProgressStatus};

/// The body type of every answer.
pub(crate) type Body = Full<Bytes>;

/// When asking again makes sense: rounded up to whole seconds, at least one, at most [`RETRY_AFTER_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RetryAfter(Duration);

/// Providers that obey the header should not be kept away for longer than by their own schedule. That holds for the
/// application's wish as well, which is passed on (G5) within this limit.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);

/// A delivery that outlived the answer's deadline has had 20 s by default; most that take longer are done after as much again.
const CONTINUES_PAUSE: Duration = Duration::from_secs(30);

/// A 401 has to say how to authenticate (RFC 9110, 15.5.2). That is by the signature which the provider's documents describe
/// and no registered scheme is for: with a name of our own no client asks anybody for a password. The same for every refusal,
/// so that it tells a stranger nothing (W4).
const CHALLENGE: HeaderValue = HeaderValue::from_static("Webhook-Signature");

impl RetryAfter {
    /// One second: for what is over by then, or is still the same at the next try.
    pub(crate) const SOON: Self = Self(Duration::from_secs(1));

    pub(crate) const fn after(pause: Duration) -> Self {
        Self(pause)
    }

    fn value(self) -> HeaderValue {
        let pause = self.0.min(RETRY_AFTER_MAX);
        HeaderValue::from(pause.as_secs() + u64::from(pause.subsec_nanos() > 0 || pause.is_zero()))
    }
}

labels! {
    /// The words of the answers: a closed list, so that no request can create a metrics series. They are an interface and
    /// never change their meaning.
    pub(crate) enum Word {
        Processed => "processed",
        AlreadyProcessed => "already_processed",
        Failed => "failed",
        InProgress => "in_progress",
        Paused => "paused",
        Held => "held",
        Conflict => "conflict",
        Unauthorized => "unauthorized",
        TooManyFailures => "too_many_failures",
        MalformedBody => "malformed_body",
        MalformedRequest => "malformed_request",
        TooSlow => "too_slow",
        TooLarge => "too_large",
        Encoded => "encoded",
        NotFound => "not_found",
        MethodNotAllowed => "method_not_allowed",
        Overloaded => "overloaded",
        Unavailable => "unavailable",
    }
}

/// How a request ended, as the provider sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The application took the event just now, and that is recorded.
    Processed,
    /// The application had taken the event before.
    AlreadyProcessed,
    /// The attempt failed, and that is recorded.
    Failed(Option<RetryAfter>),
    /// Somebody else holds the lock.
    InProgress(InProgressStatus, RetryAfter),
    /// The lock was lost, or nobody can say yet how the attempt ends.
    Unsettled(RetryAfter),
    /// The delivery goes on, but the provider has waited long enough (G8).
    Continues,
    /// A pause after a failure has not passed.
    Paused(RetryAfter),
    /// Dead or unknown: a person has to decide.
    Held(HeldStatus),
    /// The event was first claimed with something else.
    Conflict,
    /// Any verdict on signature, header or certificate.
    Unauthorized,
    /// Such a verdict for a sender that has had too many of them (W14).
    TooManyFailures(RetryAfter),
    /// The body is not a single JSON object that names its event exactly once.
    MalformedBody,
    /// The request states its length in two ways, or breaks off.
    MalformedRequest,
    /// The body did not arrive in time.
    TooSlow,
    /// The body is larger than permitted.
    TooLarge,
    /// The body is encoded (compressed, say), but signatures cover the plain bytes.
    Encoded,
    /// No such route.
    NotFound,
    /// The method is not permitted; these are.
    MethodNotAllowed(&'static str),
    /// Too much is under way.
    Overloaded,
    /// The store, the sidecar or a certificate is unavailable.
    Unavailable(RetryAfter),
    /// A defect of ours, which the log describes.
    Defect,
}

impl Answer {
    /// Status and word.
    pub(crate) fn status_and_word(&self) -> (StatusCode, Word) {
        match self {
            Self::Processed => (StatusCode::OK, Word::Processed),
            Self::AlreadyProcessed => (StatusCode::OK, Word::AlreadyProcessed),
            // All that the provider has to know is that it should send the event again.
            Self::Failed(_) | Self::Defect => (StatusCode::INTERNAL_SERVER_ERROR, Word::Failed),
            Self::InProgress(InProgressStatus::Conflict, _) | Self::Unsettled(_) => {
                (StatusCode::CONFLICT, Word::InProgress)
            }
            Self::InProgress(InProgressStatus::Ok, _) => (StatusCode::OK, Word::InProgress),
            Self::Continues => (StatusCode::SERVICE_UNAVAILABLE, Word::InProgress),
            Self::Paused(_) => (StatusCode::SERVICE_UNAVAILABLE, Word::Paused),
            Self::Held(HeldStatus::Unprocessable) => (StatusCode::UNPROCESSABLE_ENTITY, Word::Held),
            Self::Held(HeldStatus::Ok) => (StatusCode::OK, Word::Held),
            Self::Conflict => (StatusCode::UNPROCESSABLE_ENTITY, Word::Conflict),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, Word::Unauthorized),
            Self::TooManyFailures(_) => (StatusCode::TOO_MANY_REQUESTS, Word::TooManyFailures),
            Self::MalformedBody => (StatusCode::BAD_REQUEST, Word::MalformedBody),
            Self::MalformedRequest => (StatusCode::BAD_REQUEST, Word::MalformedRequest),
            Self::TooSlow => (StatusCode::REQUEST_TIMEOUT, Word::TooSlow),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, Word::TooLarge),
            Self::Encoded => (StatusCode::UNSUPPORTED_MEDIA_TYPE, Word::Encoded),
            Self::NotFound => (StatusCode::NOT_FOUND, Word::NotFound),
            Self::MethodNotAllowed(_) => (StatusCode::METHOD_NOT_ALLOWED, Word::MethodNotAllowed),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, Word::Overloaded),
            Self::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, Word::Unavailable),
        }
    }

    /// Whether anybody can cause this answer without a signature, and without a failure being counted (W14).
    pub(crate) fn is_anybodys(&self) -> bool {
        match self {
            Self::MalformedRequest
            | Self::TooSlow
            | Self::TooLarge
            | Self::Encoded
            | Self::NotFound
            | Self::MethodNotAllowed(_) => true,
            Self::Processed
            | Self::AlreadyProcessed
            | Self::Failed(_)
            | Self::InProgress(..)
            | Self::Unsettled(_)
            | Self::Continues
            | Self::Paused(_)
            | Self::Held(_)
            | Self::Conflict
            | Self::Unauthorized
            | Self::TooManyFailures(_)
            | Self::MalformedBody
            | Self::Overloaded
            | Self::Unavailable(_)
            | Self::Defect => false,
        }
    }

    fn body(&self) -> Bytes {
        // Written out, so that the common answers allocate nothing.
        match self.status_and_word().1 {
            Word::Processed => Bytes::from_static(br#"{"status":"processed"}"#),
            Word::AlreadyProcessed => Bytes::from_static(br#"{"status":"already_processed"}"#),
            Word::Unauthorized => Bytes::from_static(br#"{"status":"unauthorized"}"#),
            word => Bytes::from(format!(r#"{{"status":"{}"}}"#, word.name())),
        }
    }

    fn retry_after(&self) -> Option<HeaderValue> {
        match self {
            Self::Failed(after) => after.map(RetryAfter::value),
            Self::InProgress(InProgressStatus::Conflict, after)
            | Self::Unsettled(after)
            | Self::Paused(after)
            | Self::TooManyFailures(after)
            | Self::Unavailable(after) => Some(after.value()),
            Self::Continues => Some(RetryAfter::after(CONTINUES_PAUSE).value()),
            Self::Overloaded => Some(RetryAfter::SOON.value()),
            Self::Processed
            | Self::AlreadyProcessed
            | Self::InProgress(InProgressStatus::Ok, _)
            | Self::Held(_)
            | Self::Conflict
            | Self::Unauthorized
            | Self::MalformedBody
            | Self::MalformedRequest
            | Self::TooSlow
            | Self::TooLarge
            | Self::Encoded
            | Self::NotFound
            | Self::MethodNotAllowed(_)
            | Self::Defect => None,
        }
    }

    /// The answer as it goes out.
    pub(crate) fn response(&self) -> Response<Body> {
        let mut response = json(self.status_and_word().0, self.body());
        let headers = response.headers_mut();
        if let Some(value) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, value);
        }
        match self {
            Self::MethodNotAllowed(methods) => {
                headers.insert(header::ALLOW, HeaderValue::from_static(methods));
            }
            Self::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, CHALLENGE);
            }
            // What follows on the connection cannot be told apart from the rest of this request, or is not worth reading.
            Self::MalformedRequest | Self::TooSlow | Self::TooLarge | Self::TooManyFailures(_) => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Self::Processed
            | Self::AlreadyProcessed
            | Self::Failed(_)
            | Self::InProgress(..)
            | Self::Unsettled(_)
            | Self::Continues
            | Self::Paused(_)
            | Self::Held(_)
            | Self::Conflict
            | Self::MalformedBody
            | Self::Encoded
            | Self::NotFound
            | Self::Overloaded
            | Self::Unavailable(_)
            | Self::Defect => {}
        }
        response
    }
}

/// A JSON answer that no cache may keep (W16).
pub(crate) fn json(status: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g6_every_outcome_has_its_status_word_and_retry_after() {
        let pause = || RetryAfter::after(Duration::from_millis(2_500));
        for (answer, status, word, retry_after) in [
            (Answer::Processed, 200, "processed", None),
            (Answer::AlreadyProcessed, 200, "already_processed", None),
            (Answer::Failed(None), 500, "failed", None),
            (Answer::Failed(Some(pause())), 500, "failed", Some("3")),
            (Answer::Failed(Some(RetryAfter::after(Duration::from_secs(120)))), 500, "failed", Some("120")),
            (Answer::InProgress(InProgressStatus::Conflict, pause()), 409, "in_progress", Some("3")),
            (Answer::InProgress(InProgressStatus::Ok, pause()), 200, "in_progress", None),
            (Answer::Unsettled(RetryAfter::SOON), 409, "in_progress", Some("1")),
            (Answer::Continues, 503, "in_progress", Some("30")),
            (Answer::Paused(RetryAfter::after(Duration::from_secs(86_400))), 503, "paused", Some("3600")),
            (Answer::Held(HeldStatus::Unprocessable), 422, "held", None),
            (Answer::Held(HeldStatus::Ok), 200, "held", None),
            (Answer::Conflict, 422, "conflict", None),
            (Answer::Unauthorized, 401, "unauthorized", None),
            (Answer::TooManyFailures(pause()), 429, "too_many_failures", Some("3")),
            (Answer::MalformedBody, 400, "malformed_body", None),
            (Answer::MalformedRequest, 400, "malformed_request", None),
            (Answer::TooSlow, 408, "too_slow", None),
            (Answer::TooLarge, 413, "too_large", None),
            (Answer::Encoded, 415, "encoded", None),
            (Answer::NotFound, 404, "not_found", None),
            (Answer::MethodNotAllowed("POST"), 405, "method_not_allowed", None),
            (Answer::Overloaded, 503, "overloaded", Some("1")),
            (Answer::Unavailable(RetryAfter::after(Duration::ZERO)), 503, "unavailable", Some("1")),
            (Answer::Defect, 500, "failed", None),
        ] {
            let response = answer.response();
            assert_eq!(response.status().as_u16(), status, "{answer:?}");
            assert_eq!(answer.body(), format!(r#"{{"status":"{word}"}}"#), "{answer:?}");
            assert_eq!(answer.status_and_word().1.name(), word, "{answer:?}");
            let header = response.headers().get(header::RETRY_AFTER).map(|value| value.to_str().unwrap());
            assert_eq!(header, retry_after, "{answer:?}");
            assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
            assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        }
    }

    #[test]
    fn a_401_and_nothing_else_says_how_to_authenticate() {
        let challenge = |answer: Answer| answer.response().headers().get(header::WWW_AUTHENTICATE).cloned();
        assert_eq!(challenge(Answer::Unauthorized).unwrap(), "Webhook-Signature");
        for other in [Answer::TooManyFailures(RetryAfter::SOON), Answer::NotFound, Answer::Processed] {
            assert_eq!(challenge(other), None);
        }
    }

    #[test]
    fn a_refused_method_names_the_permitted_ones() {
        assert_eq!(Answer::MethodNotAllowed("GET, POST").response().headers()[header::ALLOW], "GET, POST");
    }
}
