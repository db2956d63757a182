//! Around every call: the caller's deadline, and an `ErrorInfo` on errors that the framework produced.
//!
//! tonic's own server answers an elapsed `grpc-timeout` with CANCELLED. Here it is DEADLINE_EXCEEDED,
//! and dropping the handler is harmless: the ledger's writer owns the work (L3).

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use http_body_util::BodyExt as _;
use oncegate_api::reason;
use tokio::time::Sleep;
use tonic::{Code, Status, body::Body, codegen::http};

use super::{
    access::Guard,
    arriving::{Arriving, Held},
    status::{retryable, status},
};
use crate::method::Called;

/// Tells the caller which compressions are accepted when a message was refused for its compression (gRPC's "Compression").
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";

/// What a service answers with.
pub(super) type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

/// A call that is being answered.
pub(super) enum Answering {
    /// Before it reached its service.
    Refused(Option<Box<http::Response<Body>>>),
    ByService(Answer),
    /// Within its caller's deadline.
    Within(Within),
}

/// A call, and the time that its caller gives it. Most duplicates are answered at once: the clock is read, and a timer set,
/// only for a call that has to wait.
pub(super) struct Within {
    answer: Answer,
    time: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Future for Within {
    /// None: the time is over.
    type Output = Option<Result<http::Response<Body>, Infallible>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(answer) = self.answer.as_mut().poll(cx) {
            return Poll::Ready(Some(answer));
        }
        let time = self.time;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(time)));
        timer.as_mut().poll(cx).map(|()| None)
    }
}

/// Lets a call pass to its service.
pub(super) fn answer<B>(
    called: Called,
    guard: Option<&Guard>,
    held: &Arc<Held>,
    mut request: http::Request<B>,
    service: impl FnOnce(http::Request<Arriving<B>>) -> Answer,
) -> Answering {
    let refused = |status: Status| Answering::Refused(Some(Box::new(status.into_http())));
    // This comes first, so that a stranger learns nothing about how the call would have ended.
    if let Some(Err(stranger)) = guard.map(|guard| guard.admit(called, &mut request)) {
        return refused(stranger);
    }
    let deadline = match request.headers().get("grpc-timeout").map(parse_timeout) {
        None => None,
        Some(Some(timeout)) => Some(timeout),
        Some(None) => {
            return refused(status(Code::InvalidArgument, reason::INVALID_FIELD, "grpc-timeout is malformed"));
        }
    };
    let watch = match (called == Called::Health && request.uri().path().ends_with("/Watch")).then(|| held.watch()) {
        None => None,
        Some(Ok(watch)) => Some(watch),
        Some(Err(full)) => return refused(full),
    };
    // Only reflection is asked again and again in one call.
    let is_timed = called != Called::Reflection;
    let mut answer = service(request.map(|body| Arriving::new(body, held, is_timed)));
    if let Some(watch) = watch {
        answer = Box::pin(async move {
            // Kept by the body, which goes when the caller has gone.
            let keep = move |frame| {
                let _watch = &watch;
                frame
            };
            answer.await.map(|response| response.map(|body| Body::new(body.map_frame(keep))))
        });
    }
    match deadline {
        None => Answering::ByService(answer),
        Some(time) => Answering::Within(Within { answer, time, timer: None }),
    }
}

impl Future for Answering {
    type Output = Result<http::Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response = match self.get_mut() {
            Answering::Refused(response) => {
                return Poll::Ready(Ok(*response.take().expect("a future is not polled after its end")));
            }
            Answering::ByService(answer) => ready!(answer.as_mut().poll(cx))?,
            Answering::Within(answer) => match ready!(Pin::new(answer).poll(cx)) {
                Some(response) => response?,
                None => retryable(
                    Code::DeadlineExceeded,
                    reason::DEADLINE_EXCEEDED,
                    "the deadline passed; the call may or may not have happened",
                    Duration::from_secs(1),
                )
                .into_http(),
            },
        };
        Poll::Ready(Ok(explained(response)))
    }
}

/// `grpc-timeout`: at most eight digits and a unit (gRPC over HTTP/2, "Requests").
fn parse_timeout(value: &http::HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count.saturating_mul(3_600)),
        "M" => Duration::from_secs(count.saturating_mul(60)),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// Gives an error that has no details the `ErrorInfo` that clients branch on: those of the framework, for a message that
/// is too large, does not decode or is compressed, or an unknown method.
fn explained(response: http::Response<Body>) -> http::Response<Body> {
    // An error without a body has its status in the headers; others were made by our own code.
    let headers = response.headers();
    if !headers.contains_key("grpc-status") || headers.contains_key("grpc-status-details-bin") {
        return response;
    }
    let Some(plain) = Status::from_header_map(headers).filter(|plain| plain.code() != Code::Ok) else {
        return response;
    };
    if plain.code() == Code::NotFound {
        // From the health service, about a service it does not know: not our mistake, and not about an event.
        return response;
    }
    let message = plain.message().to_owned();
    let accepted = headers.get(ACCEPT_ENCODING).cloned();
    let explained = match plain.code() {
        // tonic's word for a message over the limit.
        Code::OutOfRange => status(
            Code::InvalidArgument,
            reason::INVALID_FIELD,
            // The framework names the limit.
            format!("the message is too large: {message}"),
        ),
        Code::Internal => {
            // A message that does not decode is the caller's mistake; our own internal errors carry details.
            status(Code::InvalidArgument, reason::INVALID_FIELD, format!("the message does not decode: {message}"))
        }
        // For an unknown method the framework adds no message. Where there is one, it is about a compression that we do not
        // support.
        Code::Unimplemented if message.is_empty() => {
            status(Code::Unimplemented, reason::UNIMPLEMENTED, "there is no such method")
        }
        Code::Unimplemented => status(Code::Unimplemented, reason::UNIMPLEMENTED, message),
        code => status(code, reason::INTERNAL, message),
    };
    let mut response = explained.into_http();
    if let Some(accepted) = accepted {
        response.headers_mut().insert(ACCEPT_ENCODING, accepted);
    }
    response
}

#[cfg(test)]
mod tests {
    use tonic::{
        codegen::{Bytes, Service as _},
        service::Routes,
    };
    use tonic_types::StatusExt as _;

    use super::*;

    /// The answer to an empty message, as clients see it.
    async fn answered(path: &str, encoding: Option<&'static str>) -> (Code, String, String, Option<String>) {
        let (_, health) = tonic_health::server::health_reporter();
        let routes = Routes::new(health).prepare();
        let mut request = http::Request::post(path).header("content-type", "application/grpc");
        if let Some(encoding) = encoding {
            request = request.header("grpc-encoding", encoding);
        }
        reply(request, &[0; 5], routes).await
    }

    async fn reply(
        request: http::request::Builder,
        message: &'static [u8],
        routes: Routes,
    ) -> (Code, String, String, Option<String>) {
        let path = request.uri_ref().expect("a path").path().to_owned();
        let request = request.body(http_body_util::Full::new(Bytes::from_static(message))).expect("a request");
        let answer =
            answer(Called::of(&path), None, &Arc::default(), request, |request| Box::pin(routes.clone().call(request)));
        let response = answer.await.expect("an answer");
        let status = Status::from_header_map(response.headers()).unwrap_or_else(|| Status::ok(""));
        let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
        let accepted = response.headers().get(ACCEPT_ENCODING).map(|value| value.to_str().expect("text").to_owned());
        (status.code(), reason, status.message().to_owned(), accepted)
    }

    #[tokio::test]
    async fn a_compressed_request_is_told_about_its_encoding_and_not_about_its_method() {
        let path = "/grpc.health.v1.Health/Check";
        assert_eq!(answered(path, None).await.0, Code::Ok);
        let (code, reason, message, accepted) = answered(path, Some("gzip")).await;
        assert_eq!((code, reason.as_str()), (Code::Unimplemented, reason::UNIMPLEMENTED));
        assert!(message.contains("gzip"), "{message}");
        assert_eq!(accepted.as_deref(), Some("identity"));
        for path in ["/grpc.health.v1.Health/Forget", "/oncegate.v2.IdempotencyService/CheckAndLock"] {
            let (code, reason, message, accepted) = answered(path, None).await;
            assert_eq!((code, reason.as_str()), (Code::Unimplemented, reason::UNIMPLEMENTED), "{path}");
            assert_eq!((message.as_str(), accepted), ("there is no such method", None), "{path}");
        }
    }

    #[tokio::test]
    async fn a_service_that_is_not_known_to_health_is_no_defect_of_ours() {
        let (_, health) = tonic_health::server::health_reporter();
        let request = http::Request::post("/grpc.health.v1.Health/Check").header("content-type", "application/grpc");
        // The field `service`, "nobody".
        let message = b"\0\0\0\0\x08\x0a\x06nobody";
        let (code, reason, ..) = reply(request, message, Routes::new(health).prepare()).await;
        assert_eq!((code, reason.as_str()), (Code::NotFound, ""));
    }

    // L6
    #[tokio::test(start_paused = true)]
    async fn an_elapsed_deadline_says_when_to_ask_again() {
        let path = "/oncegate.v1.IdempotencyService/CheckAndLock";
        let request = http::Request::post(path).header("grpc-timeout", "100m").body(Body::empty()).expect("a request");
        let answer = answer(Called::of(path), None, &Arc::default(), request, |_| Box::pin(std::future::pending()));
        let response = answer.await.expect("an answer");
        let status = Status::from_header_map(response.headers()).expect("an error");
        let details = status.get_error_details();
        let reason = details.error_info().map(|info| info.reason.as_str());
        assert_eq!((status.code(), reason), (Code::DeadlineExceeded, Some(reason::DEADLINE_EXCEEDED)));
        let retry_delay = details.retry_info().and_then(|info| info.retry_delay);
        assert_eq!(retry_delay, Some(Duration::from_secs(1)));
    }

    #[test]
    fn timeouts_are_read_as_the_protocol_has_them() {
        let parsed = |text: &str| parse_timeout(&http::HeaderValue::from_str(text).expect("a header"));
        assert_eq!(parsed("2500m"), Some(Duration::from_millis(2_500)));
        assert_eq!(parsed("1H"), Some(Duration::from_secs(3_600)));
        assert_eq!(parsed("3S"), Some(Duration::from_secs(3)));
        assert_eq!(parsed("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for malformed in ["", "m", "5", "-5m", "5x", "999999999S", "1.5S", " 5S", "5 S"] {
            assert_eq!(parsed(malformed), None, "{malformed}");
        }
    }
}
