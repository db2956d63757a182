//! ExtendLock.

use std::num::NonZeroU32;

use oncegate_sidecar::event::{Claim, Decision, Extend, FailureKind, FencingToken, Loss, Micros, Refusal, State};

use super::{
    Fixture, HOUR, MINUTE, claim, completion, conformance, extension, failure, key, latest, lost, lost_by, refused,
};

conformance!(
    the_expiry_moves_and_the_token_stays,
    a_lock_is_never_shortened,
    only_the_holder_extends,
    an_expired_lock_that_nobody_took_is_extended,
    a_lock_that_was_taken_or_has_ended_is_lost,
);

async fn the_expiry_moves_and_the_token_stays(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(Claim { lock_duration: MINUTE, ..claim(&key, "claim") }).await;
    let extended = fixture.ledger.extend(extension(&key, &lock, HOUR)).await.unwrap();
    assert_eq!((extended.fencing_token, extended.attempt), (lock.fencing_token, 1));
    assert_eq!(extended.claim_id, "claim");
    assert!(extended.remaining > MINUTE && extended.remaining <= HOUR, "{extended:?}");
    let event = fixture.event(&key).await;
    assert_eq!(latest(&event).lock_expire_time, extended.expire_time);
    assert_eq!(extended.expire_time, event.update_time.plus(HOUR), "counted from now");
    assert_eq!(event.attempt_count, 1);
    // With the claim id as well.
    let request = Extend { claim_id: Some("claim".into()), ..extension(&key, &lock, Micros(2 * HOUR.0)) };
    assert!(fixture.ledger.extend(request).await.unwrap().expire_time > extended.expire_time);
}

async fn a_lock_is_never_shortened(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.acquire(claim(&key, "claim")).await;
    for duration in [Micros::ZERO, Micros(1), MINUTE] {
        let extended = fixture.ledger.extend(extension(&key, &lock, duration)).await.unwrap();
        assert_eq!(extended.expire_time, lock.expire_time);
        assert!(extended.remaining > MINUTE);
    }
}

async fn only_the_holder_extends(fixture: &Fixture) {
    let held = key("evt_1");
    let lock = fixture.acquire(claim(&held, "claim")).await;
    for token in [lock.fencing_token.0 - 1, lock.fencing_token.0 + 1].map(FencingToken) {
        let request = Extend { fencing_token: token, ..extension(&held, &lock, HOUR) };
        assert_eq!(refused(fixture.ledger.extend(request).await), lost(State::Processing, &lock));
    }
    let request = Extend { claim_id: Some("other".into()), ..extension(&held, &lock, HOUR) };
    let refusal = refused(fixture.ledger.extend(request).await);
    assert_eq!(refusal, lost_by(Loss::OtherClaim, State::Processing, &lock));
    let absent = extension(&key("evt_2"), &lock, HOUR);
    assert_eq!(refused(fixture.ledger.extend(absent).await), Refusal::NotFound);
    assert_eq!(latest(&fixture.event(&held).await).lock_expire_time, lock.expire_time);
}

async fn an_expired_lock_that_nobody_took_is_extended(fixture: &Fixture) {
    let key = key("evt_1");
    let lock = fixture.expired(&key, "first").await;
    let extended = fixture.ledger.extend(extension(&key, &lock, HOUR)).await.unwrap();
    assert_eq!((extended.fencing_token, extended.attempt), (lock.fencing_token, 1));
    let second = fixture.claim(claim(&key, "second")).await;
    assert!(matches!(second.decision, Decision::InProgress { .. }), "it is live again: {second:?}");
    assert_eq!(fixture.acquire(claim(&key, "first")).await.fencing_token, lock.fencing_token);
}

async fn a_lock_that_was_taken_or_has_ended_is_lost(fixture: &Fixture) {
    let extend = async |key: &_, lock: &_| refused(fixture.ledger.extend(extension(key, lock, HOUR)).await);
    let taken = key("taken");
    let first = fixture.expired(&taken, "first").await;
    let second = fixture.acquire(claim(&taken, "second")).await;
    assert_eq!(extend(&taken, &first).await, lost(State::Processing, &second));

    let done = key("done");
    let lock = fixture.acquire(claim(&done, "claim")).await;
    fixture.mark(completion(&done, &lock)).await;
    assert_eq!(extend(&done, &lock).await, lost_by(Loss::Ended, State::Completed, &lock));

    let failed = key("failed");
    let lock = fixture.acquire(claim(&failed, "claim")).await;
    fixture.mark(failure(&failed, &lock, FailureKind::Retryable)).await;
    assert_eq!(extend(&failed, &lock).await, lost_by(Loss::Ended, State::Failed, &lock));

    let buried = key("buried");
    let lock = fixture.expired(&buried, "first").await;
    fixture.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(&buried, "second") }).await;
    assert_eq!(extend(&buried, &lock).await, lost_by(Loss::Ended, State::Dead, &lock));
}
