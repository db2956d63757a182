//! A holder that stands still past its lock, and whose work arrives all the same (T04, I7): without a guard there are two
//! effects, so the harness is strong enough to show one; with a guard there is one.

use std::time::Duration;

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    chaos::{
        application::{Guard, Temper},
        check,
        client::webhook,
        history::Reply,
        rows,
        world::World,
    },
    eventually,
    proxy::Link,
};

const EVENT: &str = "evt_zombie";

/// What the holder sends is on its way for longer than the lock lasts.
const LATE: Duration = Duration::from_millis(6_000);

/// Gives the tokens of the two attempts and the effects in force at the end.
async fn zombie(guard: Guard) -> Result<([i64; 2], Vec<i64>)> {
    let world = World::start(2, guard, Temper::Reliable).await?;
    let gateways = world.gateway_addresses();
    let way = &world.gateways[0].to_application;
    way.set(Link::Delay(LATE));
    let first = {
        let (recorder, gateways) = (world.recorder.clone(), gateways.clone());
        tokio::spawn(async move { webhook(&recorder, &gateways, 0, EVENT).await })
    };
    eventually("the delivery is on its way", async || (way.requested() > 0).then_some(())).await;
    let holder = world.gateways[0].program.as_ref().context("the first gateway")?;
    holder.freeze()?;
    eventually("another gateway takes over and completes", async || {
        let answer = webhook(&world.recorder, &gateways, 1, EVENT).await;
        matches!(answer, Some(Reply::Answered { status: 200, .. })).then_some(())
    })
    .await;
    eventually("both deliveries have arrived", async || (world.recorder.deliveries().len() == 2).then_some(())).await;
    holder.thaw()?;
    // It is answered, if at all, with what is true by now.
    let first = first.await?;
    assert!(
        matches!(&first, None | Some(Reply::Answered { status: 200 | 409 | 503, .. })),
        "the holder that is back: {first:?}"
    );

    let (operations, deliveries) = (world.recorder.operations(), world.recorder.deliveries());
    let rows = rows::of_postgres(&world.database_url()).await?;
    let row = rows.events.get(EVENT).context("the event")?;
    let outcomes: Vec<&str> = row.attempts.iter().map(|attempt| attempt.outcome.as_str()).collect();
    assert_eq!(outcomes, ["lock_expired", "completed"], "the second one's result stands");
    let tokens = [row.attempts[0].token, row.attempts[1].token];
    let arrived: Vec<i64> = deliveries.iter().map(|delivery| delivery.token).collect();
    assert_eq!(arrived, [tokens[1], tokens[0]], "the first one came last");
    let effects = world.application.effects();
    let run = check::Run { operations: &operations, deliveries: &deliveries, rows: &rows, effects: &effects, guard };
    let violations = check::safety(&run);
    assert!(violations.is_empty(), "{}", check::explain(&violations, &run));
    if guard == Guard::Nothing {
        assert_eq!(check::effects::doubled(&run), [EVENT]);
        // The check itself would have told.
        let strict = check::safety(&check::Run { guard: Guard::EventId, ..run });
        assert!(strict.iter().any(|violation| violation.invariant == "I7"), "{strict:?}");
    }
    Ok((tokens, effects.get(EVENT).cloned().unwrap_or_default()))
}

#[tokio::test]
async fn without_a_guard_a_zombie_makes_a_second_effect() -> Result<()> {
    let ([stale, current], effects) = zombie(Guard::Nothing).await?;
    assert_eq!(effects, [current, stale]);
    Ok(())
}

#[tokio::test]
async fn a_fencing_token_that_is_checked_stops_a_zombie() -> Result<()> {
    let ([_, current], effects) = zombie(Guard::Token).await?;
    assert_eq!(effects, [current]);
    Ok(())
}

#[tokio::test]
async fn an_event_id_that_is_unique_stops_a_zombie() -> Result<()> {
    let ([_, current], effects) = zombie(Guard::EventId).await?;
    assert_eq!(effects, [current]);
    Ok(())
}
