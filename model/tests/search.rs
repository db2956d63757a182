//! The searches: small worlds in full, and every broken rule found.

#![allow(clippy::print_stdout, reason = "they say what they have seen")]

use std::{collections::BTreeMap, env, num::NonZeroU32, time::Instant};

use oncegate_model::{Broken, Protocol};
use stateright::{Checker, DiscoveryClassification, HasDiscoveries, Model as _};

/// How many claims are sent in the large worlds; each additional one takes about twenty times as long.
const DEPTH: &str = "MODEL_DEPTH";

fn depth() -> u8 {
    env::var(DEPTH).ok().map_or(0, |depth| depth.parse().unwrap_or_else(|_| panic!("{DEPTH} is no number: {depth}")))
}

fn search(name: &str, protocol: Protocol) -> impl Checker<Protocol> + use<> {
    let began = Instant::now();
    // A rule that is broken on purpose need not be found twice.
    let until = if protocol.broken.is_some() { HasDiscoveries::AnyFailures } else { HasDiscoveries::All };
    let checker = protocol.checker().threads(2).finish_when(until).spawn_bfs().join();
    println!(
        "{name}: {} states, {} of them different, {} steps deep, in {:?}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        began.elapsed()
    );
    checker
}

fn one_event() -> Protocol {
    Protocol {
        holders: 2,
        events: 1,
        asks: 2,
        ticks: 3,
        resolutions: 1,
        cleanups: 1,
        crashes: 1,
        attempts_max: NonZeroU32::new(2),
        broken: None,
    }
}

/// Smaller in everything else: two events share only the clock, the sequence and the faults.
fn two_events() -> Protocol {
    Protocol { events: 2, ticks: 2, resolutions: 0, cleanups: 0, ..one_event() }
}

/// An operator and a Cleanup with two events, instead of a second holder and crashes: what they do to one must not affect the
/// other.
fn two_events_decided_on() -> Protocol {
    Protocol { holders: 1, resolutions: 1, cleanups: 1, crashes: 0, ticks: 3, ..two_events() }
}

/// The properties that say "never".
fn counterexamples(checker: &impl Checker<Protocol>) -> BTreeMap<&'static str, usize> {
    let failures = checker
        .discoveries()
        .into_iter()
        .filter(|(name, _)| matches!(checker.discovery_classification(name), DiscoveryClassification::Counterexample));
    failures.map(|(name, path)| (name, path.into_actions().len())).collect()
}

#[test]
fn everything_that_can_happen_to_one_event_keeps_the_invariants() {
    let protocol = one_event();
    // Besides nothing being wrong, everything that the world is meant to show must happen in it.
    search("one event", Protocol { asks: protocol.asks + depth(), ..protocol }).assert_properties();
}

#[test]
fn everything_that_can_happen_to_two_events_keeps_the_invariants() {
    let protocol = two_events();
    let checker = search("two events", Protocol { asks: protocol.asks + depth(), ..protocol });
    assert_eq!(counterexamples(&checker), BTreeMap::new());
    checker.assert_any_discovery("completed");
}

#[test]
fn everything_that_is_decided_on_two_events_keeps_the_invariants() {
    let protocol = two_events_decided_on();
    let checker = search("two events decided on", Protocol { asks: protocol.asks + depth(), ..protocol });
    assert_eq!(counterexamples(&checker), BTreeMap::new());
    checker.assert_any_discovery("completed");
}

#[test]
fn every_broken_rule_is_found() {
    for broken in Broken::ALL {
        let name = format!("{broken:?}");
        let checker = search(&name, Protocol { broken: Some(broken), ..one_event() });
        let found = counterexamples(&checker);
        println!("    after so many steps: {found:?}");
        let property = match broken {
            Broken::MarkIgnoresToken => "I3 no stale completion",
            Broken::TokenPerRow | Broken::ResolutionKeepsToken => "I1 token order",
            Broken::GrantBeforeExpiry | Broken::GrantFromCache => "I2 one live holder",
            Broken::ForgetsEndedClaims => "S4 no ghost lock",
            Broken::AttemptNotArchived => "I10 attempts are dense",
            Broken::ReplayWithoutForce => "I4 one completion",
            Broken::CachedBeforeCommit
            | Broken::CacheIgnoresToken
            | Broken::DeleteInsteadOfTombstone
            | Broken::ForgetsReplays
            | Broken::EntriesLiveForEver
            | Broken::CleanupUndercutsRetention => "I9 told completed only when completed",
            Broken::CleanupTakesOpen => "open events are not deleted",
        };
        assert!(found.contains_key(property), "{name} does not break: {property}");
    }
}
