//! I11: whatever a provider sends is counted once, under what became of it.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use oncegate_e2e::{
    chaos::{
        application::{Guard, Temper},
        check::conservation::samples,
        client::webhook,
        history::{Call, Reply},
        rows,
        seed::Seed,
        world::World,
    },
    eventually, http_client,
    proxy::{Direction, Link},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_webhook_is_counted_once_by_what_became_of_it() -> Result<()> {
    let seed = Seed::from_environment();
    let world = World::start(2, Guard::EventId, Temper::Moody(seed)).await?;
    let gateways = world.gateway_addresses();
    // Trouble behind the gateways; in front of them, every answer arrives, so that they can be compared.
    let trouble = async {
        let mut dice = seed.dice("trouble");
        for _ in 0..12 {
            let number = dice.index(2);
            let cut = Link::CutAfter(Direction::Reply, dice.between(0, 400));
            let link = *dice.one_of(&[Link::Refuse, Link::Stall, cut]);
            let ways = [
                &world.sidecars[number].to_postgres,
                &world.sidecars[number].from_gateway,
                &world.gateways[number].to_application,
            ];
            let way = dice.one_of(&ways);
            way.set(link);
            tokio::time::sleep(dice.millis(50, 300)).await;
            way.set(Link::Up);
            tokio::time::sleep(dice.millis(0, 200)).await;
        }
    };
    let providers = (0..8).map(|provider| {
        let (recorder, gateways) = (world.recorder.clone(), gateways.clone());
        let mut dice = seed.dice(&format!("provider {provider}"));
        async move {
            for round in 0..8 {
                // Two providers send each event, at different gateways.
                let event = format!("evt_{}_{round}", provider / 2);
                webhook(&recorder, &gateways, dice.index(2), &event).await;
            }
        }
    });
    let forged = async {
        for _ in 0..5 {
            let headers = [("stripe-signature", "t=1,v1=00")];
            http_client::post(gateways[0], "/webhooks/payments/stripe", &headers, "{}").await?;
        }
        anyhow::Ok(())
    };
    let (_, _, forged) = tokio::join!(trouble, futures::future::join_all(providers), forged);
    forged?;

    let mut seen: BTreeMap<(usize, String), u64> = BTreeMap::from([((0, "unauthorized".to_owned()), 5)]);
    for operation in world.recorder.operations() {
        let (Call::Webhook { gateway }, Some(Reply::Answered { word, .. })) = (&operation.call, operation.reply())
        else {
            panic!("not answered: {operation}");
        };
        *seen.entry((*gateway, word.clone())).or_default() += 1;
    }
    let mut answers = 0;
    let mut delivered = 0;
    for (number, gateway) in world.gateways.iter().enumerate() {
        // What goes on in the background ends with a mark.
        let metrics = eventually("nothing is under way", async || {
            let answer = http_client::get(gateway.admin, "/metrics").await.ok()?;
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            (samples(&text, "oncegate_gateway_deliveries_under_way").get("") == Some(&0)).then_some(text)
        })
        .await;
        let mut words: BTreeMap<String, u64> = BTreeMap::new();
        for (labels, count) in samples(&metrics, "oncegate_gateway_answers_total") {
            let (_, word) = labels.split_once("answer=\"").expect("answers are counted by their word");
            *words.entry(word.trim_end_matches('"').to_owned()).or_default() += count;
        }
        for (word, count) in words {
            let expected = seen.remove(&(number, word.clone())).unwrap_or_default();
            assert_eq!(count, expected, "gateway {number}, {word}");
            answers += count;
        }
        // I11, exactly: what was verified is what was decided.
        let sum = |name| samples(&metrics, name).values().sum::<u64>();
        assert_eq!(sum("oncegate_gateway_webhooks_total"), sum("oncegate_gateway_claims_total"), "gateway {number}");
        delivered += samples(&metrics, "oncegate_gateway_deliveries_total").values().sum::<u64>();
    }
    assert!(seen.is_empty(), "words that are not counted: {seen:?}");
    assert_eq!(answers, 64 + 5, "every one, once");
    // And every lock that was granted is a delivery that was counted.
    tokio::time::timeout(Duration::from_secs(30), async {
        let rows = rows::of_postgres(&world.database_url()).await?;
        let attempts: usize = rows.events.values().map(|event| event.attempts.len()).sum();
        assert_eq!(u64::try_from(attempts)?, delivered);
        anyhow::Ok(())
    })
    .await?
}
