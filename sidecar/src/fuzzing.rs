//! Entry points for hostile input: whatever the bytes, nothing here panics, hangs, or allocates much more than it is given.
//! Only in tests, and with the feature `fuzzing`, which only the fuzzer sets.

use std::sync::LazyLock;

use oncegate_api::v1;
use prost::Message;

use crate::{
    cache::entry::Codec,
    config::Policy,
    event::{Key, KeyDigest, RowId, State, Time},
    grpc::{page_token, validate},
    ledger::{
        Standing,
        filter::{Cursor, HistoryFilter},
    },
};

/// A page token, as text that a client sends. An accepted token is exactly one that would be given out.
pub fn page_token(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    for filter in [HistoryFilter::default(), HistoryFilter { states: vec![State::Failed], ..HistoryFilter::default() }]
    {
        if let Ok(cursor) = page_token::decode(&text, &filter) {
            assert_eq!(page_token::encode(cursor, &filter), text);
        }
        let cursor = Cursor { create_time: Time(1), row: RowId(i64::try_from(input.len()).unwrap_or(0)) };
        assert_eq!(page_token::decode(&page_token::encode(cursor, &filter), &filter), Ok(cursor));
    }
}

/// A value in Redis: as it is, and with a valid MAC, so that the code behind the check is reached. An accepted value stays
/// the same when written again.
pub fn cache_value(input: &[u8]) {
    static CODEC: LazyLock<Codec> = LazyLock::new(|| {
        Codec::new(&Standing { identity: "fuzz:1".into(), generation: 1, cache_key: vec![7; 32].into() })
    });
    let key = Key { tenant: "default".into(), provider: "stripe".into(), event_id: "evt_1".into() };
    let digest = KeyDigest::of(&key);
    assert!(CODEC.decode(digest, input).is_err(), "a value without the key's MAC was accepted");
    if let Ok(entry) = CODEC.decode(digest, &CODEC.sealed(digest, input)) {
        let again = CODEC.encode(digest, &entry);
        assert_eq!(CODEC.decode(digest, &again), Ok(entry));
    }
}

/// A message of any method, decoded and validated. The first byte says which.
pub fn requests(input: &[u8]) {
    let Some((method, message)) = input.split_first() else { return };
    let policy = Policy::default();
    fn decoded<M: Message + Default>(message: &[u8], validate: impl FnOnce(M)) {
        if let Ok(message) = M::decode(message) {
            validate(message);
        }
    }
    match method % 8 {
        0 => decoded(message, |request: v1::CheckAndLockRequest| {
            if let Ok((claim, _)) = validate::check_and_lock(request, &policy) {
                assert!(!claim.claim_id.is_empty() && !claim.key.tenant.is_empty());
                assert!((1_000_000..=86_400_000_000).contains(&claim.lock_duration.0));
            }
        }),
        1 => decoded(message, |request: v1::ExtendLockRequest| drop(validate::extend_lock(request, &policy))),
        2 => decoded(message, |request: v1::MarkCompletedRequest| drop(validate::mark_completed(request, &policy))),
        3 => decoded(message, |request: v1::MarkFailedRequest| drop(validate::mark_failed(request, &policy))),
        4 => decoded(message, |request: v1::ResolveRequest| drop(validate::resolve(request))),
        5 => decoded(message, |request: v1::HistoryRequest| drop(validate::history(request))),
        6 => decoded(message, |request: v1::StatsRequest| drop(validate::stats(request))),
        _ => decoded(message, |request: v1::CleanupRequest| {
            if let Ok(cleanup) = validate::cleanup(request, &policy) {
                assert!(cleanup.older_than.to_std() >= policy.retention_min);
            }
        }),
    }
}

#[cfg(test)]
mod tests {
    use oncegate_inputs::campaign;

    #[test]
    fn no_page_token_does_harm() {
        campaign("page_token", super::page_token);
    }

    #[test]
    fn no_value_in_redis_does_harm() {
        campaign("cache_value", super::cache_value);
    }

    #[test]
    fn no_message_does_harm() {
        campaign("requests", super::requests);
    }
}
