//! Standbys: a copy of a cluster that follows it, and can take its place.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use sqlx::{Connection as _, PgConnection};

use super::{Cluster, Options, connect, execute};
use crate::{eventually, supervised::Directory};

/// The name that a standby reports to its primary, for `synchronous_standby_names`.
pub const STANDBY: &str = "standby";

impl Cluster {
    /// A standby of this cluster that streams from it.
    pub async fn standby(&self, options: Options) -> Result<Cluster> {
        let directory = Directory::new("oncegate-standby-")?;
        if let Some(user) = self.user {
            std::os::unix::fs::chown(directory.path(), Some(user.uid), Some(user.gid))?;
        }
        let standby =
            Cluster { programs: self.programs.clone(), user: self.user, options, port: 0, server: None, directory };
        let mut copy = Command::new(self.programs.join("pg_basebackup"));
        copy.arg("--pgdata")
            .arg(standby.data())
            .arg("--dbname")
            .arg(format!("{}?application_name={STANDBY}", self.url("postgres")))
            // Writes the settings that make it a standby.
            .args(["--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream", "--no-sync"])
            .current_dir(standby.directory.path());
        standby.run_as_user(&mut copy);
        let output = copy.output().context("cannot run pg_basebackup")?;
        ensure!(output.status.success(), "pg_basebackup failed: {}", String::from_utf8_lossy(&output.stderr));
        fs::set_permissions(standby.data(), std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let mut standby = standby;
        standby.restart().await?;
        Ok(standby)
    }

    /// Waits until a standby streams from this cluster; with `synchronous`, until commits wait for it.
    pub async fn wait_for_standby(&self, synchronous: bool) -> Result<()> {
        let mut connection = connect(&self.url("postgres")).await?;
        let wanted = if synchronous { "sync" } else { "async" };
        eventually("the standby follows", async || {
            let states: Vec<String> =
                sqlx::query_scalar("select sync_state from pg_stat_replication where state = 'streaming'")
                    .fetch_all(&mut connection)
                    .await
                    .ok()?;
            states.iter().any(|state| state == wanted).then_some(())
        })
        .await;
        connection.close().await?;
        Ok(())
    }

    /// From now on commits wait for the standby that streams from this cluster; returns when they do.
    pub async fn make_standby_synchronous(&self) -> Result<()> {
        let admin = self.url("postgres");
        execute(&admin, &format!("alter system set synchronous_standby_names = '{STANDBY}'")).await?;
        execute(&admin, "select pg_reload_conf()").await?;
        self.wait_for_standby(true).await
    }

    /// Makes this standby the primary, and returns when it takes writes.
    pub async fn promote(&self) -> Result<()> {
        let mut connection: PgConnection = connect(&self.url("postgres")).await?;
        let promoted: bool = sqlx::query_scalar("select pg_promote(true, 30)").fetch_one(&mut connection).await?;
        ensure!(promoted, "the standby was not promoted:\n{}", self.log_tail());
        connection.close().await?;
        Ok(())
    }
}
