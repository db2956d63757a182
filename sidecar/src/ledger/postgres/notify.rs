//! Tells the sidecars of one database what has changed, so that waiters in another process wake at once and what they
//! cache is dropped (L9). Sent after the commit, from another connection, what gathers in one go; nothing is sent while no
//! other sidecar is there to hear it. Losing a notification costs one interval of the waiters' net.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{PgPool, postgres::PgListener};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use super::connect::SLOT_LOCK_CLASS;
use crate::{cache::KeyDigest, ledger::Announcement};

const CHANNEL: &str = "oncegate_events";
/// A payload has at most 8,000 bytes, an announcement about 44.
const BATCH_MAX: usize = 150;
const QUEUE_MAX: usize = 4_096;
/// How often it is looked up whether other sidecars are there.
const PEERS_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Notifier {
    announcements: mpsc::Sender<Announcement>,
    heard: broadcast::Sender<Announcement>,
    peers: Arc<AtomicBool>,
    closing: CancellationToken,
}

impl Notifier {
    pub(super) fn start(pool: PgPool) -> Notifier {
        let (announcements, queue) = mpsc::channel(QUEUE_MAX);
        let (heard, _) = broadcast::channel(QUEUE_MAX);
        let peers = Arc::new(AtomicBool::new(false));
        let closing = CancellationToken::new();
        // Names this process among the senders: what it announced itself it need not hear.
        let sender = uuid::Uuid::new_v4().simple().to_string();
        tokio::spawn(closing.clone().run_until_cancelled_owned(send(pool.clone(), queue, sender.clone())));
        tokio::spawn(closing.clone().run_until_cancelled_owned(count_peers(pool.clone(), peers.clone())));
        tokio::spawn(closing.clone().run_until_cancelled_owned(listen(pool, heard.clone(), sender)));
        Notifier { announcements, heard, peers, closing }
    }

    pub(super) fn announce(&self, announcement: Announcement) {
        // What an operator decides is announced in any case: a sidecar may just have started.
        if self.peers.load(Ordering::Relaxed) || announcement.resolved {
            // Full: the net will do.
            let _full = self.announcements.try_send(announcement);
        }
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Announcement> {
        self.heard.subscribe()
    }

    pub(super) fn close(&self) {
        self.closing.cancel();
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

async fn send(pool: PgPool, mut queue: mpsc::Receiver<Announcement>, sender: String) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    while queue.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let mut latest: HashMap<KeyDigest, Announcement> = HashMap::with_capacity(batch.len());
        for announcement in batch.drain(..) {
            let resolved = latest.get(&announcement.digest).is_some_and(|earlier| earlier.resolved);
            latest.insert(
                announcement.digest,
                Announcement { resolved: resolved || announcement.resolved, ..announcement },
            );
        }
        let payload = encode(&sender, latest.into_values());
        let sent = sqlx::query("select pg_notify($1, $2)").bind(CHANNEL).bind(payload).execute(&pool).await;
        if let Err(error) = sent {
            tracing::debug!(error = &error as &dyn std::error::Error, "a notification could not be sent");
        }
    }
}

/// Each writer holds a slot as an advisory lock.
async fn count_peers(pool: PgPool, peers: Arc<AtomicBool>) {
    let mut interval = tokio::time::interval(PEERS_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let writers: Result<i64, _> = sqlx::query_scalar(
            "select count(*) from pg_locks
            where locktype = 'advisory' and granted and classid = $1::integer::oid
                and database = (select oid from pg_database where datname = current_database())",
        )
        .bind(SLOT_LOCK_CLASS)
        .fetch_one(&pool)
        .await;
        // When it cannot be told, notifications cannot be sent either.
        peers.store(writers.is_ok_and(|writers| writers > 1), Ordering::Relaxed);
    }
}

async fn listen(pool: PgPool, heard: broadcast::Sender<Announcement>, sender: String) {
    loop {
        match hear(&pool, &heard, &sender).await {
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "notifications are not heard");
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn hear(pool: &PgPool, heard: &broadcast::Sender<Announcement>, sender: &str) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    // None: the connection was lost, and what was sent meanwhile is too. The net covers it.
    while let Some(notification) = listener.try_recv().await? {
        for announcement in decode(notification.payload(), sender) {
            // Nobody may be listening.
            drop(heard.send(announcement));
        }
    }
    Ok(())
}

/// `<sender> <digest>[!]<token> ...`, the mark for a resolution.
fn encode(sender: &str, announcements: impl Iterator<Item = Announcement>) -> String {
    let mut payload = sender.to_owned();
    for announcement in announcements {
        payload.push(' ');
        payload.push_str(&announcement.digest.encode());
        payload.push(if announcement.resolved { '!' } else { ':' });
        payload.push_str(&announcement.fencing_token.to_string());
    }
    payload
}

/// What does not parse is passed over: it was sent by another version, or by hand.
fn decode<'a>(payload: &'a str, own: &str) -> impl Iterator<Item = Announcement> + use<'a> {
    let mut words = payload.split(' ');
    let foreign = words.next().is_some_and(|sender| sender != own);
    words.filter(move |_| foreign).filter_map(|word| {
        let (digest, resolved, token) = match word.split_once('!') {
            Some((digest, token)) => (digest, true, token),
            None => {
                let (digest, token) = word.split_once(':')?;
                (digest, false, token)
            }
        };
        Some(Announcement { digest: KeyDigest::decode(digest)?, fencing_token: token.parse().ok()?, resolved })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Key;

    #[test]
    fn announcements_come_back_except_ones_own() {
        let announcements: Vec<Announcement> = (0..BATCH_MAX)
            .map(|number| Announcement {
                digest: KeyDigest::of(&Key {
                    tenant: "default".into(),
                    provider: "stripe".into(),
                    event_id: number.to_string(),
                }),
                fencing_token: i64::MAX,
                resolved: number % 2 == 0,
            })
            .collect();
        let payload = encode(&uuid::Uuid::nil().simple().to_string(), announcements.iter().copied());
        assert!(payload.len() < 8_000, "{}", payload.len());
        assert_eq!(decode(&payload, "somebody else").collect::<Vec<_>>(), announcements);
        assert_eq!(decode(&payload, &uuid::Uuid::nil().simple().to_string()).count(), 0);
        assert_eq!(decode("x junk : !5 a:b", "me").count(), 0);
    }
}
