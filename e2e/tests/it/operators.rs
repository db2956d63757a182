//! What operators look at and decide, by the commands that they type: stats, history, resolve, completions.

use std::time::Duration;

use anyhow::{Context as _, Result};
use oncegate_api::v1::{self, FailureKind};
use oncegate_e2e::{
    program::{Finished, Oncegate},
    stripe,
    upstream::Answer,
};
use serde_json::Value;

use crate::setup::{Everything, Ledger, on_each_ledger, word};

on_each_ledger!(
    stats_count_by_provider_and_state,
    stats_are_shown_again_until_they_are_interrupted,
    history_shows_one_event_with_everything,
    history_lists_and_filters,
    history_follows_pages_up_to_its_limit,
    a_decision_is_made_on_the_event_that_was_shown,
);

/// The command, against the sidecar of `everything`.
fn command(everything: &Everything, arguments: &[&str]) -> Result<Oncegate> {
    let command = Oncegate::new(everything.directory.path(), arguments.iter().copied())?;
    Ok(command.env("SIDECAR_URL", format!("http://{}", everything.sidecar)))
}

async fn run(everything: &Everything, arguments: &[&str]) -> Result<Finished> {
    command(everything, arguments)?.run().await
}

/// Runs a command that has to work.
async fn shown(everything: &Everything, arguments: &[&str]) -> Result<String> {
    let finished = run(everything, arguments).await?;
    assert_eq!(finished.code, Some(0), "{arguments:?}: {finished}");
    Ok(finished.stdout)
}

/// What a command has to say to a program: a document, or one a line.
async fn told(everything: &Everything, arguments: &[&str]) -> Result<Vec<Value>> {
    let stdout = shown(everything, arguments).await?;
    let documents = serde_json::Deserializer::from_str(&stdout).into_iter().collect::<Result<_, _>>();
    documents.with_context(|| format!("this is not JSON: {stdout}"))
}

/// Sends an event of a type; gives its id and the gateway's word.
async fn send(everything: &Everything, event_type: &str) -> Result<(String, String)> {
    let id = stripe::event_id();
    let answer = everything.send(&stripe::event(&id, event_type)).await?;
    Ok((id, word(&answer)))
}

/// Claims an event past the gateway and lets it end as unknown.
async fn unknown(everything: &Everything, provider: &str, event_id: &str) -> Result<i64> {
    let mut client = everything.client().await?;
    let key = Some(v1::EventKey { provider: provider.into(), event_id: event_id.into(), ..Default::default() });
    let claim = v1::CheckAndLockRequest {
        key: key.clone(),
        event_type: "payout.sent".into(),
        holder: "worker-7".into(),
        payload_digest: vec![0xab; 32].into(),
        ..Default::default()
    };
    let lock = client.check_and_lock(claim).await?.into_inner().lock.context("the lock")?;
    let mut failed = v1::MarkFailedRequest {
        key,
        fencing_token: lock.fencing_token,
        error: "no answer in time".into(),
        ..Default::default()
    };
    failed.set_kind(FailureKind::Unknown);
    client.mark_failed(failed).await?;
    Ok(lock.fencing_token)
}

/// The number of events in a state, in the counts of `stats --json`.
fn count(counts: &Value, state: &str) -> Option<i64> {
    let states = counts["states"].as_array()?;
    states.iter().find(|of| of["state"] == state)?["count"].as_i64()
}

async fn stats_count_by_provider_and_state(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    assert_eq!(send(&everything, "charge.succeeded").await?.1, "200 processed");
    let again = stripe::event(&stripe::event_id(), "charge.succeeded");
    for expected in ["200 processed", "200 already_processed", "200 already_processed"] {
        assert_eq!(word(&everything.send(&again).await?), expected);
    }
    unknown(&everything, "payouts", "po_1").await?;
    // Duplicates are counted within a second.
    let counted = oncegate_e2e::eventually("the duplicates are counted", async || {
        let told = told(&everything, &["stats", "--json"]).await.ok()?;
        (told[0]["total"]["duplicates"] == 2).then(|| told[0].clone())
    })
    .await;
    let total = &counted["total"];
    assert_eq!((&total["total"], &total["retries"], &total["stuck"]), (&3.into(), &0.into(), &0.into()), "{counted}");
    assert_eq!((count(total, "completed"), count(total, "unknown"), count(total, "dead")), (Some(2), Some(1), Some(0)));
    let names: Vec<&Value> =
        counted["providers"].as_array().context("providers")?.iter().map(|p| &p["provider"]).collect();
    assert_eq!(names, ["payouts", "stripe"]);
    assert_eq!(counted["providers"][1]["counts"]["success_rate"], 1.0);
    assert!(counted["as_of_time"].as_str().context("a time")?.ends_with('Z'), "{counted}");
    assert_eq!(counted["buckets"], serde_json::json!([]));

    let one =
        &told(&everything, &["stats", "--json", "--provider", "payouts", "--since", "24h", "--bucket", "1h"]).await?[0];
    assert_eq!((&one["total"]["total"], count(&one["total"], "unknown")), (&1.into(), Some(1)), "{one}");
    assert_eq!(one["buckets"][0]["providers"][0]["counts"]["total"], 1, "{one}");
    let none = &told(&everything, &["stats", "--json", "--until", "2020-01-01T00:00:00Z"]).await?[0];
    assert_eq!((&none["total"]["total"], &none["total"]["success_rate"]), (&0.into(), &Value::Null), "{none}");
    assert_eq!(told(&everything, &["stats", "--json", "--tenant", "other"]).await?[0]["total"]["total"], 0);

    let table = shown(&everything, &["stats", "--bucket", "1h", "--since", "24h"]).await?;
    for expected in ["provider", "payouts", "stripe", "all", "100.00 %", "66.66 %", "As of"] {
        assert!(table.contains(expected), "{expected}: {table}");
    }
    let refused = run(&everything, &["stats", "--bucket", "90m"]).await?;
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(refused.stderr.contains("--bucket"), "{refused}");
    Ok(())
}

async fn stats_are_shown_again_until_they_are_interrupted(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let mut watching = command(&everything, &["stats", "--watch", "500ms", "--json"])?.start()?;
    watching.line_where("the first look", |line| line.contains(r#""total":0"#)).await?;
    send(&everything, "charge.succeeded").await?;
    watching.line_where("a later look", |line| line.starts_with(r#"{"total":{"total":1"#)).await?;
    watching.signal("INT")?;
    let finished = watching.finish(oncegate_e2e::DEADLINE).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    for line in finished.stdout.lines() {
        serde_json::from_str::<Value>(line)?;
    }

    let mut watching = command(&everything, &["stats", "--watch", "500ms"])?.start()?;
    watching.line_where("the table", |line| line.trim_start().starts_with("stripe")).await?;
    let finished = watching.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(!finished.stdout.contains('\x1b'), "nothing is redrawn where there is no terminal: {finished}");
    Ok(())
}

async fn history_shows_one_event_with_everything(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    everything.upstream.answer_next([Answer::status(503)]);
    let id = stripe::event_id();
    let body = stripe::event(&id, "charge.refunded");
    for expected in ["500 failed", "200 processed", "200 already_processed"] {
        assert_eq!(word(&everything.send(&body).await?), expected);
    }
    let told = told(&everything, &["history", "stripe", &id, "--json"]).await?;
    let [whole] = &told[..] else { anyhow::bail!("one document: {told:?}") };
    let event = &whole["event"];
    assert_eq!((&event["key"]["event_id"], &event["key"]["tenant"]), (&id.as_str().into(), &"default".into()));
    assert_eq!((&event["event_type"], &event["state"]), (&"charge.refunded".into(), &"completed".into()));
    assert_eq!(event["attempt_count"], 2);
    let outcomes: Vec<&Value> =
        whole["attempts"].as_array().context("attempts")?.iter().map(|a| &a["outcome"]).collect();
    assert_eq!(outcomes, ["failed_retryable", "completed"], "{whole}");
    assert_eq!(whole["attempts"][1]["fencing_token"], event["fencing_token"]);
    let digest = whole["attempts"][0]["payload_digest"].as_str().context("a digest")?;
    assert_eq!(digest.len(), 64, "{digest}");
    assert_eq!((&whole["mismatch_count"], &whole["resolutions"]), (&0.into(), &serde_json::json!([])));

    let table = shown(&everything, &["history", "stripe", &id, "--tenant", "default"]).await?;
    for expected in [&id, "charge.refunded", "failed_retryable", "completed", &digest[..12], "503"] {
        assert!(table.contains(expected), "{expected}: {table}");
    }
    let missing = run(&everything, &["history", "stripe", "evt_of_nobody"]).await?;
    assert_eq!(missing.code, Some(1), "{missing}");
    assert!(missing.stderr.contains("EVENT_NOT_FOUND"), "{missing}");
    let half = run(&everything, &["history", "stripe"]).await?;
    assert_eq!(half.code, Some(2), "{half}");
    Ok(())
}

async fn history_lists_and_filters(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let (refund, _) = send(&everything, "charge.refunded").await?;
    let (payment, _) = send(&everything, "charge.succeeded").await?;
    unknown(&everything, "payouts", "po_1").await?;
    let ids = async |arguments: &[&str]| -> Result<Vec<String>> {
        let told = told(&everything, &[&["history", "--json"], arguments].concat()).await?;
        let id = |listed: &Value| listed["event"]["key"]["event_id"].as_str().map(str::to_owned);
        told.iter().map(|listed| id(listed).context("an id")).collect()
    };
    assert_eq!(ids(&[]).await?, ["po_1", &payment, &refund], "newest first");
    assert_eq!(ids(&["--provider", "stripe"]).await?, [&*payment, &*refund]);
    assert_eq!(ids(&["--event-type", "charge.refunded"]).await?, [&*refund]);
    assert_eq!(ids(&["--state", "unknown", "--state", "dead"]).await?, ["po_1"]);
    assert_eq!(ids(&["--since", "1h", "--limit", "1"]).await?, ["po_1"]);
    assert_eq!(ids(&["--until", "1h"]).await?, [""; 0]);
    let listed = &told(&everything, &["history", "--json", "--limit", "1"]).await?[0];
    assert!(
        listed.get("attempts").is_none(),
        "a listing has no attempts, and does not say that there were none: {listed}"
    );

    let table = shown(&everything, &["history"]).await?;
    assert_eq!(table.lines().count(), 5, "{table}");
    let table = shown(&everything, &["history", "--limit", "2"]).await?;
    assert!(table.contains("--limit"), "it says that there are more: {table}");
    assert_eq!(shown(&everything, &["history", "--provider", "nobody"]).await?, "no such events\n");
    let refused = run(&everything, &["history", "--provider", "No Such"]).await?;
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(refused.stderr.contains("INVALID_FIELD"), "{refused}");
    Ok(())
}

async fn history_follows_pages_up_to_its_limit(ledger: Ledger) -> Result<()> {
    const EVENTS: usize = 620;
    let everything = Everything::start(ledger).await?;
    let client = everything.client().await?;
    let claims = (0..EVENTS).map(|number| {
        let mut client = client.clone();
        let key = v1::EventKey { provider: "many".into(), event_id: format!("e{number}"), ..Default::default() };
        async move {
            let claim = v1::CheckAndLockRequest { key: Some(key), event_type: "a.b".into(), ..Default::default() };
            client.check_and_lock(claim).await
        }
    });
    futures::future::try_join_all(claims).await?;
    for (limit, expected) in [("100000", EVENTS), ("601", 601), ("500", 500)] {
        let told = told(&everything, &["history", "--provider", "many", "--json", "--limit", limit]).await?;
        let mut ids: Vec<_> = told.iter().map(|listed| listed["event"]["key"]["event_id"].to_string()).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), expected, "each once");
    }
    Ok(())
}

async fn a_decision_is_made_on_the_event_that_was_shown(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let token = unknown(&everything, "payouts", "po_1").await?;
    let resolve = |arguments: &[&'static str]| {
        let resolve = ["resolve", "payouts", "po_1", "--reason", "seen in the bank's list"];
        [&resolve[..], arguments].concat()
    };

    let unasked = run(&everything, &resolve(&["--to", "completed"])).await?;
    assert_eq!(unasked.code, Some(2), "nobody can be asked: {unasked}");
    assert!(unasked.stderr.contains("--yes"), "{unasked}");
    let stale = run(&everything, &resolve(&["--to", "completed", "--yes", "--token", "1"])).await?;
    assert_eq!(stale.code, Some(1), "{stale}");
    assert!(stale.stderr.contains("LOCK_LOST"), "{stale}");

    let done = run(&everything, &resolve(&["--to", "completed", "--yes", "--actor", "jane", "--json"])).await?;
    assert_eq!(done.code, Some(0), "{done}");
    let event: Value = serde_json::from_str(&done.stdout)?;
    assert_eq!(event["state"], "completed");
    assert!(event["fencing_token"].as_i64().context("a token")? > token, "{event}");
    assert!(done.stderr.contains("no answer in time"), "the event was shown first: {done}");

    let held = run(&everything, &resolve(&["--to", "pending", "--yes"])).await?;
    assert_eq!(held.code, Some(1), "{held}");
    assert!(held.stderr.contains("STATE_CONFLICT"), "{held}");
    let replayed = run(&everything, &resolve(&["--to", "pending", "--yes", "--force", "--actor", "joe"])).await?;
    assert_eq!(replayed.code, Some(0), "{replayed}");
    assert!(replayed.stdout.contains("is pending now"), "{replayed}");

    let whole = &told(&everything, &["history", "payouts", "po_1", "--json"]).await?[0];
    let decisions: Vec<String> = whole["resolutions"]
        .as_array()
        .context("resolutions")?
        .iter()
        .map(|of| {
            let text = |name: &str| of[name].as_str().unwrap_or_default().to_owned();
            format!("{}: {} to {}, {}", text("actor"), text("from_state"), text("to_state"), text("reason"))
        })
        .collect();
    assert_eq!(
        decisions,
        ["jane: unknown to completed, seen in the bank's list", "joe: completed to pending, seen in the bank's list"]
    );
    let table = shown(&everything, &["history", "payouts", "po_1"]).await?;
    for expected in ["failed_unknown", "worker-7", "Decisions", "jane", "seen in the bank's list"] {
        assert!(table.contains(expected), "{expected}: {table}");
    }
    let missing = ["resolve", "payouts", "po_2", "--to", "dead", "--reason", "x", "--yes"];
    let missing = run(&everything, &missing).await?;
    assert_eq!(missing.code, Some(1), "{missing}");
    Ok(())
}

#[tokio::test]
async fn watching_survives_a_restart_of_the_sidecar() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let sidecar = |listen: &str| Oncegate::new(directory.path(), ["sidecar"])?.env("SIDECAR_LISTEN", listen).start();
    let mut running = sidecar("127.0.0.1:0")?;
    let address = running.address("sidecar").await?.to_string();
    let mut watching = Oncegate::new(directory.path(), ["stats", "--watch", "500ms"])?
        .env("SIDECAR_URL", format!("http://{address}"))
        .start()?;
    watching.line_where("a table", |line| line.starts_with("As of")).await?;
    running.stop().await?;
    watching.line_where("that it is not up to date", |line| line.starts_with("Not up to date")).await?;
    let mut running = sidecar(&address)?;
    running.address("sidecar").await?;
    let finished = watching.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    Ok(())
}

#[tokio::test]
async fn each_shell_gets_its_completions() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let finished = Oncegate::new(directory.path(), ["completions", shell])?.run().await?;
        assert_eq!(finished.code, Some(0), "{finished}");
        for expected in ["resolve", "event-type"] {
            assert!(finished.stdout.contains(expected), "{shell}, {expected}: {finished}");
        }
    }
    let finished = Oncegate::new(directory.path(), ["completions", "cmd.exe"])?.run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    Ok(())
}

#[tokio::test]
async fn without_a_sidecar_they_end_with_3_and_misused_with_2() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let resolve = &["resolve", "stripe", "evt_1", "--to", "dead", "--reason", "x", "--yes", "--actor", "a"][..];
    for arguments in [&["stats"][..], &["stats", "--watch"], &["history"], &["history", "stripe", "evt_1"], resolve] {
        let arguments = [arguments, &["--sidecar", "http://127.0.0.1:1"]].concat();
        let command = Oncegate::new(directory.path(), arguments.iter().copied())?;
        let finished = tokio::time::timeout(Duration::from_secs(20), command.run()).await??;
        assert_eq!(finished.code, Some(3), "{arguments:?}: {finished}");
        assert!(finished.stdout.is_empty(), "{finished}");
    }
    for arguments in [
        &["stats", "--since", "yesterday"][..],
        &["stats", "--watch", "0s"],
        &["history", "--state", "gone"],
        &["history", "stripe", "evt_1", "--limit", "5"],
        &["resolve", "stripe", "evt_1", "--to", "processing", "--reason", "x"],
        &["resolve", "stripe", "evt_1", "--to", "dead"],
    ] {
        let finished = Oncegate::new(directory.path(), arguments.iter().copied())?.run().await?;
        assert_eq!(finished.code, Some(2), "{arguments:?}: {finished}");
    }
    Ok(())
}
