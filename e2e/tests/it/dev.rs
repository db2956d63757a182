//! `oncegate dev`: the first thing that anybody runs.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, Result};
use oncegate_e2e::program::{Oncegate, Running};
use tempfile::TempDir;

/// The settings of its listeners.
const LISTENERS: [&str; 3] = ["GATEWAY_LISTEN", "SIDECAR_LISTEN", "APPLICATION_LISTEN"];

/// The command, on free ports.
fn dev(directory: &TempDir, arguments: &[&str]) -> Result<Oncegate> {
    let command = Oncegate::new(directory.path(), ["dev"].iter().chain(arguments).copied())?;
    Ok(LISTENERS.into_iter().fold(command, |command, listener| command.env(listener, "127.0.0.1:0")))
}

/// A running `dev` that has shown its table.
async fn start(directory: &TempDir) -> Result<Running> {
    let mut running = dev(directory, &[])?.start()?;
    running.line_where("it says what to try next", |line| line.contains("simulate stripe --duplicates 5")).await?;
    Ok(running)
}

#[tokio::test]
async fn once_shows_one_delivery_and_one_duplicate_and_ends() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let finished = dev(&directory, &["--once"])?.run().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    for expected in ["200", "processed", "already_processed"] {
        assert!(finished.stdout.contains(expected), "{expected}: {finished}");
    }

    let file = directory.path().join(".oncegate-dev.json");
    assert_eq!(fs::metadata(&file)?.permissions().mode() & 0o777, 0o600);
    let made: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
    let secret = made["secrets"]["stripe"].as_str().context("it has a secret")?;
    assert!(!finished.stdout.contains(secret) && !finished.stderr.contains(secret), "secrets are not printed");

    // The same store and the same secrets again.
    let finished = dev(&directory, &["--once"])?.env("DATABASE_URL", "postgres://nowhere/nothing").run().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stdout.contains("DATABASE_URL"), "it says that it does not use it: {finished}");
    let again: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
    assert_eq!(again["secrets"], made["secrets"]);
    Ok(())
}

// As exported for the services in production, in the same shell.
#[tokio::test]
async fn a_listener_that_is_open_to_other_machines_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for listener in LISTENERS {
        let finished = dev(&directory, &["--once"])?.env(listener, "0.0.0.0:0").run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.stderr.contains(&format!("{listener}: 0.0.0.0:0")), "{finished}");
    }
    assert_eq!(fs::read_dir(directory.path())?.count(), 0, "nothing was begun");
    Ok(())
}

#[tokio::test]
async fn it_serves_until_it_is_told_to_end_and_shows_what_arrives() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut running = start(&directory).await?;
    let simulated = Oncegate::new(directory.path(), ["simulate", "stripe", "--duplicates", "5"])?.run().await?;
    assert_eq!(simulated.code, Some(0), "{simulated}");
    assert!(simulated.stdout.contains("1 processed, 5 already_processed"), "{simulated}");
    running.signal("INT")?;
    let finished = running.finish(oncegate_e2e::DEADLINE).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let lines = finished.stdout.lines().filter(|line| line.contains("delivered") && line.contains("evt_"));
    assert_eq!(lines.count(), 1, "{finished}");
    Ok(())
}

#[tokio::test]
async fn it_takes_duplicates_of_each_provider() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut running = start(&directory).await?;
    for provider in ["stripe", "paypal", "flutterwave", "paystack", "standard-webhooks"] {
        let simulate = async |arguments: &[&str]| {
            let arguments = ["simulate", provider].into_iter().chain(arguments.iter().copied());
            let finished = Oncegate::new(directory.path(), arguments)?.run().await?;
            assert_eq!(finished.code, Some(0), "{provider}: {finished}");
            anyhow::Ok(finished.stdout)
        };
        let shown = simulate(&["--duplicates", "3"]).await?;
        assert!(shown.ends_with("1 processed, 3 already_processed\n"), "{provider}: {shown}");
        let shown = simulate(&["--duplicates", "15", "--concurrent", "--json"]).await?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        let summary = shown["summary"].as_array().context("a summary")?;
        let processed = serde_json::json!({ "answer": "processed", "count": 1 });
        assert!(summary.contains(&processed), "{provider}: {shown}");
        let shown = simulate(&["--bad-signature"]).await?;
        assert!(shown.contains("401"), "{provider}: {shown}");
    }
    let finished = running.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    for provider in ["stripe", "paypal", "flutterwave", "paystack", "standard_webhooks"] {
        let rows: Vec<&str> = finished.stdout.lines().filter(|line| line.trim_start().starts_with(provider)).collect();
        assert_eq!(rows.len(), 2, "the first and the duplicate of {provider}: {finished}");
        let delivered = format!("delivered  {provider} ");
        assert_eq!(finished.stdout.matches(&delivered).count(), 2, "{provider}: {finished}");
    }
    let made = fs::read_to_string(directory.path().join(".oncegate-dev.json"))?;
    let made: serde_json::Value = serde_json::from_str(&made)?;
    let key = made["paypal"]["key"].as_str().context("PayPal's key")?;
    let line = key.lines().nth(1).context("a key of many lines")?;
    assert!(!finished.stdout.contains(line) && !finished.stderr.contains(line), "keys are not printed");
    Ok(())
}

#[tokio::test]
async fn a_taken_port_is_named_with_its_setting() -> Result<()> {
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    for listener in LISTENERS {
        let directory = tempfile::tempdir()?;
        let finished = dev(&directory, &["--once"])?.env(listener, &address).run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.stderr.contains(listener) && finished.stderr.contains(&address), "{finished}");
    }
    Ok(())
}
