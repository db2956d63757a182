//! What the load calls: a sidecar or a gateway.

use std::time::{Duration, Instant};

use super::{grpc::Sidecar, http::Gateway};

/// How an event was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was granted, and then completed if requested.
    Granted,
    /// It is done already.
    Completed,
    /// Somebody else has it.
    InProgress,
    /// Held, or refused for another reason that is not an error.
    Refused,
}

/// An answer, and how long its parts took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    pub(super) verdict: Verdict,
    /// The first call, or the only one.
    pub(super) first: Duration,
    /// Marking it completed, if that is a separate call.
    pub(super) completion: Option<Duration>,
}

/// A call that failed, by its code.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    /// The code, and the reason if one was given.
    pub(super) code: String,
    /// Whether the target said so. Otherwise there was no answer, or none of a sidecar or a gateway.
    pub(super) answered: bool,
}

impl Fault {
    /// Nobody answered within the time-out.
    pub(super) fn timed_out() -> Self {
        Self { code: "no answer in time".to_owned(), answered: false }
    }
}

/// One caller of many: it asks for one thing at a time.
pub(super) enum Caller {
    Grpc(Box<Sidecar>),
    Http(Box<Gateway>),
}

impl Caller {
    /// Asks for an event and, if it is granted, completes it.
    pub(super) async fn process(&mut self, event: u64, caller: u32) -> Result<Answer, Fault> {
        let began = Instant::now();
        match self {
            Self::Grpc(sidecar) => {
                let (verdict, token) = sidecar.claim(event, caller).await?;
                let first = began.elapsed();
                let mut completion = None;
                if verdict == Verdict::Granted {
                    sidecar.complete(event, caller, token).await?;
                    completion = Some(began.elapsed() - first);
                }
                Ok(Answer { verdict, first, completion })
            }
            Self::Http(gateway) => {
                let verdict = gateway.send(event).await?;
                Ok(Answer { verdict, first: began.elapsed(), completion: None })
            }
        }
    }

    /// Asks for an event that should be completed, and completes nothing.
    pub(super) async fn ask(&mut self, event: u64, caller: u32) -> Result<Verdict, Fault> {
        self.claim(event, caller).await.map(|(verdict, _)| verdict)
    }

    /// Asks for an event and completes nothing: the answer, and the fencing token if granted.
    pub(super) async fn claim(&mut self, event: u64, caller: u32) -> Result<(Verdict, i64), Fault> {
        match self {
            Self::Grpc(sidecar) => sidecar.claim(event, caller).await,
            // The gateway has already completed what it was granted.
            Self::Http(gateway) => gateway.send(event).await.map(|verdict| (verdict, 0)),
        }
    }

    /// Completes what it was granted earlier.
    pub(super) async fn complete(&mut self, event: u64, caller: u32, fencing_token: i64) -> Result<(), Fault> {
        match self {
            Self::Grpc(sidecar) => sidecar.complete(event, caller, fencing_token).await,
            Self::Http(_) => Ok(()),
        }
    }
}
