//! Metadata through the API: its numbers.

use anyhow::{Context as _, Result};
use oncegate_api::v1;
use prost_types::{ListValue, Struct, Value, value::Kind};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{Served, claim, key};
use crate::setup::{Ledger, on_each_ledger};

on_each_ledger!(doubles_come_back_bit_for_bit);

fn list(key: &str, numbers: impl IntoIterator<Item = f64>) -> Struct {
    let values = numbers.into_iter().map(|number| Value { kind: Some(Kind::NumberValue(number)) }).collect();
    Struct { fields: [(key.to_owned(), Value { kind: Some(Kind::ListValue(ListValue { values })) })].into() }
}

/// The bits of the numbers in a list.
fn bits(metadata: Option<&Struct>, key: &str) -> Result<Vec<u64>> {
    let value = metadata.context("metadata")?.fields.get(key).with_context(|| format!("the list {key}"))?;
    let Some(Kind::ListValue(list)) = &value.kind else { anyhow::bail!("no list: {value:?}") };
    list.values
        .iter()
        .map(|value| match value.kind {
            Some(Kind::NumberValue(number)) => Ok(number.to_bits()),
            _ => anyhow::bail!("no number: {value:?}"),
        })
        .collect()
}

async fn event_of(served: &Served, event_id: &str) -> Result<v1::Event> {
    let request = v1::HistoryRequest { key: key(event_id), ..Default::default() };
    served.client().history(request).await?.into_inner().events.remove(0).event.context("an event")
}

async fn doubles_come_back_bit_for_bit(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let mut random = StdRng::seed_from_u64(1);
    let extremes = [f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324, 0.1, 1e23, -1e16];
    for number in 0..20 {
        // Of all exponents that money and time have; few others, for each of those takes hundreds of digits.
        let mut some = || -> Vec<f64> {
            (0..120).map(|_| random.random_range(-1.0..1.0) * 10_f64.powi(random.random_range(-6..18))).collect()
        };
        let (mut given, added) = (some(), some());
        given.extend(extremes);
        let event_id = format!("evt_{number}");
        let request = v1::CheckAndLockRequest { metadata: Some(list("given", given.clone())), ..claim(&event_id) };
        let granted = served.claim(request.clone()).await?;
        // A duplicate reads what was written.
        let duplicate = served.claim(request).await?;
        let mark = v1::MarkCompletedRequest {
            key: key(&event_id),
            fencing_token: granted.lock.context("a lock")?.fencing_token,
            metadata: Some(list("added", added.clone())),
            ..Default::default()
        };
        let completed = served.client().mark_completed(mark).await?.into_inner();
        let of = |doubles: Vec<f64>| doubles.into_iter().map(f64::to_bits).collect::<Vec<_>>();
        let (given, added) = (of(given), of(added));
        for event in [granted.event, duplicate.event, completed.event.clone()] {
            assert_eq!(bits(event.context("an event")?.metadata.as_ref(), "given")?, given);
        }
        let listed = event_of(&served, &event_id).await?;
        for event in [completed.event.context("an event")?, listed] {
            assert_eq!(bits(event.metadata.as_ref(), "added")?, added);
            assert_eq!(bits(event.metadata.as_ref(), "given")?, given);
        }
    }
    Ok(())
}
