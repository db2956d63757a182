//! What the options of `oncegate bench` come to, and which of them are refused.

use std::time::Duration;

use oncegate_runtime::config::{Checks, ShownDuration};

use super::{
    Bench, Shares, TargetName, WorkloadName,
    load::{Limits, Workload},
};
use crate::failure::Failure;

/// Callers that share a connection by default.
const CALLERS_PER_CONNECTION: u32 = 32;
/// The longest that can be measured, or be warmed up for.
const MEASURED_MAX: Duration = Duration::from_secs(30 * 86_400);
/// The most HTTP/2 connections by default: more lead to small packets.
const CONNECTIONS_MAX: u32 = 16;
/// The share of duplicates in the mixed workload by default.
const DUPLICATE_SHARE: f64 = 0.3;
/// The largest body that can be asked for.
const BODY_BYTES_MAX: u64 = 1024 * 1024;

impl Bench {
    pub(super) fn workload(&self) -> Workload {
        match self.workload {
            WorkloadName::Cycle => Workload::Cycle,
            WorkloadName::Claims => Workload::Claims,
            WorkloadName::Duplicates => Workload::Duplicates,
            WorkloadName::Storm => Workload::Storm,
            WorkloadName::Mixed => Workload::Mixed(self.duplicate_share.unwrap_or(DUPLICATE_SHARE)),
        }
    }

    pub(super) fn shares(&self) -> Shares {
        let threads = self.threads.min(self.concurrency);
        let connections = match self.target {
            TargetName::Http => self.concurrency,
            // Each thread has at least one of its own.
            TargetName::Grpc => self
                .connections
                .unwrap_or_else(|| self.concurrency.div_ceil(CALLERS_PER_CONNECTION).min(CONNECTIONS_MAX))
                .max(threads),
        };
        Shares { threads, connections }
    }

    pub(super) fn limits(&self, shares: Shares) -> Limits {
        Limits {
            concurrency: self.concurrency,
            threads: shares.threads,
            keys: self.keys,
            prepared: self.prepared,
            warm_up: self.warm_up,
            duration: self.duration,
            leave_locked: self.leave_locked,
            check_max: usize::try_from(self.check_max.div_ceil(self.concurrency.into())).unwrap_or(usize::MAX),
        }
    }

    pub(super) fn validate(&self) -> Result<(), Failure> {
        let mut checks = Checks::new();
        if let Some(share) = self.duplicate_share
            && !(0.0..=1.0).contains(&share)
        {
            checks.problem("--duplicate-share", format!("{share} given, has to be from 0 to 1"));
        }
        if let Some(run) = &self.run
            && (!(1..=16).contains(&run.len()) || !run.bytes().all(|byte| byte.is_ascii_alphanumeric()))
        {
            checks.problem("--run", format!("{run:?} given, has to be 1 to 16 letters and digits"));
        }
        self.validate_combinations(&mut checks);
        checks.within(
            "--duration",
            ShownDuration(self.duration),
            ShownDuration(Duration::from_millis(100))..=ShownDuration(MEASURED_MAX),
        );
        checks.within(
            "--warm-up",
            ShownDuration(self.warm_up),
            ShownDuration(Duration::ZERO)..=ShownDuration(MEASURED_MAX),
        );
        checks.within(
            "--timeout",
            ShownDuration(self.timeout),
            ShownDuration(Duration::from_millis(1))..=ShownDuration(Duration::from_secs(3_600)),
        );
        checks.within(
            "--progress",
            ShownDuration(self.progress),
            ShownDuration(Duration::from_millis(10))..=ShownDuration(Duration::from_secs(86_400)),
        );
        if let Some(size) = self.body_size {
            checks.within("--body-size", size, 0..=BODY_BYTES_MAX);
        }
        Ok(checks.finish()?)
    }

    /// Refuses what would be without effect: whoever gives it believes that it has one. Not the secrets and credentials, which
    /// may be in the environment for other commands.
    fn validate_combinations(&self, checks: &mut Checks) {
        match self.target {
            TargetName::Http => {
                if matches!(self.workload, WorkloadName::Claims) {
                    let why = "claims given: a gateway completes what it is given; use --target grpc";
                    checks.problem("--workload", why.to_owned());
                }
                if let Some(connections) = self.connections {
                    let why = "over HTTP each caller has a connection of its own; use --concurrency";
                    checks.problem("--connections", format!("{connections} given: {why}"));
                }
                if let Some(provider) = &self.provider {
                    checks.problem("--provider", format!("{provider:?} given: over HTTP the webhooks are Stripe's"));
                }
            }
            TargetName::Grpc => {
                if let Some(size) = self.body_size {
                    checks.problem(
                        "--body-size",
                        format!("{size} bytes given: only webhooks have one; use --target http"),
                    );
                }
            }
        }
        if let Some(share) = self.duplicate_share
            && !matches!(self.workload, WorkloadName::Mixed)
        {
            checks.problem("--duplicate-share", format!("{share} given: use it with --workload mixed"));
        }
        if self.leave_locked && !matches!(self.workload, WorkloadName::Claims) {
            checks.problem(
                "--leave-locked",
                "given: use it with --workload claims, no other one leaves locks".to_owned(),
            );
        }
        if self.prepared && !matches!(self.workload, WorkloadName::Duplicates | WorkloadName::Mixed) {
            checks.problem("--prepared", "given: use it with --workload duplicates or mixed".to_owned());
        }
    }
}
