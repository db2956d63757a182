//! History: pages by key set, filters, and one event with all that was done on it.

use std::collections::HashSet;

use oncegate_sidecar::{
    event::{Claim, Event, FailureKind, Key, Mark, State, StoredResult, Time},
    ledger::{
        EventHistory,
        filter::{CleanupProgress, CleanupScope, Cursor, HistoryFilter, Page},
    },
};

use super::{Fixture, claim, completion, conformance, failure, key};

conformance!(
    an_absent_event_has_no_history,
    pages_are_newest_first_and_end,
    pages_have_neither_gaps_nor_repeats_while_events_come_and_go,
    filters_narrow_the_pages,
    bounds_on_the_creation_are_half_open,
    of_very_many_attempts_the_latest_are_told,
    of_the_results_of_many_attempts_the_bodies_of_the_latest_are_read,
    a_page_ends_when_it_holds_as_much_as_a_message_takes,
);

fn all(page_size: usize) -> HistoryFilter {
    HistoryFilter {
        tenant: None,
        provider: None,
        event_type: None,
        states: Vec::new(),
        start_time: None,
        end_time: None,
        page_size,
        after: None,
    }
}

/// Every page, to the end.
async fn walk(fixture: &Fixture, mut filter: HistoryFilter) -> Vec<Event> {
    let mut found = Vec::new();
    loop {
        let page = fixture.ledger.history(filter.clone()).await.unwrap();
        assert!(page.events.len() <= filter.page_size);
        found.extend(page.events);
        match page.next {
            Some(next) => {
                assert_eq!(Some(next), found.last().map(Cursor::of), "the next page begins where this one ends");
                filter.after = Some(next);
            }
            None => return found,
        }
    }
}

fn ids(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.key.event_id.as_str()).collect()
}

async fn an_absent_event_has_no_history(fixture: &Fixture) {
    assert_eq!(fixture.ledger.history_of(key("evt_1")).await.unwrap(), None);
    let page = fixture.ledger.history(all(10)).await.unwrap();
    assert!(page.events.is_empty() && page.next.is_none());
}

async fn pages_are_newest_first_and_end(fixture: &Fixture) {
    let names: Vec<String> = (0..20).map(|number| format!("evt_{number:02}")).collect();
    for name in &names {
        fixture.acquire(claim(&key(name), "claim")).await;
    }
    let newest_first: Vec<&str> = names.iter().rev().map(String::as_str).collect();
    for page_size in [1, 3, 7, 19, 20, 21, 500] {
        let events = walk(fixture, all(page_size)).await;
        assert_eq!(ids(&events), newest_first, "pages of {page_size}");
    }
    // A page that takes the last event is the last one.
    for page_size in [5, 20] {
        let mut filter = all(page_size);
        let mut pages = 0;
        loop {
            let page = fixture.ledger.history(filter.clone()).await.unwrap();
            pages += 1;
            assert_eq!(page.events.len(), page_size);
            filter.after = page.next;
            if page.next.is_none() {
                break;
            }
        }
        assert_eq!(pages, 20 / page_size);
    }
    let event = &walk(fixture, all(100)).await[0];
    assert_eq!(*event, fixture.event(&event.key).await, "a listing tells as much of an event as its own history");
}

async fn pages_have_neither_gaps_nor_repeats_while_events_come_and_go(fixture: &Fixture) {
    let stays = |number| key(&format!("stays_{number:03}"));
    let mut locks = Vec::new();
    for number in 0..60 {
        fixture.ledger.claim(claim(&stays(number), "claim")).await.unwrap();
        let goes = key(&format!("goes_{number:03}"));
        let lock = fixture.acquire(claim(&goes, "claim")).await;
        locks.push((goes, lock));
    }
    for (goes, lock) in &locks {
        fixture.ledger.mark(completion(goes, lock)).await.unwrap();
    }
    let mut filter = all(7);
    let mut seen = Vec::new();
    let mut round = 0;
    loop {
        let page = fixture.ledger.history(filter.clone()).await.unwrap();
        seen.extend(page.events.iter().map(|event| event.key.event_id.clone()));
        // Meanwhile new ones come, and old ones go, a few of them those that the last page ended with.
        for number in 0..5 {
            fixture.ledger.claim(claim(&key(&format!("new_{round}_{number}")), "claim")).await.unwrap();
        }
        let scope = CleanupScope {
            tenant: None,
            provider: None,
            before: fixture.now().await,
            states: vec![State::Completed],
            dry_run: false,
            batch_size: 10,
        };
        let after = filter.after.map(|after| Cursor { create_time: Time(after.create_time.0 - 1_000), ..after });
        let mut progress = CleanupProgress { cursor: after, ..CleanupProgress::default() };
        fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        filter.after = page.next;
        if page.next.is_none() {
            break;
        }
        round += 1;
    }
    let distinct: HashSet<&String> = seen.iter().collect();
    assert_eq!(distinct.len(), seen.len(), "repeated: {seen:?}");
    let stayed: Vec<&String> = seen.iter().filter(|id| id.starts_with("stays")).collect();
    let expected: Vec<String> = (0..60).rev().map(|number| stays(number).event_id).collect();
    assert_eq!(stayed, expected.iter().collect::<Vec<_>>());
    assert!(!seen.iter().any(|id| id.starts_with("new")), "what came later is not on an older page");
}

async fn filters_narrow_the_pages(fixture: &Fixture) {
    let mut expected = Vec::new();
    for tenant in ["default", "other"] {
        for provider in ["stripe", "paypal"] {
            for event_type in ["paid", "refunded"] {
                for state in ["processing", "completed", "failed"] {
                    let key = Key {
                        tenant: tenant.into(),
                        provider: provider.into(),
                        event_id: format!("{event_type}-{state}"),
                    };
                    let lock = fixture.acquire(Claim { event_type: event_type.into(), ..claim(&key, "claim") }).await;
                    match state {
                        "completed" => drop(fixture.mark(completion(&key, &lock)).await),
                        "failed" => drop(fixture.mark(failure(&key, &lock, FailureKind::Retryable)).await),
                        _ => {}
                    }
                    expected.push((tenant, provider, event_type, State::parse(state).unwrap()));
                }
            }
        }
    }
    let states = [vec![], vec![State::Completed], vec![State::Failed, State::Processing], vec![State::Dead]];
    for tenant in [None, Some("default"), Some("other"), Some("absent")] {
        for provider in [None, Some("stripe")] {
            for event_type in [None, Some("refunded"), Some("refund")] {
                for states in &states {
                    let filter = HistoryFilter {
                        tenant: tenant.map(str::to_owned),
                        provider: provider.map(str::to_owned),
                        event_type: event_type.map(str::to_owned),
                        states: states.clone(),
                        ..all(2)
                    };
                    let found: Vec<_> = walk(fixture, filter.clone())
                        .await
                        .into_iter()
                        .map(|event| (event.key.tenant, event.key.provider, event.event_type, event.state))
                        .collect();
                    let wanted: Vec<_> = expected
                        .iter()
                        .rev()
                        .filter(|(of_tenant, of_provider, of_type, state)| {
                            tenant.is_none_or(|tenant| tenant == *of_tenant)
                                && provider.is_none_or(|provider| provider == *of_provider)
                                && event_type.is_none_or(|event_type| event_type == *of_type)
                                && (states.is_empty() || states.contains(state))
                        })
                        .map(|(tenant, provider, event_type, state)| {
                            ((*tenant).to_owned(), (*provider).to_owned(), (*event_type).to_owned(), *state)
                        })
                        .collect();
                    assert_eq!(found, wanted, "{filter:?}");
                }
            }
        }
    }
}

async fn bounds_on_the_creation_are_half_open(fixture: &Fixture) {
    let mut times = Vec::new();
    for number in 0..6 {
        let key = key(&format!("evt_{number}"));
        fixture.acquire(claim(&key, "claim")).await;
        times.push(fixture.event(&key).await.create_time);
    }
    for (start, end) in [(None, None), (Some(2), None), (None, Some(4)), (Some(2), Some(4)), (Some(4), Some(2))] {
        let filter = HistoryFilter {
            start_time: start.map(|start: usize| times[start]),
            end_time: end.map(|end: usize| times[end]),
            ..all(2)
        };
        let found: Vec<_> = walk(fixture, filter).await.iter().map(|event| event.create_time).collect();
        let wanted: Vec<_> = times
            .iter()
            .rev()
            .copied()
            .filter(|time| start.is_none_or(|start| times[start] <= *time) && end.is_none_or(|end| *time < times[end]))
            .collect();
        assert_eq!(found, wanted, "from {start:?} to {end:?}");
    }
}

async fn of_very_many_attempts_the_latest_are_told(fixture: &Fixture) {
    let key = key("evt_1");
    let last = EventHistory::ATTEMPTS_MAX + 3;
    for number in 1..=last {
        let lock = fixture.acquire(claim(&key, &format!("claim-{number}"))).await;
        fixture.mark(failure(&key, &lock, FailureKind::Retryable)).await;
    }
    let attempts = fixture.history_of(&key).await.attempts;
    let numbers: Vec<i32> = attempts.iter().map(|attempt| attempt.attempt).collect();
    assert_eq!(numbers, (4..=last).collect::<Vec<_>>());
}

/// A result of the largest size.
fn large(of: Mark) -> Mark {
    Mark { result: Some(StoredResult { code: 502, body: vec![7; 64 << 10].into(), content_type: String::new() }), ..of }
}

async fn of_the_results_of_many_attempts_the_bodies_of_the_latest_are_read(fixture: &Fixture) {
    let key = key("evt_1");
    for number in 1..=40 {
        let lock = fixture.acquire(claim(&key, &format!("claim-{number}"))).await;
        fixture.mark(large(failure(&key, &lock, FailureKind::Retryable))).await;
    }
    let history = fixture.history_of(&key).await;
    assert_eq!(history.bodies_omitted, (1..=8).collect());
    for (number, attempt) in (1..).zip(&history.attempts) {
        let result = attempt.result.as_ref().unwrap();
        assert_eq!((attempt.attempt, result.code), (number, 502));
        assert_eq!(result.body.len(), if number <= 8 { 0 } else { 64 << 10 }, "{number}");
    }
    assert_eq!(history.attempts.len(), 40);
}

async fn a_page_ends_when_it_holds_as_much_as_a_message_takes(fixture: &Fixture) {
    // As many fit as bytes, so that the last page holds all that it may and is the last one all the same.
    let fit = Page::BYTES_MAX / (64 << 10);
    let names: Vec<String> = (0..2 * fit).map(|number| format!("evt_{number:03}")).collect();
    for name in &names {
        let lock = fixture.acquire(claim(&key(name), "claim")).await;
        fixture.mark(large(completion(&key(name), &lock))).await;
    }
    let newest_first: Vec<&str> = names.iter().rev().map(String::as_str).collect();
    for filter in [all(500), HistoryFilter { states: vec![State::Completed], ..all(500) }, all(60), all(30)] {
        assert_eq!(ids(&walk(fixture, filter).await), newest_first);
    }
    let page = fixture.ledger.history(all(500)).await.unwrap();
    let next = page.next.unwrap();
    assert_eq!((page.events.len(), Some(next)), (fit, page.events.last().map(Cursor::of)));
    // The connection that the rest of the rows came over reads on.
    let page = fixture.ledger.history(HistoryFilter { after: Some(next), ..all(500) }).await.unwrap();
    assert_eq!((page.events.len(), page.next), (fit, None));
}
