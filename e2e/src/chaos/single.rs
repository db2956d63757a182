//! One process with the embedded store, and a proxy on each path to and from it.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use std::net::{Ipv4Addr, SocketAddr};

use super::{
    application::{Application, Guard, Temper},
    history::Recorder,
    residue::{Page, Process},
    world::{LOCK, SECRET},
};
use crate::{
    clock,
    program::{Oncegate, Running},
    proxy::Proxy,
};

/// The whole of it.
#[derive(Debug)]
pub struct Single {
    /// The process; None while it is dead.
    pub program: Option<Running>,
    /// Between direct callers and it.
    pub from_callers: Proxy,
    /// Between providers and it.
    pub from_providers: Proxy,
    /// Between it and the application.
    pub to_application: Proxy,
    /// What is delivered to.
    pub application: Application,
    /// What callers saw.
    pub recorder: Recorder,
    /// How far its wall clock is off, in seconds.
    pub skew: i64,
    admin: SocketAddr,
    // Ends after the process.
    directory: TempDir,
}

impl Single {
    /// Starts it.
    ///
    /// # Errors
    /// When something does not start.
    pub async fn start(guard: Guard, temper: Temper) -> Result<Self> {
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        let recorder = Recorder::default();
        let application = Application::start(guard, temper, recorder.clone()).await?;
        let mut single = Self {
            program: None,
            from_callers: Proxy::start(nowhere).await?,
            from_providers: Proxy::start(nowhere).await?,
            to_application: Proxy::start(application.address()).await?,
            application,
            recorder,
            skew: 0,
            admin: nowhere,
            directory: tempfile::tempdir()?,
        };
        single.restart().await?;
        Ok(single)
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it is not running.
    pub async fn kill(&mut self) -> Result<()> {
        self.program.take().context("a process that runs")?.kill().await
    }

    /// Starts it again, with its clock skewed as set.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn restart(&mut self) -> Result<()> {
        let command = Oncegate::new(self.directory.path(), ["all"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("GATEWAY_LISTEN", "127.0.0.1:0")
            .env("ADMIN_LISTEN", "127.0.0.1:0")
            .env("UPSTREAM_URL", format!("http://{}/payments", self.to_application.address()))
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env("LOCK_DURATION", format!("{}s", LOCK.as_secs()))
            .env("ATTEMPTS_MAX", "0")
            .env("UPSTREAM_TIMEOUT", "1s")
            .env("UPSTREAM_CONNECT_TIMEOUT", "500ms")
            .env("GATEWAY_LOCK_DURATION", format!("{}s", LOCK.as_secs()))
            .env("GATEWAY_LOCK_MARGIN", "1s")
            .env("GATEWAY_WAIT_DURATION", "1s")
            .env("GATEWAY_ANSWER_TIMEOUT", "5s");
        let command = if self.skew == 0 { command } else { clock::skewed(command, self.skew)? };
        let mut program = command.start()?;
        self.from_callers.set_target(program.address("sidecar").await?);
        self.from_providers.set_target(program.address("gateway").await?);
        self.admin = program.address("admin").await?;
        self.program = Some(program);
        Ok(())
    }

    /// The paths, for causing trouble on them.
    pub fn ways(&self) -> [(&'static str, &Proxy); 3] {
        [
            ("callers-process", &self.from_callers),
            ("providers-process", &self.from_providers),
            ("process-application", &self.to_application),
        ]
    }

    /// Its process, for examining its residue.
    ///
    /// # Errors
    /// When it is not running.
    pub fn process(&self) -> Result<Process> {
        let pid = self.program.as_ref().context("a process that runs")?.pid()?;
        Ok(Process { name: "process".into(), pid, admin: self.admin, pages: &[Page::Sidecar, Page::Gateway] })
    }

    /// Where its store is.
    pub fn store(&self) -> PathBuf {
        self.directory.path().join("oncegate.db")
    }
}
