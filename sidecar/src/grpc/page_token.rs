//! Page tokens: opaque to clients, and bound to the filters they were made for, so that a token used with other filters
//! is refused instead of returning a meaningless page.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};

use crate::{
    event::{RowId, Time},
    ledger::filter::{Cursor, HistoryFilter},
};

/// The token's format version. A token of any other version is refused, even after an upgrade: listings are
/// short-lived.
const VERSION: u8 = 1;
const DIGEST_BYTES: usize = 8;
const TOKEN_BYTES: usize = 1 + 8 + 8 + DIGEST_BYTES;

/// Why a page token cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PageTokenError {
    /// It is not one of ours.
    #[error("is not a token that this service gave out")]
    Malformed,
    /// It is one of ours, but made for other filters.
    #[error("was given out for other filters: ask for the first page again")]
    OtherFilters,
}

/// The token for the position where a page ended.
pub(crate) fn encode(cursor: Cursor, filter: &HistoryFilter) -> String {
    let mut token = Vec::with_capacity(TOKEN_BYTES);
    token.push(VERSION);
    token.extend(cursor.create_time.0.to_be_bytes());
    token.extend(cursor.row.0.to_be_bytes());
    token.extend(filters(filter));
    URL_SAFE_NO_PAD.encode(token)
}

/// The position that a token stands for.
pub(crate) fn decode(token: &str, filter: &HistoryFilter) -> Result<Cursor, PageTokenError> {
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| PageTokenError::Malformed)?;
    let bytes: [u8; TOKEN_BYTES] = bytes.try_into().map_err(|_| PageTokenError::Malformed)?;
    let (version, rest) = bytes.split_at(1);
    let (create_time, rest) = rest.split_at(8);
    let (row, digest) = rest.split_at(8);
    let number = |bytes: &[u8]| bytes.try_into().map(i64::from_be_bytes).map_err(|_| PageTokenError::Malformed);
    let cursor = Cursor { create_time: Time(number(create_time)?), row: RowId(number(row)?) };
    if version != [VERSION] || cursor.create_time.0 < 0 || cursor.row < RowId::NONE {
        return Err(PageTokenError::Malformed);
    }
    if digest != filters(filter) {
        return Err(PageTokenError::OtherFilters);
    }
    Ok(cursor)
}

/// A digest of everything except the page's size and position.
fn filters(filter: &HistoryFilter) -> [u8; DIGEST_BYTES] {
    let mut hash = Sha256::new();
    for text in [&filter.tenant, &filter.provider, &filter.event_type] {
        hash.update(text.as_deref().unwrap_or_default());
        // No text holds a NUL, so the parts cannot run into each other.
        hash.update([0]);
    }
    let mut states = filter.states.clone();
    states.sort_unstable();
    for state in states {
        hash.update(state.as_str());
        hash.update([0]);
    }
    for time in [filter.start_time, filter.end_time] {
        hash.update(time.map_or(-1, |time| time.0).to_be_bytes());
    }
    let digest = hash.finalize();
    let mut short = [0; DIGEST_BYTES];
    short.copy_from_slice(&digest[..DIGEST_BYTES]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::State;

    fn filter(provider: Option<&str>) -> HistoryFilter {
        HistoryFilter {
            tenant: None,
            provider: provider.map(Into::into),
            event_type: None,
            states: vec![State::Dead],
            start_time: None,
            end_time: None,
            page_size: 50,
            after: None,
        }
    }

    #[test]
    fn a_token_comes_back_as_the_place_it_names() {
        let cursor = Cursor { create_time: Time(1_770_000_000_000_001), row: RowId(42) };
        let token = encode(cursor, &filter(None));
        assert_eq!(decode(&token, &filter(None)), Ok(cursor));
    }

    #[test]
    fn a_token_of_other_filters_is_refused() {
        let token = encode(Cursor { create_time: Time(1), row: RowId(1) }, &filter(None));
        assert_eq!(decode(&token, &filter(Some("stripe"))), Err(PageTokenError::OtherFilters));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        for text in ["", "x", "AAAA", "====", &"A".repeat(34), &"A".repeat(10_000), "\u{e9}"] {
            assert_eq!(decode(text, &filter(None)), Err(PageTokenError::Malformed), "{text:.20}");
        }
    }
}
