//! Metadata through the API: its numbers, and what they may take.

use anyhow::{Context as _, Result};
use oncegate_api::{reason, v1};
use prost_types::{ListValue, Struct, Value, value::Kind};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::{Served, claim, key, reason_of};
use crate::setup::{Ledger, on_each_ledger};

on_each_ledger!(
    doubles_come_back_bit_for_bit,
    numbers_of_a_claim_count_for_their_decimals,
    numbers_of_a_completion_count_for_their_decimals,
    a_page_takes_events_with_long_numbers,
);

fn list(key: &str, numbers: impl IntoIterator<Item = f64>) -> Struct {
    let values = numbers.into_iter().map(|number| Value { kind: Some(Kind::NumberValue(number)) }).collect();
    Struct { fields: [(key.to_owned(), Value { kind: Some(Kind::ListValue(ListValue { values })) })].into() }
}

/// So many numbers of 301 digits.
fn long(key: &str, count: usize) -> Struct {
    list(key, std::iter::repeat_n(1e300, count))
}

/// As many as one event may have: each with its comma takes 302 bytes.
const LONG_MAX: usize = 27;

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

async fn numbers_of_a_claim_count_for_their_decimals(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let request = |count| v1::CheckAndLockRequest { metadata: Some(long("n", count)), ..claim("evt_1") };
    let status = served.claim(request(LONG_MAX + 1)).await.expect_err("8,463 bytes in decimals");
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::InvalidArgument, reason::INVALID_FIELD));
    let violations = status.get_details_bad_request().context("violations")?.field_violations;
    assert_eq!(violations.iter().map(|violation| violation.field.as_str()).collect::<Vec<_>>(), ["metadata"]);
    let said = &violations[0].description;
    assert!(said.contains("8192") && said.contains("8463") && said.contains("decimals"), "{said}");
    assert_eq!(served.claim(request(LONG_MAX)).await?.event.context("an event")?.metadata, Some(long("n", LONG_MAX)));
    Ok(())
}

async fn numbers_of_a_completion_count_for_their_decimals(ledger: Ledger) -> Result<()> {
    let served = Served::start(ledger).await?;
    let request = v1::CheckAndLockRequest { metadata: Some(long("given", 14)), ..claim("evt_1") };
    let lock = served.claim(request).await?.lock.context("a lock")?;
    let mut metadata = Struct::default();
    // Too long for any event, and too long for one that has as much; then two that fit.
    for part in [long("a", LONG_MAX + 1), long("b", 14), long("c", 10), list("d", [1.5])] {
        metadata.fields.extend(part.fields);
    }
    let mark = v1::MarkCompletedRequest {
        key: key("evt_1"),
        fencing_token: lock.fencing_token,
        metadata: Some(metadata),
        ..Default::default()
    };
    let event = served.client().mark_completed(mark).await?.into_inner().event.context("an event")?;
    assert_eq!(event.state(), v1::State::Completed, "it never refuses a completion");
    for event in [event, event_of(&served, "evt_1").await?] {
        let kept = event.metadata.context("metadata")?.fields;
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["c", "d", "given"]);
    }
    Ok(())
}

async fn a_page_takes_events_with_long_numbers(ledger: Ledger) -> Result<()> {
    const EVENTS: usize = 40;
    let served = Served::start(ledger).await?;
    for number in 0..EVENTS {
        let request =
            v1::CheckAndLockRequest { metadata: Some(long("n", LONG_MAX)), ..claim(&format!("evt_{number}")) };
        served.claim(request).await?;
    }
    let page = served.client().history(v1::HistoryRequest::default()).await?.into_inner();
    assert_eq!((page.events.len(), page.next_page_token.as_str()), (EVENTS, ""));
    Ok(())
}
