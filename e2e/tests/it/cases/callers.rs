//! Callers that go away, and callers that come all at once.

use std::time::Duration;

use anyhow::{Context as _, Result};
use oncegate_api::v1::{Decision, State};
use oncegate_e2e::{
    chaos::{
        application::Guard,
        check::{
            self,
            linear::{self, Verdict},
        },
        client::Caller,
        history::{Ending, Recorder, Reply},
        rows,
        seed::Seed,
    },
    eventually,
    program::Oncegate,
};
use tokio::task::JoinSet;

use super::{Sidecar, ask, claim, completion, history, metric};
use crate::setup::{Ledger, on_each_ledger};

on_each_ledger!(
    two_thousand_calls_that_are_given_up_leave_nothing_open,
    of_64_callers_of_a_new_event_one_gets_it,
    many_events_by_sixteen_callers_each_over_two_sidecars_are_linearizable,
);

/// Calls that one connection carries before the next one is made: fewer than the streams that HTTP/2 lets a caller reset before
/// anybody has looked at them. A crowd that gives up all at once on one connection gets GOAWAY, and so would every other call
/// on it: that is another test's (`rapid_resets_end_the_connection`).
const CROWD: u64 = 16;

/// T01
async fn two_thousand_calls_that_are_given_up_leave_nothing_open(ledger: Ledger) -> Result<()> {
    const CALLS: u64 = 2_000;
    let mut dice = Seed::from_environment().dice("calls");
    let sidecar = Sidecar::start_with(ledger, |command| command.env("SIDECAR_CALLS_MAX", "2")).await?;
    let mut client = sidecar.client().await?;
    // What is completed by calls that are given up; every fourth is.
    let mut held = Vec::new();
    for number in (0..CALLS).step_by(4) {
        let event_id = format!("evt_marked_{number}");
        let lock = ask(&client, claim(&event_id, "")).await?.lock.context("the lock")?;
        held.push((event_id, lock.fencing_token));
    }
    let mut calls = JoinSet::new();
    for number in 0..CALLS {
        if number % CROWD == 0 {
            client = sidecar.client().await?;
        }
        let (mut client, event_id) = (client.clone(), format!("evt_{}", number % 200));
        let mark = held.get(usize::try_from(number / 4)?).filter(|_| number % 4 == 0).cloned();
        let after = Duration::from_micros(dice.between(0, 3_000));
        let dropped = dice.percent(50);
        calls.spawn(async move {
            // Dropped on its way, or given up by the sidecar.
            let limit = if dropped { after } else { Duration::from_secs(60) };
            let mut asked = tonic::Request::new(());
            if !dropped {
                asked.set_timeout(Duration::from_millis(1));
            }
            if let Some((event_id, token)) = mark {
                let request = asked.map(|()| completion(&event_id, token));
                let _ = tokio::time::timeout(limit, client.mark_completed(request)).await;
            } else {
                let request = asked.map(|()| claim(&event_id, ""));
                let _ = tokio::time::timeout(limit, client.check_and_lock(request)).await;
            }
        });
        // Some at once, not all.
        if calls.len() >= 16 {
            calls.join_next().await.context("a call")??;
        }
    }
    while let Some(call) = calls.join_next().await {
        call?;
    }

    // Every place is free again, and can be taken: as many calls at once as are permitted, several times over, on a
    // connection that has seen calls given up and on a new one.
    eventually("no call is under way", async || {
        (metric(&sidecar, "oncegate_calls_under_way").await.ok()? == 0).then_some(())
    })
    .await;
    for (round, client) in [client.clone(), sidecar.client().await?].iter().enumerate() {
        for number in 0..25 {
            let complete = async |number: u32| {
                let event_id = format!("evt_after_{round}_{number}");
                let lock = ask(client, claim(&event_id, "")).await?.lock.context("the lock")?;
                client.clone().mark_completed(completion(&event_id, lock.fencing_token)).await?;
                anyhow::Ok(())
            };
            let (one, other) = tokio::join!(complete(number * 2), complete(number * 2 + 1));
            one.and(other)?;
        }
    }
    for (event_id, token) in &held {
        client.clone().mark_completed(completion(event_id, *token)).await.context("a mark that was given up, again")?;
    }
    let count = "select count(*) from payment_webhook_events where event_id like 'evt\\_marked\\_%' escape '\\' \
        and state = 'completed'";
    assert_eq!(sidecar.outside(count).await?, held.len().to_string(), "marks that were given up, and then repeated");
    let count = "select count(*) from payment_webhook_events where event_id like 'evt\\_after\\_%' escape '\\' \
        and state = 'completed'";
    assert_eq!(sidecar.outside(count).await?, "100", "what was acknowledged is seen from outside");
    if let Some(database) = sidecar.database() {
        let open = "select count(*) from pg_stat_activity where datname = current_database() \
            and state like 'idle in transaction%'";
        assert_eq!(database.query(open).await?, "0");
    }
    assert!(!sidecar.program.output().contains("25P02"), "a transaction that had failed was used");
    Ok(())
}

/// T02
async fn of_64_callers_of_a_new_event_one_gets_it(ledger: Ledger) -> Result<()> {
    let sidecar = Sidecar::start(ledger).await?;
    let mut callers = JoinSet::new();
    for number in 0..64 {
        let client = sidecar.client().await?;
        callers.spawn(async move { ask(&client, claim("evt_1", &format!("claim-{number}"))).await });
    }
    let mut acquired = 0;
    while let Some(answer) = callers.join_next().await {
        match answer??.decision() {
            Decision::Acquired => acquired += 1,
            other => assert_eq!(other, Decision::InProgress),
        }
    }
    assert_eq!(acquired, 1);
    assert_eq!(sidecar.outside("select count(*) from payment_webhook_events").await?, "1");
    let client = sidecar.client().await?;
    let event = eventually("63 duplicates are counted", async || {
        let history = history(&client, "evt_1").await.ok()??;
        (history.event.as_ref()?.duplicate_count == 63).then_some(history)
    })
    .await;
    assert_eq!((event.attempts.len(), event.event.context("the event")?.state()), (1, State::Processing));
    Ok(())
}

/// Events of the test, from the environment (`ONCEGATE_T03_EVENTS`); a thousand in a campaign.
fn events() -> usize {
    std::env::var("ONCEGATE_T03_EVENTS").ok().and_then(|events| events.parse().ok()).unwrap_or(150)
}

/// T03. Every call is recorded, and the record is checked: all of I1 to I6, I10 and I13. On Postgres over two sidecars.
async fn many_events_by_sixteen_callers_each_over_two_sidecars_are_linearizable(ledger: Ledger) -> Result<()> {
    const CALLERS: usize = 16;
    let seed = Seed::from_environment();
    let mut sidecar = Sidecar::start(ledger).await?;
    let directory = tempfile::tempdir()?;
    let mut urls = vec![format!("http://{}", sidecar.address)];
    let mut other = None;
    if let Some(database) = sidecar.database() {
        let mut program = Oncegate::new(directory.path(), ["sidecar"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("DATABASE_URL", database.url())
            .start()?;
        urls.push(format!("http://{}", program.address("sidecar").await?));
        other = Some(program);
    }
    let recorder = Recorder::default();
    let callers = (0..CALLERS).map(|number| {
        let caller = Caller::new(&urls[number % urls.len()], recorder.clone());
        let mut dice = seed.dice(&format!("caller {number}"));
        async move {
            let mut caller = caller?;
            for event in 0..events() {
                let (event, claim_id) = (format!("evt_{event}"), format!("claim-{number}"));
                // A little apart, so that some come before, some while, and some after it is completed.
                tokio::time::sleep(dice.millis(0, 30)).await;
                let reply = caller.claim(&event, &claim_id, None, Duration::ZERO).await;
                if let Some(Reply::Acquired { token, .. }) = reply {
                    tokio::time::sleep(dice.millis(0, 10)).await;
                    caller.mark(&event, &claim_id, token, Ending::Completed, Duration::ZERO).await;
                } else if dice.percent(30) {
                    caller.claim(&event, &claim_id, None, Duration::ZERO).await;
                }
            }
            anyhow::Ok(())
        }
    });
    futures::future::try_join_all(callers).await?;
    let rows = match sidecar.database() {
        Some(database) => rows::of_postgres(database.url()).await?,
        None => {
            sidecar.program.stop().await?;
            rows::of_sqlite(&sidecar.store())?
        }
    };
    drop(other);
    let operations = recorder.operations();
    let effects = Default::default();
    let run =
        check::Run { operations: &operations, deliveries: &[], rows: &rows, effects: &effects, guard: Guard::Nothing };
    let mut violations = check::safety(&run);
    let (mut linearizable, mut undecided) = (0, 0);
    for one in check::by_event(&run) {
        match linear::check(&one) {
            Verdict::Linearizable => linearizable += 1,
            Verdict::Undecided => undecided += 1,
            Verdict::Broken(violation) => violations.push(violation),
        }
    }
    assert!(violations.is_empty(), "{}", check::explain(&violations, &run));
    assert!(linearizable + undecided == events() && undecided * 50 <= linearizable, "{undecided} of {linearizable}");
    let completed = rows.events.values().filter(|event| event.state == "completed").count();
    assert_eq!(completed, events(), "each by one of them");
    let asked =
        |reply: fn(&Reply) -> bool| operations.iter().filter_map(|one| one.reply()).filter(|one| reply(one)).count();
    assert!(asked(|reply| matches!(reply, Reply::InProgress)) > 0, "some came while it was processed");
    assert!(asked(|reply| matches!(reply, Reply::AlreadyCompleted { .. })) > 0, "some came after it");
    Ok(())
}
