//! What somebody may have to answer for has one line in the log, with who, whose, what and how it ended; also where the log
//! is told to be quiet.

use anyhow::{Context as _, Result};
use oncegate_api::v1::{
    CheckAndLockRequest, CleanupRequest, EventKey, MarkCompletedRequest, ResolveRequest, State,
    idempotency_service_client::IdempotencyServiceClient,
};
use oncegate_e2e::{eventually, http_client, program::Oncegate};
use oncegate_gateway::sidecar::Pool;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tonic::Code;

use super::{
    Guarded,
    caller::{attempt, pool},
    token,
};
use crate::setup::{Everything, Ledger};

/// Nothing but errors, and where it listens.
const QUIET: &str = "error,oncegate::service=info";

fn quiet(command: Oncegate) -> Oncegate {
    command.env("ONCEGATE_LOG", QUIET)
}

/// The lines of an audit in what a program has logged, oldest first.
fn audit(output: &str) -> Vec<Value> {
    let lines = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["target"].as_str().is_some_and(|target| target.ends_with("::audit"))).collect()
}

/// What a line says under these names, those that it lacks left out.
fn said(line: &Value, names: &[&str]) -> String {
    let fields = names.iter().filter(|name| !line[**name].is_null());
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    fields.map(|name| format!("{name}={}", text(&line[*name]))).collect::<Vec<_>>().join(" ")
}

/// The next line of the audit, which has to be the only one since the last.
async fn next(guarded: &Guarded, seen: &mut usize) -> Value {
    *seen += 1;
    let lines = eventually("the line of an audit", async || {
        let lines = audit(&guarded.program.output());
        (lines.len() >= *seen).then_some(lines)
    })
    .await;
    assert_eq!(lines.len(), *seen, "one line, and no other: {lines:#?}");
    lines[*seen - 1].clone()
}

fn key(event_id: &str) -> Option<EventKey> {
    Some(EventKey { provider: "stripe".into(), event_id: event_id.into(), ..Default::default() })
}

fn resolve(event_id: &str, to: State, force: bool) -> ResolveRequest {
    let mut request = ResolveRequest {
        key: key(event_id),
        force,
        reason: "seen in the bank's list".into(),
        actor: "jane".into(),
        ..Default::default()
    };
    request.set_to(to);
    request
}

fn client(guarded: &Guarded, name: &str) -> Result<IdempotencyServiceClient<Pool>> {
    Ok(IdempotencyServiceClient::new(pool(&guarded.url, &guarded.ca(), None, Some(&token(name)))?))
}

const DECIDED: [&str; 9] = ["caller", "actor", "tenant", "provider", "to", "force", "outcome", "level", "message"];

#[tokio::test]
async fn every_decision_of_an_operator_leaves_one_audit_line() -> Result<()> {
    let guarded = Guarded::start_with(quiet).await?;
    let (mut caller, mut operator) = (client(&guarded, "caller")?, client(&guarded, "operator")?);
    let mut seen = 0;
    let claim = CheckAndLockRequest { key: key("evt_1"), event_type: "charge.succeeded".into(), ..Default::default() };
    let token = caller.check_and_lock(claim).await?.into_inner().lock.context("the lock")?.fencing_token;
    let done = MarkCompletedRequest { key: key("evt_1"), fencing_token: token, ..Default::default() };
    caller.mark_completed(done).await?;

    // Refused, and then forced: a replay.
    let refused = operator.resolve(resolve("evt_1", State::Pending, false)).await.expect_err("it is completed");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let line = next(&guarded, &mut seen).await;
    assert_eq!(
        said(&line, &DECIDED),
        "caller=operator actor=jane tenant=default provider=stripe to=pending force=false outcome=STATE_CONFLICT \
         level=WARN message=an event was not resolved by hand"
    );
    let event = operator.resolve(resolve("evt_1", State::Pending, true)).await?.into_inner().event.context("event")?;
    let line = next(&guarded, &mut seen).await;
    assert_eq!(
        said(&line, &DECIDED),
        "caller=operator actor=jane tenant=default provider=stripe to=pending force=true outcome=done level=INFO \
         message=an event was resolved by hand"
    );
    assert_eq!(line["fencing_token"], event.fencing_token);
    assert_eq!(line["event"], hex::encode(&Sha256::digest("default/stripe/evt_1")[..6]), "as in the gateway's log");
    assert!(line["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")), "{line}");

    operator.resolve(resolve("evt_1", State::Dead, false)).await?;
    assert_eq!(
        said(&next(&guarded, &mut seen).await, &["caller", "to", "outcome"]),
        "caller=operator to=dead outcome=done"
    );
    let missing = operator.resolve(resolve("evt_none", State::Dead, false)).await;
    assert!(missing.is_err());
    assert_eq!(said(&next(&guarded, &mut seen).await, &["to", "outcome"]), "to=dead outcome=EVENT_NOT_FOUND");
    let meant_by_nobody = ResolveRequest { actor: String::new(), ..resolve("evt_1", State::Dead, false) };
    assert!(operator.resolve(meant_by_nobody).await.is_err());
    assert_eq!(
        said(&next(&guarded, &mut seen).await, &["caller", "method", "outcome"]),
        "caller=operator method=Resolve outcome=INVALID_FIELD"
    );

    // Cleanup, whoever may: counted, for real, and as nobody can mean it.
    for (name, request, wanted) in [
        (
            "operator",
            CleanupRequest { dry_run: true, states: vec![State::Dead.into()], ..Default::default() },
            "caller=operator states=dead dry_run=true matched=0 deleted=0 outcome=done message=a cleanup ended",
        ),
        (
            "cleanup",
            CleanupRequest { tenant: "default".into(), provider: "stripe".into(), ..Default::default() },
            "caller=cleanup tenant=default provider=stripe states=completed dry_run=false matched=0 deleted=0 outcome=done \
             message=a cleanup ended",
        ),
    ] {
        let mut progress = client(&guarded, name)?.cleanup(request).await?.into_inner();
        while progress.message().await?.is_some() {}
        let line = next(&guarded, &mut seen).await;
        let names = ["caller", "tenant", "provider", "states", "dry_run", "matched", "deleted", "outcome", "message"];
        assert_eq!(said(&line, &names), wanted);
        assert!(line["before"].as_str().is_some_and(|before| before.ends_with('Z')), "{line}");
    }
    let older_than = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let below_the_floor = CleanupRequest { older_than, ..Default::default() };
    assert!(operator.cleanup(below_the_floor).await.is_err());
    assert_eq!(
        said(&next(&guarded, &mut seen).await, &["caller", "method", "outcome", "level"]),
        "caller=operator method=Cleanup outcome=INVALID_FIELD level=WARN"
    );
    Ok(())
}

#[tokio::test]
async fn every_denial_leaves_one_audit_line() -> Result<()> {
    let guarded = Guarded::start_with(quiet).await?;
    let mut seen = 0;
    for (credentials, method, wanted) in [
        (None, "Stats", "method=Stats outcome=UNAUTHENTICATED"),
        (Some("expired"), "Resolve", "caller=expired method=Resolve outcome=UNAUTHENTICATED"),
        (Some("caller"), "Resolve", "caller=caller method=Resolve outcome=PERMISSION_DENIED"),
        (Some("cleanup"), "Resolve", "caller=cleanup method=Resolve outcome=PERMISSION_DENIED"),
        // The tenant of the request is another one than the caller's.
        (Some("other"), "CheckAndLock", "caller=other tenant=default method=CheckAndLock outcome=PERMISSION_DENIED"),
        (Some("other"), "Stats", "caller=other tenant=default method=Stats outcome=PERMISSION_DENIED"),
    ] {
        let credentials = credentials.map(token);
        let pool = pool(&guarded.url, &guarded.ca(), None, credentials.as_deref())?;
        assert!(matches!(attempt(&pool, method).await?, 'U' | 'P'), "{wanted}");
        let mut line = next(&guarded, &mut seen).await;
        assert_eq!((&line["message"], &line["level"]), (&"a call was denied".into(), &"WARN".into()));
        assert!(line["why"].is_string() && line["peer"].is_string(), "{line}");
        if line["caller"] == "" {
            line["caller"] = Value::Null;
        }
        let said = said(&line, &["caller", "tenant", "method", "outcome"]).replace('"', "");
        assert_eq!(said, wanted);
    }
    Ok(())
}

#[tokio::test]
async fn every_switch_of_enforcement_leaves_one_audit_line() -> Result<()> {
    let everything = Everything::start_with(Ledger::Sqlite, &[("ONCEGATE_LOG", QUIET)]).await?;
    let mut wanted = Vec::new();
    for to in ["observe", "enforce"] {
        // The second time nothing is switched.
        for _ in 0..2 {
            let path = format!("/enforcement?to={to}");
            let answer = http_client::send(everything.admin, http::Method::PUT, &path, &[], "").await?;
            assert_eq!(answer.status, 200);
        }
        wanted.push(format!(
            "path=/webhooks/payments/stripe tenant=default provider=stripe enforcement={to} by=admin listener outcome=done \
             level=WARN message=enforcement of a route was switched"
        ));
    }
    let names = ["path", "tenant", "provider", "enforcement", "by", "outcome", "level", "message"];
    eventually("the switches are logged, once each", async || {
        let lines = audit(&everything.program.output());
        let found: Vec<_> = lines.iter().map(|line| said(line, &names)).collect();
        (found == wanted).then_some(())
    })
    .await;
    Ok(())
}
