//! I12: what a process still holds once all is calm again: calls and deliveries under way, budgets, memory, open files.

use std::{fs, net::SocketAddr};

use anyhow::{Context as _, Result};

use super::{check::conservation::samples, world::LOCK, world::World};
use crate::{eventually::within, http_client, wire::resident_kib};

/// How much more than at the start may be held. Memory: an allocator's arenas and a debug build's caches. Files:
/// connections kept for the next call, at both ends.
const MEMORY_KIB_MAX: u64 = 96 * 1024;
const FILES_MAX: usize = 40;

/// Whose metrics are on a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// A sidecar's.
    Sidecar,
    /// A gateway's.
    Gateway,
}

/// A process to be examined.
#[derive(Clone, Debug)]
pub struct Process {
    /// For the message.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Where it serves its metrics.
    pub admin: SocketAddr,
    /// What is on them.
    pub pages: &'static [Page],
}

/// What a process holds of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Holding {
    memory_kib: u64,
    files: usize,
}

impl Process {
    /// What it holds now.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn holding(&self) -> Result<Holding> {
        let files = fs::read_dir(format!("/proc/{}/fd", self.pid)).context("cannot read the process's files")?.count();
        Ok(Holding { memory_kib: resident_kib(self.pid)?, files })
    }

    /// What it still holds but should not, after it has had time to let go.
    pub async fn left(&self, before: Holding) -> Vec<String> {
        let mut left = Vec::new();
        let settled = within(LOCK * 4, async || {
            left = match self.look(before).await {
                Ok(left) => left,
                Err(error) => vec![format!("{} cannot be asked: {error:#}", self.name)],
            };
            left.is_empty().then_some(())
        })
        .await;
        if settled.is_some() { Vec::new() } else { left }
    }

    async fn look(&self, before: Holding) -> Result<Vec<String>> {
        let metrics = http_client::get(self.admin, "/metrics").await?;
        let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
        let value = |name: &str| samples(&metrics, name).get("").copied().with_context(|| format!("no {name}"));
        let mut wrong = Vec::new();
        let mut wanted = Vec::new();
        for page in self.pages {
            match page {
                Page::Sidecar => {
                    for name in ["oncegate_calls_under_way", "oncegate_calls_waiting", "oncegate_ledger_queue_calls"] {
                        wanted.push((name, 0));
                    }
                    wanted.push(("oncegate_ledger_up", 1));
                }
                Page::Gateway => {
                    wanted.push(("oncegate_gateway_deliveries_under_way", 0));
                    wanted.push((
                        "oncegate_gateway_body_budget_left_bytes",
                        value("oncegate_gateway_body_budget_bytes")?,
                    ));
                }
            }
        }
        for (name, wanted) in wanted {
            let found = value(name)?;
            if found != wanted {
                wrong.push(format!("{}: {name} is {found}, not {wanted}", self.name));
            }
        }
        let now = self.holding()?;
        if now.memory_kib > before.memory_kib + MEMORY_KIB_MAX {
            wrong.push(format!("{}: memory grew from {} to {} KiB", self.name, before.memory_kib, now.memory_kib));
        }
        if now.files > before.files + FILES_MAX {
            wrong.push(format!("{}: open files grew from {} to {}", self.name, before.files, now.files));
        }
        Ok(wrong)
    }
}

/// The processes of a world.
///
/// # Errors
/// When one is not running.
pub fn processes(world: &World) -> Result<Vec<Process>> {
    let mut processes = Vec::new();
    for (number, sidecar) in world.sidecars.iter().enumerate() {
        let pid = sidecar.program.as_ref().context("a sidecar that runs")?.pid()?;
        let name = format!("sidecar {number}");
        processes.push(Process { name, pid, admin: sidecar.admin, pages: &[Page::Sidecar] });
    }
    for (number, gateway) in world.gateways.iter().enumerate() {
        let pid = gateway.program.as_ref().context("a gateway that runs")?.pid()?;
        let name = format!("gateway {number}");
        processes.push(Process { name, pid, admin: gateway.admin, pages: &[Page::Gateway] });
    }
    Ok(processes)
}
