//! `oncegate simulate`: what it sends is genuine, and what it shows is what came back.

use std::fs;

use anyhow::Result;
use oncegate_e2e::{
    program::{Finished, Oncegate},
    stripe,
};

use crate::setup::{Everything, Ledger, SECRET};

/// Runs it against a gateway.
async fn simulate(everything: &Everything, arguments: &[&str]) -> Result<Finished> {
    let url = format!("http://{}", everything.gateway);
    let arguments = ["simulate", "stripe", "--url", &url].into_iter().chain(arguments.iter().copied());
    Oncegate::new(everything.directory.path(), arguments)?.env("STRIPE_WEBHOOK_SECRET", SECRET).run().await
}

#[tokio::test]
async fn duplicates_are_counted() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let finished = simulate(&everything, &["--duplicates", "5"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stdout.ends_with("1 processed, 5 already_processed\n"), "{finished}");

    let finished = simulate(&everything, &["--duplicates", "31", "--concurrent", "--json"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let shown: serde_json::Value = serde_json::from_str(&finished.stdout)?;
    assert_eq!(shown["replies"].as_array().map(Vec::len), Some(32));
    assert_eq!(shown["as_expected"], true);
    let mut summary: Vec<String> = shown["summary"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|count| format!("{} {}", count["count"], count["answer"].as_str().unwrap_or_default()))
        .collect();
    summary.sort();
    assert_eq!(summary, ["1 processed", "31 already_processed"]);
    assert_eq!(everything.upstream.requests().len(), 2);
    Ok(())
}

#[tokio::test]
async fn a_bad_signature_is_expected_to_be_refused() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let finished = simulate(&everything, &["--bad-signature"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stdout.contains("401"), "{finished}");
    assert_eq!(everything.events().await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_own_body_is_sent_as_it_stands() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let id = stripe::event_id();
    let body = stripe::event(&id, "charge.refunded");
    let file = everything.directory.path().join("event.json");
    fs::write(&file, &body)?;
    let finished = simulate(&everything, &["--body", "event.json"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert_eq!(everything.upstream.requests()[0].body, body);
    assert!(everything.history(&id).await?.is_some());

    fs::write(&file, "no JSON")?;
    let finished = simulate(&everything, &["--body", "event.json"]).await?;
    assert_eq!(finished.code, Some(1), "an answer other than 200: {finished}");
    assert!(finished.stdout.contains("400"), "{finished}");
    Ok(())
}

#[tokio::test]
async fn nobody_there_and_no_secret_have_exit_codes_of_their_own() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let nobody = ["simulate", "stripe", "--url", "http://127.0.0.1:1"];
    let finished = Oncegate::new(directory.path(), nobody)?.env("STRIPE_WEBHOOK_SECRET", SECRET).run().await?;
    assert_eq!(finished.code, Some(3), "{finished}");
    let finished = Oncegate::new(directory.path(), nobody)?.run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    assert!(finished.stderr.contains("STRIPE_WEBHOOK_SECRET"), "{finished}");
    Ok(())
}
