//! Holders that stop in the middle, rows that nobody sees yet, and two writers in opposite orders.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use oncegate_api::{
    reason,
    v1::{Decision, Outcome, State},
};
use oncegate_e2e::{
    eventually,
    postgres::Database,
    program::{Oncegate, Running},
    stripe,
    upstream::{Answer, Upstream},
};
use oncegate_sidecar::{
    event::Decision as Decided,
    ledger::{
        Ledger as _,
        postgres::{PostgresLedger, PostgresSettings},
    },
};
use sqlx::Connection as _;
use tonic_types::StatusExt as _;

use super::{Sidecar, ask, claim, completion, history};
use crate::{
    ledger,
    setup::{Ledger, SECRET, on_each_ledger, send_signed, word},
};

on_each_ledger!(a_gateway_that_slept_through_its_lock_completes_nothing);

fn gateway(directory: &tempfile::TempDir, sidecar: &Sidecar, upstream: &Upstream) -> Result<Running> {
    Oncegate::new(directory.path(), ["gateway"])?
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("SIDECAR_URL", format!("http://{}", sidecar.address))
        .env("UPSTREAM_URL", upstream.url())
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        .env("UPSTREAM_TIMEOUT", "1s")
        .env("UPSTREAM_CONNECT_TIMEOUT", "500ms")
        .env("GATEWAY_LOCK_DURATION", "3s")
        .env("GATEWAY_LOCK_MARGIN", "1s")
        .start()
}

/// T04. A gateway is stopped while the application is at work, for longer than its lock; another takes over. The first
/// one's completion comes too late, and changes nothing.
async fn a_gateway_that_slept_through_its_lock_completes_nothing(ledger: Ledger) -> Result<()> {
    let sidecar = Sidecar::start(ledger).await?;
    let (upstream, directory) = (Upstream::start().await?, tempfile::tempdir()?);
    let mut first = gateway(&directory, &sidecar, &upstream)?;
    let mut second = gateway(&directory, &sidecar, &upstream)?;
    let (one, other) = (first.address("gateway").await?, second.address("gateway").await?);
    let client = sidecar.client().await?;
    let id = stripe::event_id();
    let body = stripe::event(&id, "charge.succeeded");
    let send = |gateway| {
        let (signature, body) = (stripe::sign(SECRET, &body), body.clone());
        async move { send_signed(gateway, &signature, &body).await }
    };

    // Answered while the gateway sleeps.
    upstream.answer_next([Answer::ok().after(Duration::from_millis(600)), Answer::ok()]);
    let slept = tokio::spawn(send(one));
    upstream.wait_for(1).await;
    first.signal("STOP")?;
    let taken_over = eventually("the other gateway gets the event when the lock has expired", async || {
        let answer = send(other).await.ok()?;
        (word(&answer) == "200 processed").then_some(())
    });
    taken_over.await;
    first.signal("CONT")?;
    let answer = slept.await??;
    // Not its own doing: the event is completed by now (G6).
    assert!(matches!(word(&answer).as_str(), "200 already_processed" | "200 processed"), "{}", word(&answer));

    let deliveries = upstream.requests();
    assert_eq!(deliveries.len(), 2);
    let token = |number: usize| -> Result<i64> { Ok(deliveries[number].header("oncegate-fencing-token").parse()?) };
    let (stale, current) = (token(0)?, token(1)?);
    assert!(stale < current, "I1");
    // The application that refuses a token smaller than the largest it has seen has one effect: the second delivery's.
    let effects = [(stale, deliveries[0].at), (current, deliveries[1].at)];
    assert!(effects[0].1 < effects[1].1);

    let event = history(&client, &id).await?.context("the event")?;
    let outcomes: Vec<_> = event.attempts.iter().map(|attempt| (attempt.fencing_token, attempt.outcome())).collect();
    assert_eq!(outcomes, [(stale, Outcome::LockExpired), (current, Outcome::Completed)], "I3, I4");
    assert_eq!(event.event.context("the event")?.fencing_token, current);

    // And what the sidecar says to such a call.
    let status = client.clone().mark_completed(completion(&id, stale)).await.expect_err("a stale token");
    assert_eq!(status.code(), tonic::Code::Aborted);
    let info = status.get_details_error_info().context("ErrorInfo")?;
    assert_eq!(
        (info.reason.as_str(), info.metadata["fencing_token"].as_str()),
        (reason::LOCK_LOST, &*current.to_string())
    );
    Ok(())
}

/// T13. A row that another session has inserted and not committed is seen by no snapshot, and still is in the way.
#[tokio::test]
async fn an_event_that_another_session_is_just_inserting_gets_a_definite_answer() -> Result<()> {
    let sidecar = Sidecar::start(Ledger::postgres().await?).await?;
    let client = sidecar.client().await?;
    let database = sidecar.database().context("a database")?;
    ask(&client, claim("evt_0", "claim-0")).await?;
    for (round, commits) in [true, false, true, false].into_iter().enumerate() {
        let event_id = format!("evt_{}", round + 1);
        let mut other = database.connect().await?;
        sqlx::raw_sql("begin").execute(&mut other).await?;
        // As another sidecar's claim leaves it, before its commit.
        let insert = format!(
            "insert into payment_webhook_events overriding user value
            select (jsonb_populate_record(event, jsonb_build_object(
                'event_id', '{event_id}', 'fencing_token', nextval('oncegate_fencing_token'), 'claim_id', 'theirs'))).*
            from payment_webhook_events as event where event_id = 'evt_0'"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(insert)).execute(&mut other).await?;
        let asked = tokio::spawn({
            let (client, event_id) = (client.clone(), event_id.clone());
            async move { ask(&client, claim(&event_id, "ours")).await }
        });
        let waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' \
            and datname = current_database()";
        eventually("our claim waits for theirs", async || (database.query(waits).await.ok()? != "0").then_some(()))
            .await;
        sqlx::raw_sql(if commits { "commit" } else { "rollback" }).execute(&mut other).await?;
        let answer = asked.await??;
        assert_eq!(answer.decision(), if commits { Decision::InProgress } else { Decision::Acquired }, "{event_id}");
        let event = history(&client, &event_id).await?.context("the event")?.event.context("the event")?;
        assert_eq!((event.state(), event.attempt_count), (State::Processing, 1));
    }
    assert!(!sidecar.program.output().contains("\"ERROR\""), "{}", sidecar.program.output());
    Ok(())
}

/// T15. Two writers on one database, each with batches of the same keys in opposite orders, with duplicates in each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_writers_in_opposite_orders_with_duplicates_in_a_batch_do_not_deadlock() -> Result<()> {
    const EVENTS: usize = 60;
    const ROUNDS: usize = 10;
    let database = Database::create().await?;
    // Found before anybody gives up waiting for a lock, or a deadlock would not be seen as one.
    let mut admin = database.connect().await?;
    let quick = format!("alter database {} set deadlock_timeout = '20ms'", database.name());
    sqlx::raw_sql(sqlx::AssertSqlSafe(quick)).execute(&mut admin).await?;
    admin.close().await?;
    let mut writers = Vec::new();
    for _ in 0..2 {
        writers.push(Arc::new(PostgresLedger::connect(database.url(), &PostgresSettings::default()).await?));
    }
    let deadlocks = "select deadlocks from pg_stat_database where datname = current_database()";
    for round in 0..ROUNDS {
        let mut callers = tokio::task::JoinSet::new();
        for (writer, ledger) in writers.iter().enumerate() {
            for place in 0..EVENTS * 3 {
                let event = if writer == 0 { place / 3 } else { EVENTS - 1 - place / 3 };
                let ledger = Arc::clone(ledger);
                callers.spawn(async move {
                    let key = ledger::key(&format!("evt_{round}_{event}"));
                    let request = ledger::claim(&key, &format!("claim-{writer}-{place}"));
                    let claimed = ledger.claim(request).await.map_err(|error| anyhow::anyhow!("{error:?}"))?;
                    match claimed.decision {
                        Decided::Acquired(lock) => {
                            let marked = ledger.mark(ledger::completion(&key, &lock)).await;
                            marked.map_err(|error| anyhow::anyhow!("{error:?}"))?;
                            Ok(Some(event))
                        }
                        Decided::InProgress { .. } | Decided::AlreadyCompleted => Ok(None),
                        Decided::Refused => anyhow::bail!("refused"),
                    }
                });
            }
        }
        let mut won = Vec::new();
        while let Some(answer) = callers.join_next().await {
            won.extend(answer??);
        }
        won.sort_unstable();
        assert_eq!(won, (0..EVENTS).collect::<Vec<_>>(), "each event has one winner");
    }
    for writer in writers {
        writer.close().await;
    }
    // A session tells what it has seen when it ends.
    let sessions = "select count(*) from pg_stat_activity \
        where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()";
    eventually("all sessions have ended", async || (database.query(sessions).await.ok()? == "0").then_some(())).await;
    assert_eq!(database.query(deadlocks).await?, "0");
    Ok(())
}
