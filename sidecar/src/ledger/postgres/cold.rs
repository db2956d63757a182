//! The cold statements: everything that an event which completes at once never meets.

use std::{collections::HashMap, marker::PhantomData};

use sqlx::{
    PgConnection, Row as _,
    postgres::{PgBindIterExt as _, PgRow},
};

use super::{bind::Bind as _, hot::Pending, row, statement::Statement};
use crate::{
    event::{Attempt, Claim, Claimed, Digest, Event, Extend, FencingToken, Key, Lock, Mark, Resolution, Resolve, Time},
    ledger::{Delivery, DeliveryName},
};

/// A claim on an event that may be granted again or must be buried, as it was read.
pub(super) struct Candidate {
    pub(super) event: Event,
    pub(super) claim: Pending<Claim, Claimed>,
}

/// What a conditional statement did to the event of an item: nothing, or this.
pub(super) type Applied = Option<(Event, Time)>;

/// Where the event's columns begin in rows that have the item's place and the time in front.
const EVENT_COLUMN: usize = 2;

/// Rows of (place, now, event...), by place.
fn applied(rows: &[PgRow], count: usize) -> Result<Vec<Applied>, sqlx::Error> {
    let mut found: Vec<Applied> = (0..count).map(|_| None).collect();
    for row in rows {
        let place: i32 = row.try_get(0)?;
        if let Some(at_place) = usize::try_from(place).ok().and_then(|place| found.get_mut(place)) {
            *at_place = Some((row::event(row, EVENT_COLUMN)?, row.try_get(1)?));
        }
    }
    Ok(found)
}

/// Grants another attempt. Items sorted by key.
pub(super) struct GrantAgain;

impl Statement for GrantAgain {
    type Item = Candidate;
    type Output = Vec<Applied>;

    fn doubt(item: &mut Candidate) {
        item.claim.past.uncertain = true;
    }

    fn is_abandoned(item: &Candidate) -> bool {
        item.claim.reply.is_closed()
    }

    async fn run(
        &self,
        connection: &mut PgConnection,
        slot: i32,
        items: &[Candidate],
    ) -> Result<Vec<Applied>, sqlx::Error> {
        let claims = || items.iter().map(|item| &item.claim.request);
        let rows = sqlx::query(include_str!("grant_again.sql"))
            .bind_read(items.iter().map(|item| &item.event))
            .bind(claims().map(|claim| claim.claim_id.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.holder.as_str()).bind_iter())
            .bind(claims().map(|claim| claim.lock_duration.0).bind_iter())
            .bind_digests(claims().map(|claim| claim.fingerprint.as_ref()))
            .bind_digests(claims().map(|claim| claim.payload_digest.as_ref()))
            .bind_places(items.len())
            .bind(slot)
            .bind(items.iter().map(|item| item.event.create_time).bind_iter())
            .fetch_all(connection)
            .await?;
        applied(&rows, items.len())
    }
}

/// Makes events dead whose attempts are used up. Items sorted by key.
pub(super) struct Bury;

impl Statement for Bury {
    type Item = Candidate;
    type Output = Vec<Applied>;

    async fn run(
        &self,
        connection: &mut PgConnection,
        slot: i32,
        items: &[Candidate],
    ) -> Result<Vec<Applied>, sqlx::Error> {
        let rows = sqlx::query(include_str!("bury.sql"))
            .bind_read(items.iter().map(|item| &item.event))
            .bind(items.iter().map(|item| row::attempts_max(item.claim.request.attempts_max)).bind_iter())
            .bind_places(items.len())
            .bind(slot)
            .bind(items.iter().map(|item| item.event.create_time).bind_iter())
            .fetch_all(connection)
            .await?;
        applied(&rows, items.len())
    }
}

/// An event with what the pure rules need to know besides.
pub(super) struct Classified {
    pub(super) event: Event,
    pub(super) archived: Option<Attempt>,
    pub(super) resolution: Option<Resolution>,
    pub(super) now: Time,
}

/// A request that names an event and a token.
pub(super) trait Tokened: Send + Sync {
    /// The event.
    fn key(&self) -> &Key;
    /// The token, whose archived attempt is wanted.
    fn fencing_token(&self) -> FencingToken;
}

impl Tokened for Claim {
    fn key(&self) -> &Key {
        &self.key
    }
    fn fencing_token(&self) -> FencingToken {
        FencingToken::NONE
    }
}

impl Tokened for Mark {
    fn key(&self) -> &Key {
        &self.key
    }
    fn fencing_token(&self) -> FencingToken {
        self.fencing_token
    }
}

impl Tokened for Extend {
    fn key(&self) -> &Key {
        &self.key
    }
    fn fencing_token(&self) -> FencingToken {
        self.fencing_token
    }
}

impl Tokened for Resolve {
    fn key(&self) -> &Key {
        &self.key
    }
    fn fencing_token(&self) -> FencingToken {
        self.fencing_token.unwrap_or(FencingToken::NONE)
    }
}

/// Reads the events of requests that name a token.
pub(super) struct Classify<R, A>(PhantomData<fn(R, A)>);

impl<R, A> Default for Classify<R, A> {
    fn default() -> Self {
        Classify(PhantomData)
    }
}

impl<R: Tokened, A: Send> Statement for Classify<R, A> {
    type Item = Pending<R, A>;
    type Output = Vec<Option<Classified>>;

    async fn run(
        &self,
        connection: &mut PgConnection,
        _slot: i32,
        items: &[Pending<R, A>],
    ) -> Result<Vec<Option<Classified>>, sqlx::Error> {
        let requests = || items.iter().map(|item| &item.request);
        let rows = sqlx::query(include_str!("classify.sql"))
            .bind_keys(requests().map(Tokened::key))
            .bind(requests().map(Tokened::fencing_token).bind_iter())
            .bind_places(items.len())
            .fetch_all(connection)
            .await?;
        let mut found: Vec<Option<Classified>> = items.iter().map(|_| None).collect();
        for row in &rows {
            let place: i32 = row.try_get(0)?;
            if let Some(at_place) = usize::try_from(place).ok().and_then(|place| found.get_mut(place)) {
                *at_place = Some(Classified {
                    event: row::event(row, EVENT_COLUMN)?,
                    archived: row::archived(row)?,
                    resolution: row::resolution(row)?,
                    now: row.try_get(1)?,
                });
            }
        }
        Ok(found)
    }
}

/// Extends locks. Items sorted by key.
pub(super) struct ExtendLocks;

impl Statement for ExtendLocks {
    type Item = Pending<Extend, Lock>;
    type Output = Vec<Applied>;

    fn doubt(item: &mut Pending<Extend, Lock>) {
        item.past.uncertain = true;
    }

    async fn run(
        &self,
        connection: &mut PgConnection,
        _slot: i32,
        items: &[Pending<Extend, Lock>],
    ) -> Result<Vec<Applied>, sqlx::Error> {
        let requests = || items.iter().map(|item| &item.request);
        let rows = sqlx::query(include_str!("extend.sql"))
            .bind_keys(requests().map(|extend| &extend.key))
            .bind(requests().map(|extend| extend.fencing_token).bind_iter())
            .bind(requests().map(|extend| extend.claim_id.as_deref()).bind_iter())
            .bind(requests().map(|extend| extend.lock_duration.0).bind_iter())
            .bind_places(items.len())
            .fetch_all(connection)
            .await?;
        applied(&rows, items.len())
    }
}

/// A resolution that the event permits, as it was read.
pub(super) struct Decided {
    pub(super) event: Event,
    pub(super) resolve: Pending<Resolve, Event>,
}

/// Applies resolutions. Items sorted by key.
pub(super) struct ApplyResolutions;

impl Statement for ApplyResolutions {
    type Item = Decided;
    type Output = Vec<Applied>;

    fn doubt(item: &mut Decided) {
        item.resolve.past.uncertain = true;
    }

    async fn run(
        &self,
        connection: &mut PgConnection,
        slot: i32,
        items: &[Decided],
    ) -> Result<Vec<Applied>, sqlx::Error> {
        let requests = || items.iter().map(|item| &item.resolve.request);
        let rows = sqlx::query(include_str!("resolve.sql"))
            .bind_read(items.iter().map(|item| &item.event))
            .bind(requests().map(|resolve| resolve.to.state().as_str()).bind_iter())
            .bind(requests().map(|resolve| resolve.reason.as_str()).bind_iter())
            .bind(requests().map(|resolve| resolve.actor.as_str()).bind_iter())
            .bind_results(requests().map(|resolve| resolve.result.as_ref()))
            .bind_places(items.len())
            .bind(slot)
            .bind(items.iter().map(|item| item.event.create_time).bind_iter())
            .fetch_all(connection)
            .await?;
        applied(&rows, items.len())
    }
}

/// Records delivery ids and tells the digest that stands. Items sorted by name.
pub(super) struct RecordDeliveries;

impl Statement for RecordDeliveries {
    type Item = Delivery;
    type Output = HashMap<DeliveryName, Digest>;

    async fn run(
        &self,
        connection: &mut PgConnection,
        _slot: i32,
        items: &[Delivery],
    ) -> Result<Self::Output, sqlx::Error> {
        let rows = sqlx::query(include_str!("deliveries.sql"))
            .bind(items.iter().map(|delivery| delivery.name.tenant.as_str()).bind_iter())
            .bind(items.iter().map(|delivery| delivery.name.provider.as_str()).bind_iter())
            .bind(items.iter().map(|delivery| delivery.name.delivery_id.as_str()).bind_iter())
            .bind(items.iter().map(|delivery| delivery.payload_digest.as_slice()).bind_iter())
            .fetch_all(connection)
            .await?;
        let mut digests = HashMap::with_capacity(rows.len());
        for row in &rows {
            let name =
                DeliveryName { tenant: row.try_get(0)?, provider: row.try_get(1)?, delivery_id: row.try_get(2)? };
            digests.insert(name, row::standing_digest("payload_digest", row.try_get(3)?)?);
        }
        Ok(digests)
    }
}
