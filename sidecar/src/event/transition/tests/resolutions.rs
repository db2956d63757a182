//! Resolve on every shape.

use super::*;

pub(super) fn resolve_to(to: Resolved, force: bool, fencing_token: Option<FencingToken>) -> Resolve {
    Resolve {
        key: key(),
        fencing_token,
        to,
        force,
        reason: "checked by hand".into(),
        actor: "amara".into(),
        result: Some(StoredResult { code: 200, body: Default::default(), content_type: String::new() }),
    }
}

pub(super) const TARGETS: [Resolved; 3] = [Resolved::Pending, Resolved::Completed, Resolved::Dead];

/// Whether a resolution to pending, completed and dead applies: without force, and with it.
const RESOLUTIONS: [(Shape, [bool; 3], [bool; 3]); 14] = [
    (Pending, [true; 3], [true; 3]),
    (ProcessingLive, [false; 3], [false; 3]),
    (ProcessingExpired, [true; 3], [true; 3]),
    (Completed, [false; 3], [true, false, false]),
    (CompletedByHand, [false; 3], [true, false, false]),
    (Failed, [true; 3], [true; 3]),
    (FailedPaused, [true; 3], [true; 3]),
    (FailedPausePassed, [true; 3], [true; 3]),
    (Unknown, [true; 3], [true; 3]),
    (DeadTerminal, [true; 3], [true; 3]),
    (DeadUsedUp, [true; 3], [true; 3]),
    (DeadBuried, [true; 3], [true; 3]),
    (DeadLowered, [true; 3], [true; 3]),
    (DeadByHand, [true; 3], [true; 3]),
];

#[test]
fn resolutions_of_an_absent_event_find_nothing() {
    for to in TARGETS {
        let step = resolve(None, None, &resolve_to(to, true, None), NOW);
        assert_eq!(step, ResolveStep::Refuse(Refusal::NotFound));
    }
}

#[test]
fn resolutions_follow_the_table() {
    assert_eq!(RESOLUTIONS.map(|(shape, ..)| shape), Shape::ALL);
    for (shape, plain, forced) in RESOLUTIONS {
        let event = shape.event();
        for (force, applies) in [(false, plain), (true, forced)] {
            for (to, applies) in TARGETS.into_iter().zip(applies) {
                for token in [None, Some(TOKEN)] {
                    let request = resolve_to(to, force, token);
                    // A resolution that another token followed does not stand.
                    for last in [None, Some(resolution(EARLIEST_TOKEN, EARLIER_TOKEN, to))] {
                        let step = resolve(Some(&event), last.as_ref(), &request, NOW);
                        let case = format!("{shape:?}, {request:?}: {step:?}");
                        match step {
                            ResolveStep::Refuse(Refusal::LockLost { loss: Loss::Followed, .. }) => {
                                assert!(last.is_some() && token.is_none(), "{case}");
                            }
                            ResolveStep::Apply => assert!(applies && (last.is_none() || token.is_some()), "{case}"),
                            ResolveStep::Refuse(Refusal::StateConflict { from, to: asked, obstacle }) => {
                                assert!(!applies, "{case}");
                                let expected = match (shape.state(), to) {
                                    (State::Completed, Resolved::Pending) => Obstacle::NotForced,
                                    (State::Completed, _) => Obstacle::Completed,
                                    _ => Obstacle::LockLive,
                                };
                                assert_eq!((from, asked, obstacle), (shape.state(), to.state(), expected), "{case}");
                            }
                            ResolveStep::Repeated | ResolveStep::Refuse(_) => panic!("{case}"),
                        }
                    }
                }
                let step = resolve(Some(&event), None, &resolve_to(to, force, Some(EARLIER_TOKEN)), NOW);
                let lost = Refusal::LockLost { loss: Loss::Changed, state: shape.state(), fencing_token: TOKEN };
                assert_eq!(step, ResolveStep::Refuse(lost), "{shape:?}: made on another token");
            }
        }
    }
}

/// Its answer was lost, and it is sent again without a token, after something has come.
#[test]
fn i4_a_decision_that_something_followed_is_carried_out_again_only_on_a_token_or_for_another_reason() {
    for (shape, ..) in RESOLUTIONS {
        let event = shape.event();
        for to in TARGETS {
            let last = resolution(EARLIEST_TOKEN, EARLIER_TOKEN, to);
            for force in [false, true] {
                let request = resolve_to(to, force, None);
                let lost = Refusal::LockLost { loss: Loss::Followed, state: shape.state(), fencing_token: TOKEN };
                let step = |request: &Resolve| resolve(Some(&event), Some(&last), request, NOW);
                assert_eq!(step(&request), ResolveStep::Refuse(lost), "{shape:?} {to:?}");
                let as_if_it_were_the_first = resolve(Some(&event), None, &request, NOW);
                for other in [
                    Resolve { reason: "again".into(), ..request.clone() },
                    Resolve { actor: "bea".into(), ..request.clone() },
                    Resolve { fencing_token: Some(TOKEN), ..request },
                ] {
                    assert_eq!(step(&other), as_if_it_were_the_first, "{shape:?} {to:?}");
                }
            }
        }
    }
}

#[test]
fn a_decision_that_stands_is_repeated_whatever_token_of_it_the_caller_knows() {
    for (shape, made) in
        [(Pending, Resolved::Pending), (CompletedByHand, Resolved::Completed), (DeadByHand, Resolved::Dead)]
    {
        let event = Event { result: resolve_to(made, false, None).result, ..shape.event() };
        let last = resolution(EARLIER_TOKEN, TOKEN, made);
        for force in [false, true] {
            for to in TARGETS {
                for token in [None, Some(EARLIER_TOKEN), Some(TOKEN), Some(EARLIEST_TOKEN)] {
                    let step = resolve(Some(&event), Some(&last), &resolve_to(to, force, token), NOW);
                    let case = format!("{shape:?} to {to:?}, token {token:?}, force {force}: {step:?}");
                    let known = token != Some(EARLIEST_TOKEN);
                    if to == made && known {
                        assert_eq!(step, ResolveStep::Repeated, "{case}");
                        refused_with_anything_else(&event, &last, &resolve_to(to, force, token));
                    } else {
                        // Another decision must name the token that stands now.
                        assert_ne!(step, ResolveStep::Repeated, "{case}");
                        if token.is_some_and(|token| token != TOKEN) {
                            assert!(matches!(step, ResolveStep::Refuse(Refusal::LockLost { .. })), "{case}");
                        }
                    }
                }
            }
        }
    }
}

/// What would be lost if it were a repetition.
fn refused_with_anything_else(event: &Event, last: &Resolution, request: &Resolve) {
    for differs in 1..8 {
        let (actor, reason, result) = (differs & 1 > 0, differs & 2 > 0, differs & 4 > 0);
        let mut request = request.clone();
        if actor {
            request.actor.push('x');
        }
        if reason {
            request.reason.push('x');
        }
        if result {
            request.result = None;
        }
        let refusal = Refusal::StateConflict {
            from: event.state,
            to: request.to.state(),
            obstacle: Obstacle::Resolved { actor, reason, result },
        };
        assert_eq!(resolve(Some(event), Some(last), &request, NOW), ResolveStep::Refuse(refusal));
    }
}

#[test]
fn a_decision_that_was_overtaken_is_made_again() {
    // Resolved to pending, granted, failed: to pending again is another decision, though the state was left by a token
    // that came after the resolution's.
    let last = resolution(EARLIEST_TOKEN, EARLIER_TOKEN, Resolved::Pending);
    let step = resolve(Some(&Failed.event()), Some(&last), &resolve_to(Resolved::Pending, false, Some(TOKEN)), NOW);
    assert_eq!(step, ResolveStep::Apply);
}

fn resolution(from_fencing_token: FencingToken, fencing_token: FencingToken, to: Resolved) -> Resolution {
    Resolution {
        from_state: State::Unknown,
        to_state: to.state(),
        from_fencing_token,
        fencing_token,
        reason: "checked by hand".into(),
        actor: "amara".into(),
        time: NOW.minus(MINUTE),
    }
}
