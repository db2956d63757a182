//! The API over the embedded store, set up by options as the program is.

use std::time::Duration;

use oncegate_api::{
    reason,
    v1::{self, Decision, FailureKind, State, idempotency_service_client::IdempotencyServiceClient},
};
use prost::Message as _;
use tempfile::TempDir;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::Service;
use crate::{Sidecar, config::Options};

/// How long a test waits for what should happen at once. Long, because only a failure ever uses it up.
const DEADLINE: Duration = Duration::from_secs(60);

/// A sidecar that listens nowhere: its service is called in the process.
struct Served {
    sidecar: Sidecar,
    client: IdempotencyServiceClient<Service>,
    _directory: TempDir,
}

impl Served {
    async fn with(options: &[&str]) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("oncegate.db");
        let own = ["--sidecar-listen", "127.0.0.1:0", "--store", file.to_str().unwrap()];
        let settings = Options::of(&[&own, options].concat()).validate().unwrap();
        let sidecar = Sidecar::start(settings).await.unwrap();
        let client = IdempotencyServiceClient::new(sidecar.service());
        Served { sidecar, client, _directory: directory }
    }

    async fn claim(&self, request: v1::CheckAndLockRequest) -> Result<v1::CheckAndLockResponse, Status> {
        Ok(self.client.clone().check_and_lock(request).await?.into_inner())
    }

    async fn lock(&self, request: v1::CheckAndLockRequest) -> v1::Lock {
        self.claim(request).await.unwrap().lock.expect("the lock")
    }

    /// Claims an event, and has it fail in a way that may be tried again: what that makes of it.
    async fn failed(&self, key: Option<v1::EventKey>) -> State {
        let lock = self.lock(claim(key.clone())).await;
        let kind = FailureKind::Retryable.into();
        let failed = v1::MarkFailedRequest { key, fencing_token: lock.fencing_token, kind, ..Default::default() };
        self.client.clone().mark_failed(failed).await.unwrap().into_inner().event.expect("the event").state()
    }

    /// Returns once so many calls wait for an outcome.
    async fn until_waiting(&self, calls: usize) {
        let wait = async {
            while self.sidecar.coordinator.occupancy().waiting != calls {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.expect("they wait");
    }
}

fn key(provider: &str, event_id: &str) -> Option<v1::EventKey> {
    Some(v1::EventKey { tenant: String::new(), provider: provider.into(), event_id: event_id.into() })
}

fn claim(key: Option<v1::EventKey>) -> v1::CheckAndLockRequest {
    v1::CheckAndLockRequest { key, event_type: "charge.succeeded".into(), ..Default::default() }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[tokio::test]
async fn s6_a_lock_lasts_as_long_as_is_configured_unless_the_call_says_otherwise() {
    let served = Served::with(&["--lock-duration", "7m"]).await;
    let lock = served.lock(claim(key("stripe", "evt_1"))).await;
    assert_eq!(lock.remaining_duration, seconds(420));
    let short = v1::CheckAndLockRequest { lock_duration: seconds(60), ..claim(key("stripe", "evt_2")) };
    let lock = served.lock(short).await;
    assert_eq!(lock.remaining_duration, seconds(60));
    let extend =
        v1::ExtendLockRequest { key: key("stripe", "evt_2"), fencing_token: lock.fencing_token, ..Default::default() };
    let extended = served.client.clone().extend_lock(extend).await.unwrap().into_inner().lock.expect("the lock");
    assert_eq!(extended.remaining_duration, seconds(420));
}

#[tokio::test]
async fn s7_attempts_are_capped_as_is_configured_for_all_providers_and_for_single_ones() {
    let caps = ["--attempts-max", "2", "--provider-attempts-max", "paystack=1,flutterwave=0"];
    let served = Served::with(&caps).await;
    for (provider, states) in [
        ("stripe", &[State::Failed, State::Dead][..]),
        ("paystack", &[State::Dead]),
        ("flutterwave", &[State::Failed, State::Failed, State::Failed, State::Failed]),
    ] {
        for (attempt, state) in states.iter().enumerate() {
            assert_eq!(served.failed(key(provider, "evt_1")).await, *state, "{provider}, after {attempt} attempts");
        }
    }
    // A claim meets the cap too, where the lock of the last attempt has expired.
    let short = v1::CheckAndLockRequest { lock_duration: seconds(1), ..claim(key("paystack", "evt_2")) };
    served.lock(short).await;
    let next = v1::CheckAndLockRequest { wait_duration: seconds(30), ..claim(key("paystack", "evt_2")) };
    let refused = served.claim(next).await.unwrap();
    assert_eq!(refused.decision(), Decision::Refused);
    assert_eq!(refused.event.expect("the event").state(), State::Dead);
}

#[tokio::test]
async fn l9_with_every_seat_taken_in_progress_is_answered_at_once() {
    let served = Served::with(&["--sidecar-waiting-max", "1"]).await;
    let lock = served.lock(claim(key("stripe", "evt_1"))).await;
    served.lock(claim(key("stripe", "evt_2"))).await;
    let waiting_for = |event_id, wait| {
        let request = v1::CheckAndLockRequest { wait_duration: seconds(wait), ..claim(key("stripe", event_id)) };
        let mut client = served.client.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { client.check_and_lock(request).await }))
    };
    let seated = waiting_for("evt_1", 20);
    served.until_waiting(1).await;
    let answer = waiting_for("evt_1", 30).await.unwrap().unwrap().into_inner();
    assert_eq!(answer.decision(), Decision::InProgress);
    assert!(!seated.is_finished(), "it waited longer than the one that has the seat");
    let completed = v1::MarkCompletedRequest {
        key: key("stripe", "evt_1"),
        fencing_token: lock.fencing_token,
        ..Default::default()
    };
    served.client.clone().mark_completed(completed).await.unwrap();
    assert_eq!(seated.await.unwrap().unwrap().into_inner().decision(), Decision::AlreadyCompleted);
    // Whoever had the seat has given it back, and the next one has it.
    served.until_waiting(0).await;
    let _next = waiting_for("evt_2", 30);
    served.until_waiting(1).await;
}

#[tokio::test]
async fn a_message_of_a_mebibyte_is_read_and_one_with_a_byte_more_is_refused() {
    const MAX: usize = 1 << 20;
    let served = Served::with(&[]).await;
    let sized = |bytes: usize| {
        let mut request = claim(key("stripe", "evt_1"));
        request.holder = "h".repeat(bytes);
        let over = request.encoded_len() - bytes;
        request.holder.truncate(bytes - over);
        assert_eq!(request.encoded_len(), bytes);
        request
    };
    let refused = async |request| {
        let status = served.claim(request).await.expect_err("no holder is that long");
        let details = status.get_error_details();
        let reason = details.error_info().expect("every error has one").reason.clone();
        assert_eq!((status.code(), reason.as_str()), (Code::InvalidArgument, reason::INVALID_FIELD));
        let fields = details.bad_request().map_or(Vec::new(), |request| request.field_violations.clone());
        (fields.into_iter().map(|violation| violation.field).collect::<Vec<_>>(), status.message().to_owned())
    };
    let (fields, _) = refused(sized(MAX)).await;
    assert_eq!(fields, ["holder"], "it was read");
    let (fields, message) = refused(sized(MAX + 1)).await;
    assert!(fields.is_empty(), "it was read: {fields:?}");
    assert!(message.starts_with("the message is too large: ") && message.contains("1048576 bytes"), "{message}");
}

#[tokio::test]
async fn the_services_beside_the_api_read_no_larger_messages() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::{
        v1::{
            self, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest::ListServices,
        },
        v1alpha::{
            self, server_reflection_client::ServerReflectionClient as OlderClient,
            server_reflection_request::MessageRequest::ListServices as OlderListServices,
        },
    };
    const MAX: usize = 1 << 20;
    let served = Served::with(&[]).await;
    let check = HealthCheckRequest { service: "s".repeat(1_024) };
    let status = HealthClient::new(served.sidecar.service()).check(check).await.expect_err("too large");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("the limit is: 1024 bytes"), "{status:?}");
    // These say nothing about what they do not read, and the streams end. What is in the text makes no difference to them.
    for (bytes, is_read) in [(1, true), (MAX, false)] {
        let message_request = Some(ListServices("s".repeat(bytes)));
        let ask = v1::ServerReflectionRequest { message_request, ..Default::default() };
        let mut client = ServerReflectionClient::new(served.sidecar.service());
        let mut answers = client.server_reflection_info(futures::stream::iter([ask])).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap().is_some(), is_read, "{bytes}");
        let message_request = Some(OlderListServices("s".repeat(bytes)));
        let ask = v1alpha::ServerReflectionRequest { message_request, ..Default::default() };
        let mut client = OlderClient::new(served.sidecar.service());
        let mut answers = client.server_reflection_info(futures::stream::iter([ask])).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap().is_some(), is_read, "{bytes}");
    }
}
