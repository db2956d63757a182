//! Somebody who tries every method with the credentials that it has.

use std::{path::Path, time::Duration};

use anyhow::Result;
use oncegate_api::{reason, v1, v1::idempotency_service_client::IdempotencyServiceClient};
use oncegate_e2e::certificates::Files;
use oncegate_gateway::sidecar::{Pool, ReachOptions};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};
use tonic_types::StatusExt as _;

/// The methods, in the order of the matrix's columns.
pub(super) const METHODS: [&str; 10] = [
    "CheckAndLock",
    "ExtendLock",
    "MarkCompleted",
    "MarkFailed",
    "History",
    "Resolve",
    "Stats",
    "Cleanup",
    "Health",
    "Reflection",
];

pub(super) fn pool(url: &str, ca: &Path, identity: Option<&Files>, token: Option<&str>) -> Result<Pool> {
    let reach = ReachOptions {
        url: url.to_owned(),
        ca_file: Some(ca.to_owned()),
        cert_file: identity.map(|files| files.certificate.clone()),
        key_file: identity.map(|files| files.key.clone()),
        token: token.map(Into::into),
        token_file: None,
        insecure: false,
        connect_timeout: Duration::from_secs(5),
        resolve_interval: Duration::from_secs(60),
        reload: Duration::from_secs(60),
    };
    Ok(Pool::new(reach.validate()?))
}

/// What came of a call: `+` it was let in, whatever became of it; `U` unauthenticated, `P` permission denied, `X` no
/// connection.
pub(super) async fn attempt(pool: &Pool, method: &str) -> Result<char> {
    let outcome = call(pool.clone(), method).await;
    let Err(status) = outcome else { return Ok('+') };
    let info = status.get_details_error_info();
    let said = info.as_ref().map_or("", |info| info.reason.as_str());
    Ok(match (status.code(), said) {
        (Code::Unauthenticated, reason::UNAUTHENTICATED) => 'U',
        (Code::PermissionDenied, reason::PERMISSION_DENIED) => 'P',
        // Let in, and told that there is no such event.
        (Code::NotFound, reason::EVENT_NOT_FOUND) => '+',
        (Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal, "") => 'X',
        _ => anyhow::bail!("{method}: {status:?}"),
    })
}

async fn call(pool: Pool, method: &str) -> Result<(), Status> {
    let mut service = IdempotencyServiceClient::new(pool.clone());
    let key = Some(v1::EventKey { provider: "stripe".into(), event_id: "evt_of_nobody".into(), ..Default::default() });
    let claim_id = String::new();
    let tenant = "default".to_owned();
    match method {
        "CheckAndLock" => {
            let key = Some(v1::EventKey {
                provider: "stripe".into(),
                event_id: uuid::Uuid::new_v4().to_string(),
                ..Default::default()
            });
            let request = v1::CheckAndLockRequest { key, event_type: "charge.succeeded".into(), ..Default::default() };
            service.check_and_lock(request).await.map(drop)
        }
        "ExtendLock" => {
            let request = v1::ExtendLockRequest { key, fencing_token: 1, claim_id, lock_duration: None };
            service.extend_lock(request).await.map(drop)
        }
        "MarkCompleted" => {
            let request = v1::MarkCompletedRequest { key, fencing_token: 1, ..Default::default() };
            service.mark_completed(request).await.map(drop)
        }
        "MarkFailed" => {
            let request = v1::MarkFailedRequest { key, fencing_token: 1, ..Default::default() };
            service.mark_failed(request).await.map(drop)
        }
        "History" => service.history(v1::HistoryRequest { tenant, ..Default::default() }).await.map(drop),
        "Resolve" => {
            let request = v1::ResolveRequest {
                key,
                to: v1::State::Completed.into(),
                reason: "a test".into(),
                actor: "a test".into(),
                ..Default::default()
            };
            service.resolve(request).await.map(drop)
        }
        "Stats" => service.stats(v1::StatsRequest { tenant, ..Default::default() }).await.map(drop),
        "Cleanup" => {
            let request = v1::CleanupRequest { tenant, dry_run: true, ..Default::default() };
            service.cleanup(request).await.map(drop)
        }
        "Health" => HealthClient::new(pool).check(HealthCheckRequest { service: String::new() }).await.map(drop),
        "Reflection" => {
            let message_request = Some(MessageRequest::ListServices(String::new()));
            let request = ServerReflectionRequest { host: String::new(), message_request };
            let request = tonic::Request::new(futures::stream::iter([request]));
            ServerReflectionClient::new(pool).server_reflection_info(request).await.map(drop)
        }
        other => Err(Status::internal(format!("no method {other}"))),
    }
}
