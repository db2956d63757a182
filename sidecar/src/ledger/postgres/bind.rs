//! Parameters that several statements have: of a single item one by one, of a batch as arrays with an element for each item.

use sqlx::{
    Postgres,
    postgres::{PgArguments, PgBindIterExt as _},
};

use crate::event::{Digest, Event, Key, StoredResult};

pub(super) type Query<'q> = sqlx::query::Query<'q, Postgres, PgArguments>;

pub(super) trait Bind: Sized {
    /// Tenant, provider and event id.
    fn bind_key(self, key: &Key) -> Self;

    /// The same of a batch.
    fn bind_keys<'t>(self, keys: impl Iterator<Item = &'t Key> + Clone) -> Self;

    /// Code, body and content type.
    fn bind_result(self, result: Option<&StoredResult>) -> Self;

    /// The same of a batch.
    fn bind_results<'t>(self, results: impl Iterator<Item = Option<&'t StoredResult>> + Clone) -> Self;

    /// Digests of a batch, or fingerprints.
    fn bind_digests<'t>(self, digests: impl Iterator<Item = Option<&'t Digest>>) -> Self;

    /// Events of a batch as they were read: row, state and token, for a statement to change them only if they are still so.
    fn bind_read<'t>(self, events: impl Iterator<Item = &'t Event> + Clone) -> Self;

    /// The places of so many items in their batch, which the statement's rows name.
    fn bind_places(self, count: usize) -> Self;
}

impl Bind for Query<'_> {
    fn bind_key(self, key: &Key) -> Self {
        self.bind(key.tenant.as_str()).bind(key.provider.as_str()).bind(key.event_id.as_str())
    }

    fn bind_keys<'t>(self, keys: impl Iterator<Item = &'t Key> + Clone) -> Self {
        self.bind(keys.clone().map(|key| key.tenant.as_str()).bind_iter())
            .bind(keys.clone().map(|key| key.provider.as_str()).bind_iter())
            .bind(keys.map(|key| key.event_id.as_str()).bind_iter())
    }

    fn bind_result(self, result: Option<&StoredResult>) -> Self {
        self.bind(result.map(|result| result.code))
            .bind(result.map(|result| result.body.as_ref()))
            .bind(result.map(|result| result.content_type.as_str()))
    }

    fn bind_results<'t>(self, results: impl Iterator<Item = Option<&'t StoredResult>> + Clone) -> Self {
        self.bind(results.clone().map(|result| result.map(|result| result.code)).bind_iter())
            .bind(results.clone().map(|result| result.map(|result| result.body.as_ref())).bind_iter())
            .bind(results.map(|result| result.map(|result| result.content_type.as_str())).bind_iter())
    }

    fn bind_digests<'t>(self, digests: impl Iterator<Item = Option<&'t Digest>>) -> Self {
        self.bind(digests.map(|digest| digest.map(<[u8; 32]>::as_slice)).bind_iter())
    }

    fn bind_read<'t>(self, events: impl Iterator<Item = &'t Event> + Clone) -> Self {
        self.bind(events.clone().map(|event| event.row).bind_iter())
            .bind(events.clone().map(|event| event.state.as_str()).bind_iter())
            .bind(events.map(|event| event.fencing_token).bind_iter())
    }

    fn bind_places(self, count: usize) -> Self {
        self.bind((0_i32..).take(count).bind_iter())
    }
}
