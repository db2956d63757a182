//! `oncegate verify`: the verdict of the gateway on one request, or on many.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    program::{Finished, Oncegate},
    stripe,
};
use serde_json::Value;
use tempfile::TempDir;

const SECRET: &str = "whsec_that_nobody_is_to_see";

/// A directory with a body and the secret that it is signed with.
fn files(body: &[u8]) -> Result<TempDir> {
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("body"), body)?;
    fs::write(directory.path().join("secret"), SECRET)?;
    Ok(directory)
}

async fn verify(directory: &TempDir, arguments: &[&str]) -> Result<Finished> {
    let finished = Oncegate::new(directory.path(), [&["verify"], arguments].concat())?.run().await?;
    for output in [&finished.stdout, &finished.stderr] {
        assert!(!output.contains(SECRET), "secrets are not printed: {finished}");
    }
    Ok(finished)
}

#[tokio::test]
async fn one_request_has_a_verdict_a_reason_and_an_exit_code() -> Result<()> {
    let body = stripe::event("evt_1", "charge.refunded");
    let directory = files(&body)?;
    let signed = stripe::sign_at(SECRET, &body, 1_700_000_000);
    // What would be right is not told either: whoever reads it could sign with it.
    let right = signed.rsplit('=').next().context("a signature")?;
    let given = ["--provider", "stripe", "--secret-file", "secret", "--body", "body", "--header"];
    let header = format!("Stripe-Signature: {signed}");

    let valid = verify(&directory, &[&given[..], &[&header, "--now", "1700000100"]].concat()).await?;
    assert_eq!(valid.code, Some(0), "{valid}");
    for expected in ["valid", "evt_1", "charge.refunded"] {
        assert!(valid.stdout.contains(expected), "{expected}: {valid}");
    }
    let json =
        verify(&directory, &[&given[..], &[&header, "--now", "2023-11-14T22:13:21Z", "--json"]].concat()).await?;
    let json: Value = serde_json::from_str(&json.stdout)?;
    assert_eq!((&json["verdict"], &json["key"]), (&"valid".into(), &"evt_1".into()));

    let forged = format!("Stripe-Signature: t=1700000000,v1={}", "0".repeat(64));
    for (header, more, verdict) in [
        (&header, &[][..], "timestamp_out_of_tolerance"),
        (&forged, &["--now", "1700000100"], "bad_signature"),
        (&header, &["--now", "1700000100", "--header", "stripe-signature: t=1,v1=00"], "malformed_header"),
        (&"X-Other: 1".to_owned(), &[], "missing_header"),
    ] {
        let refused = verify(&directory, &[&given[..], &[header], more].concat()).await?;
        assert_eq!(refused.code, Some(1), "{refused}");
        assert!(refused.stdout.starts_with(verdict), "{verdict}: {refused}");
        assert!(refused.stdout.lines().count() > 1, "it says what to look at: {refused}");
        assert!(!refused.stdout.contains(right), "{refused}");
    }
    let without = verify(&directory, &["--provider", "stripe", "--body", "body", "--header", &header]).await?;
    assert_eq!(without.code, Some(1), "{without}");
    assert!(without.stdout.starts_with("missing_secret"), "{without}");
    for misused in [
        &["--provider", "acme"][..],
        &["--provider", "stripe", "--body", "nowhere"],
        &["--body", "body"],
        &["--provider", "paypal", "--body", "body", "--trust-anchors-file", "body"],
        &["--provider", "paypal", "--body", "body", "--intermediates-file", "body"],
        &["--provider", "paypal", "--body", "body", "--cert-dir", "nowhere"],
    ] {
        let misused = verify(&directory, misused).await?;
        assert_eq!(misused.code, Some(2), "{misused}");
    }
    Ok(())
}

#[tokio::test]
async fn many_cases_get_a_line_each() -> Result<()> {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway/tests/vectors/webhook_signatures.json");
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(&vectors).context("the vectors")?)?;
    let directory = tempfile::tempdir()?;
    let finished = verify(&directory, &["--cases", vectors.to_str().context("a path of text")?]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let lines: Vec<Value> = finished.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(lines.len(), cases.len());
    let mut verdicts: BTreeMap<String, usize> = BTreeMap::new();
    for (line, case) in lines.iter().zip(&cases) {
        assert_eq!(line["id"], case["id"]);
        *verdicts.entry(line["verdict"].to_string()).or_default() += 1;
        let must = case["category"] == "must" && line["verdict"] != "unsupported_provider";
        assert!(!must || line["verdict"] == case["expect"], "{line}");
        for field in ["event_id", "event_type", "key"] {
            assert!(line.get(field).is_some(), "{field} may be null and is never left out: {line}");
        }
    }
    assert!(verdicts.len() > 5, "{verdicts:?}");

    fs::write(directory.path().join("broken"), "{}")?;
    let broken = verify(&directory, &["--cases", "broken"]).await?;
    assert_eq!(broken.code, Some(2), "{broken}");
    Ok(())
}
