//! Calls to a sidecar.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, header, uri::PathAndQuery};
use oncegate_api::v1::Decision;
use tonic::{Request, Status, client::Grpc, transport::Channel};
use tonic_types::StatusExt as _;

use super::{
    message::{Acknowledged, ClaimAnswer, Encoded, Messages},
    target::{Fault, Verdict},
};

const CHECK_AND_LOCK: &str = "/oncegate.v1.IdempotencyService/CheckAndLock";
const MARK_COMPLETED: &str = "/oncegate.v1.IdempotencyService/MarkCompleted";

/// One caller on a connection that it shares with some of the others.
pub(super) struct Sidecar {
    grpc: Grpc<Channel>,
    messages: Arc<Messages>,
    timeout: Duration,
    authorization: Option<HeaderValue>,
}

impl Sidecar {
    /// A caller on this connection, identified by `authorization`.
    pub(super) fn new(
        channel: Channel,
        messages: Arc<Messages>,
        timeout: Duration,
        authorization: Option<HeaderValue>,
    ) -> Self {
        Self { grpc: Grpc::new(channel), messages, timeout, authorization }
    }

    /// CheckAndLock: the answer, and the fencing token if granted.
    pub(super) async fn claim(&mut self, event: u64, caller: u32) -> Result<(Verdict, i64), Fault> {
        let answer: ClaimAnswer = self.call(CHECK_AND_LOCK, self.messages.claim(event, caller)).await?;
        let verdict = match Decision::try_from(answer.decision) {
            Ok(Decision::Acquired) => Verdict::Granted,
            Ok(Decision::AlreadyCompleted) => Verdict::Completed,
            Ok(Decision::InProgress) => Verdict::InProgress,
            Ok(Decision::Refused | Decision::Unspecified) | Err(_) => Verdict::Refused,
        };
        Ok((verdict, answer.lock.map_or(0, |lock| lock.fencing_token)))
    }

    /// MarkCompleted.
    pub(super) async fn complete(&mut self, event: u64, caller: u32, fencing_token: i64) -> Result<(), Fault> {
        let message = self.messages.complete(event, caller, fencing_token);
        self.call::<Acknowledged>(MARK_COMPLETED, message).await.map(drop)
    }

    async fn call<A>(&mut self, path: &'static str, message: bytes::Bytes) -> Result<A, Fault>
    where
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().as_mut().insert(header::AUTHORIZATION, authorization.clone());
        }
        let exchange = async {
            self.grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
            self.grpc.unary(request, PathAndQuery::from_static(path), Encoded::<A>::default()).await
        };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(fault(&status)),
            Err(_) => Err(Fault { code: "no answer in time".to_owned() }),
        }
    }
}

fn fault(status: &Status) -> Fault {
    let code = status.code();
    Fault {
        code: match status.get_details_error_info() {
            Some(info) => format!("{code:?} {}", info.reason),
            // It comes from the connection, or from another service.
            None => format!("{code:?}, no reason given"),
        },
    }
}
