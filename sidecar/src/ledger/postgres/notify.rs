//! Tells the sidecars of one database what has changed, so that waiters in another process wake at once and what they cache is
//! dropped (L9). What gathers is sent in one go, after the commit and over another connection; while no other sidecar is there
//! to hear it, nothing is sent but what an operator decided. Losing a notification costs one interval of the waiters' net.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::postgres::PgListener;
use tokio::sync::{broadcast, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    connect::{READ_ONLY, Slots},
    failure,
    read::Reader,
};
use crate::{
    event::{FencingToken, KeyDigest},
    ledger::{Announcement, Heard, load::Load},
};

const CHANNEL: &str = "oncegate_events";
/// A payload has at most 8,000 bytes, an announcement about 44.
const BATCH_MAX: usize = 150;
const QUEUE_MAX: usize = 4_096;
/// What is heard and not yet taken up: room for all of it is there from the start. A subscriber that falls behind is told that
/// it missed something.
const HEARD_MAX: usize = 1_024;
/// After so long without a notification the listening connection is asked whether it is alive.
const QUIET_MAX: Duration = Duration::from_secs(10);
/// How long it may take to answer, then and when it begins to listen.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How long to wait before trying again what failed.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How often it is looked up whether other sidecars are there.
const PEERS_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Notifier {
    announcements: mpsc::Sender<Announcement>,
    heard: broadcast::Sender<Heard>,
    peers: Arc<AtomicBool>,
    closing: CancellationToken,
    listening: TaskTracker,
}

impl Notifier {
    /// Sends and asks over the reader's connections, and listens on one of its own to the same database. Whether other sidecars
    /// are there it also tells the `load`.
    pub(super) fn start(reader: Reader, load: Arc<Load>) -> Notifier {
        let (announcements, queue) = mpsc::channel(QUEUE_MAX);
        let (heard, _) = broadcast::channel(HEARD_MAX);
        let peers = Arc::new(AtomicBool::new(false));
        let closing = CancellationToken::new();
        // Names this process among the senders: what it announced itself it need not hear.
        let sender = uuid::Uuid::new_v4().simple().to_string();
        tokio::spawn(closing.clone().run_until_cancelled_owned(send(reader.clone(), queue, sender.clone())));
        tokio::spawn(closing.clone().run_until_cancelled_owned(count_peers(reader.clone(), peers.clone(), load)));
        let listening = TaskTracker::new();
        listening.spawn(listen(reader, heard.clone(), sender, closing.clone()));
        listening.close();
        Notifier { announcements, heard, peers, closing, listening }
    }

    pub(super) fn announce(&self, announcement: Announcement) {
        // What an operator decides is announced also where nobody else is known: a sidecar may just have started.
        if self.peers.load(Ordering::Relaxed) || announcement.resolved {
            // Full: the net will do.
            let _full = self.announcements.try_send(announcement);
        }
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Heard> {
        self.heard.subscribe()
    }

    /// Ends everything, and waits until the listening connection is released, which takes a moment at most.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        self.listening.wait().await;
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

async fn send(reader: Reader, mut queue: mpsc::Receiver<Announcement>, sender: String) {
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
        while let Err(error) = notify(&reader, encode(&sender, latest.values().copied())).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "a notification could not be sent");
            // Waiters have their net. A resolution is sent until that succeeds: others may still answer from their memory.
            latest.retain(|_, announcement| announcement.resolved);
            if latest.is_empty() {
                break;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }
}

async fn notify(reader: &Reader, payload: String) -> Result<(), crate::ledger::Error> {
    reader
        .run(move |connection| {
            Box::pin(async move {
                // What it tells of is durable already, so its own commit need not wait for the disk.
                sqlx::query("select set_config('synchronous_commit', 'off', true), pg_notify($1, $2)")
                    .bind(CHANNEL)
                    .bind(payload)
                    .execute(connection)
                    .await?;
                Ok(())
            })
        })
        .await
}

/// Looks up whether other sidecars are there, again and again.
async fn count_peers(reader: Reader, peers: Arc<AtomicBool>, load: Arc<Load>) {
    let mut interval = tokio::time::interval(PEERS_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let writers: Result<i64, _> = reader
            .run(|connection| {
                Box::pin(async move {
                    let writers = sqlx::query_scalar(include_str!("count_peers.sql"))
                        .bind(Slots::WRITERS.class())
                        .fetch_one(connection)
                        .await?;
                    Ok(writers)
                })
            })
            .await;
        let others = writers.ok().map(|writers| writers > 1);
        // When that is unknown, notifications cannot be sent either, and the database has nothing to spare for Cleanup.
        peers.store(others.unwrap_or(false), Ordering::Relaxed);
        load.share(others.unwrap_or(true));
    }
}

/// Each time with a new pool of one connection. A listener that is dropped gives its connection back: sqlx first tells the
/// server to stop notifying and then pings it, both without a time-out. When the server has vanished without a word that is for
/// as long as TCP still hopes, a quarter of an hour or more: meanwhile whoever shares the pool, the next listener too, would
/// lack its place.
async fn listen(reader: Reader, heard: broadcast::Sender<Heard>, sender: String, closing: CancellationToken) {
    while !closing.is_cancelled() {
        let own = reader.another();
        if let Some(Err(error)) = closing.run_until_cancelled(hear(&own, &heard, &sender)).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "notifications are not heard");
        }
        // A connection that is well is closed here. Whatever is not done in time ends by itself.
        own.close().await;
        closing.run_until_cancelled(tokio::time::sleep(RETRY_INTERVAL)).await;
    }
}

async fn hear(own: &Reader, heard: &broadcast::Sender<Heard>, sender: &str) -> Result<(), sqlx::Error> {
    // The pool bounds how long connecting takes.
    let mut listener = PgListener::connect_with(&own.pool()).await?;
    // A silent reconnection would be a gap that nobody hears of.
    listener.eager_reconnect(false);
    tokio::time::timeout(ANSWER_MAX, listener.listen(CHANNEL)).await.map_err(|_late| failure::timed_out())??;
    // What was sent before is lost. Nobody may be listening here.
    let _nobody = heard.send(Heard::Missed);
    loop {
        match tokio::time::timeout(QUIET_MAX, listener.try_recv()).await {
            Ok(Ok(Some(notification))) => {
                for announcement in decode(notification.payload(), sender) {
                    let _nobody = heard.send(Heard::Changed(announcement));
                }
            }
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_quiet) => {
                // A server that vanished says nothing either, nor does one that another has taken over from.
                let read_only = sqlx::query_scalar(READ_ONLY).fetch_one(&mut listener);
                let read_only: bool =
                    tokio::time::timeout(ANSWER_MAX, read_only).await.map_err(|_late| failure::timed_out())??;
                if read_only {
                    return Ok(());
                }
            }
        }
    }
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
        Some(Announcement {
            digest: KeyDigest::decode(digest)?,
            fencing_token: FencingToken(token.parse().ok()?),
            resolved,
        })
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
                fencing_token: FencingToken(i64::MAX),
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
