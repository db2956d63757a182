//! What was replayed by force, by whichever sidecar: what cached completions are checked against (C7).

use std::sync::Arc;

use futures::TryStreamExt as _;
use sqlx::Row as _;

use super::read::{ReadError, Reader};
use crate::{
    event::{FencingToken, Key, KeyDigest, Time},
    ledger::{Error, REPLAYS_MAX, Replayed},
};

/// One more than are remembered individually, to tell whether there are more.
const ROWS_MAX: usize = REPLAYS_MAX + 1;

const ALL: &str =
    concat!(include_str!("replays/node.sql"), include_str!("replays/all.sql"), include_str!("replays/answer.sql"));
const SINCE: &str =
    concat!(include_str!("replays/node.sql"), include_str!("replays/since.sql"), include_str!("replays/answer.sql"));

impl Reader {
    /// What was replayed, all of it or what the snapshot `after` does not show, from the node of this identity.
    pub(super) async fn replays(&self, identity: Arc<str>, after: Option<Arc<str>>) -> Result<Replayed, Error> {
        self.run(move |connection| {
            Box::pin(async move {
                let mut rows = match &after {
                    None => sqlx::query(ALL).bind(i64::try_from(ROWS_MAX).unwrap_or(i64::MAX)).fetch(&mut *connection),
                    Some(after) => sqlx::query(SINCE).bind(after.as_ref()).fetch(&mut *connection),
                };
                let mut node = None;
                let mut events = Vec::new();
                while let Some(row) = rows.try_next().await? {
                    match row.try_get::<Option<&str>, _>(0)? {
                        Some(found) => {
                            if *found != *identity {
                                return Err(ReadError::OtherNode);
                            }
                            node = Some((row.try_get::<&str, _>(1)?.into(), row.try_get::<Time, _>(2)?));
                        }
                        None => {
                            let key =
                                Key { tenant: row.try_get(3)?, provider: row.try_get(4)?, event_id: row.try_get(5)? };
                            events.push((KeyDigest::of(&key), row.try_get(6)?));
                        }
                    }
                }
                let (bookmark, now) = node.ok_or(sqlx::Error::RowNotFound)?;
                let truncated = after.is_none() && events.len() >= ROWS_MAX;
                let floor = if truncated { events.iter().map(|(_, token)| *token).min() } else { None };
                Ok(Replayed { now, events, floor: floor.unwrap_or(FencingToken::NONE), bookmark: Some(bookmark) })
            })
        })
        .await
    }
}
