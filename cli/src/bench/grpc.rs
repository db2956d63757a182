//! Calls to a sidecar.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use oncegate_api::v1::Decision;
use prost::Message;
use tonic::Status;
use tonic_types::StatusExt as _;

use super::{
    connection::Calls,
    message::{Acknowledged, ClaimAnswer, Messages},
    target::{Fault, Verdict},
};
use crate::sidecar_client::is_broken_off;

const CHECK_AND_LOCK: &str = "/oncegate.v1.IdempotencyService/CheckAndLock";
const MARK_COMPLETED: &str = "/oncegate.v1.IdempotencyService/MarkCompleted";

/// One caller on a connection that it shares with some of the others.
pub(super) struct Sidecar {
    calls: Calls,
    messages: Arc<Messages>,
    timeout: Duration,
}

impl Sidecar {
    /// A caller on this connection.
    pub(super) fn new(calls: Calls, messages: Arc<Messages>, timeout: Duration) -> Self {
        Self { calls, messages, timeout }
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

    async fn call<A: Message + Default>(&mut self, path: &'static str, message: Bytes) -> Result<A, Fault> {
        match tokio::time::timeout(self.timeout, self.calls.unary(path, message)).await {
            Ok(Ok(answer)) => {
                let answer = A::decode(answer).map_err(|error| Status::internal(error.to_string()));
                answer.map_err(|status| fault(&status))
            }
            Ok(Err(status)) => Err(fault(&status)),
            Err(_) => Err(Fault::timed_out()),
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
        answered: !is_broken_off(status),
    }
}
