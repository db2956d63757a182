//! Statements over many items, and what happens when one fails: items are run again after a broken connection and halved when
//! something stands in the way, until each item has its answer (L3).

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use oncegate_runtime::throttle::Throttle;
use sqlx::PgConnection;
use tokio::sync::watch;
use tracing::{Instrument as _, Span};

use super::{
    connect::{self, LOCK_TIMEOUT, Node, READ_ONLY, STATEMENT_TIME_MAX, Slots},
    count_rows::CountRows,
    failure::{self, Failure},
    target::Target,
};
use crate::{
    ledger::metrics::LedgerMetrics,
    ledger::{Error, Standing, damage::Damage},
};

/// A statement that takes many items at once.
pub(super) trait Statement: Sync {
    /// What one item is.
    type Item: Send + Sync;
    /// What the statement gives back.
    type Output: Send;
    /// Whether it may run again when nobody knows if it took effect.
    const REPEATABLE: bool = true;
    /// Whether others may lock its items one by one. If not, waiting for one item means waiting for all, so the batch is not
    /// split.
    const PARTS: bool = true;

    /// Records on an item that the statement may have done what it asks for, without anybody knowing. A statement that only
    /// reads has nothing to record.
    fn doubt(_item: &mut Self::Item) {}

    /// Whether nobody waits for an item any more, and nothing is lost by leaving it out.
    fn is_abandoned(_item: &Self::Item) -> bool {
        false
    }

    /// Runs it once over the items.
    fn run(
        &self,
        connection: &mut PgConnection,
        slot: i32,
        items: &[Self::Item],
    ) -> impl Future<Output = Result<Self::Output, sqlx::Error>> + Send;
}

/// Some items and their result. Items that nobody waits for any more are in no part.
pub(super) type Part<S> = (Vec<<S as Statement>::Item>, Result<<S as Statement>::Output, Error>);

/// Items that wait for their turn.
struct Waiting<I> {
    items: Vec<I>,
    tries: u32,
    /// They were tried on a connection that broke, or with others whose answer could not be read, so they may have happened.
    uncertain: bool,
}

/// One run of a statement over items, and what went before it.
#[derive(Clone, Copy)]
struct Attempt {
    items: usize,
    /// The runs before this one.
    tries: u32,
    /// Time since the first run of the batch that the items belong to.
    spent: Duration,
}

/// What becomes of the items of a run that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// They are run again.
    Again,
    /// Each half is run by itself.
    Halved,
    /// Their callers are told to come back when the ledger may be well again.
    Unavailable,
    /// Their callers are told to come back when whoever holds a row may have let go of it.
    Contended,
    /// Their callers are told that nobody knows whether it happened.
    Unknown,
    /// Their callers are told that their event has a value that this version does not know.
    Unreadable,
    /// The callers of the one item are told that it cannot be read, unless nothing can.
    Damaged,
    /// Their callers are told of a defect.
    Defect,
}

impl Attempt {
    /// What becomes of the items of a statement `S`.
    fn failed<S: Statement>(self, failure: Failure) -> Next {
        let Attempt { items, tries, spent } = self;
        let may_try_again = tries + 1 < TRIES_MAX;
        match failure {
            Failure::Broken if S::REPEATABLE && may_try_again => Next::Again,
            Failure::Broken => Next::Unknown,
            Failure::Unreadable if !S::REPEATABLE => Next::Unknown,
            Failure::Refusing => Next::Unavailable,
            Failure::TooSlow | Failure::Contended | Failure::Damaged if spent >= HALVING_TIME_MAX => Next::Unavailable,
            Failure::Contended if !S::PARTS => Next::Contended,
            Failure::Contended | Failure::BadItem | Failure::Unreadable | Failure::TooSlow if items > 1 => Next::Halved,
            Failure::Damaged if items > 1 => Next::Halved,
            Failure::Contended if may_try_again => Next::Again,
            Failure::Contended => Next::Contended,
            Failure::TooSlow => Next::Unavailable,
            Failure::Unreadable => Next::Unreadable,
            Failure::Damaged => Next::Damaged,
            Failure::BadItem | Failure::Defect => Next::Defect,
        }
    }
}

/// How often a single item may find its row locked, or the connection broken, before its caller is told.
const TRIES_MAX: u32 = 3;
/// How long a batch that is slow, or meets locks or damage, keeps being split. After that its callers have been answered anyway,
/// and all others wait behind it: at one part a second, a batch of 512 would take a quarter of an hour.
const HALVING_TIME_MAX: Duration = Duration::from_secs(2);
/// How long the rest of a batch waits for a row after one has kept it waiting for the full time.
const HURRIED: &str = "25ms";
/// After a failed attempt to connect, calls are refused at once for this long instead of each trying anew.
const CONNECT_PAUSE: Duration = Duration::from_millis(200);

/// A connection that writes: open, or still to be made again.
pub(super) struct Session {
    target: Target,
    /// The session's name in `pg_stat_activity`.
    name: &'static str,
    slots: Slots,
    open: Option<Open>,
    failed_at: Option<Instant>,
    damage: Damage,
    failures: Throttle,
    given_up: Throttle,
    /// None: nobody needs to know the state of this connection.
    told: Option<Told>,
    /// The rows that it adds counts to.
    counts: CountRows,
    pub(super) metrics: Arc<LedgerMetrics>,
}

/// A connection, as long as it is good.
struct Open {
    connection: PgConnection,
    /// It waits for locked rows only as long as [`HURRIED`].
    is_hurried: bool,
}

/// Who is told about the state of the connection.
struct Told {
    node: watch::Sender<Option<Node>>,
    standing: watch::Sender<Option<Standing>>,
    /// Connections made so far.
    generation: u64,
}

impl Drop for Told {
    /// However the writer ends: once gone it decides nothing, and nobody must believe that it is still there.
    fn drop(&mut self) {
        self.node.send_replace(None);
        self.standing.send_replace(None);
    }
}

impl Session {
    /// The name of the writer's session in `pg_stat_activity`.
    pub(super) const WRITER: &str = "oncegate-writer";

    /// The session of the writer, over a connection that was just made, plus the channel that tells others its standing; None
    /// while it is down.
    pub(super) fn new(
        target: Target,
        (connection, node, slot): (PgConnection, Node, i32),
        counts: CountRows,
        metrics: Arc<LedgerMetrics>,
    ) -> (Session, watch::Receiver<Option<Node>>, watch::Receiver<Option<Standing>>) {
        let (node_sender, node_receiver) = watch::channel(None);
        let (standing_sender, standing_receiver) = watch::channel(None);
        let told = Told { node: node_sender, standing: standing_sender, generation: 0 };
        let mut session = Session {
            told: Some(told),
            counts,
            ..Session::closed_yet(target, Session::WRITER, Slots::WRITERS, metrics)
        };
        session.opened(connection, node, slot);
        (session, node_receiver, standing_receiver)
    }

    /// The session of the flusher: it connects when there is something to write, and informs nobody.
    pub(super) fn counts(target: Target, metrics: Arc<LedgerMetrics>) -> Session {
        Session::closed_yet(target, "oncegate-counts", Slots::COUNTS, metrics)
    }

    fn closed_yet(target: Target, name: &'static str, slots: Slots, metrics: Arc<LedgerMetrics>) -> Session {
        let (failures, given_up) = (Throttle::default(), Throttle::default());
        Session {
            target,
            name,
            slots,
            open: None,
            failed_at: None,
            damage: Damage::default(),
            failures,
            given_up,
            told: None,
            counts: CountRows::default(),
            metrics,
        }
    }

    fn opened(&mut self, connection: PgConnection, node: Node, slot: i32) {
        if let Some(told) = &mut self.told {
            told.generation += 1;
            node.durability.warn();
            self.metrics.connected();
            told.standing.send_replace(Some(Standing {
                identity: node.identity.as_str().into(),
                generation: told.generation,
                cache_key: node.cache_key.0.clone(),
            }));
            told.node.send_replace(Some(node));
        }
        self.failed_at = None;
        self.counts.begin(slot);
        self.open = Some(Open { connection, is_hurried: false });
    }

    /// Runs a statement over items. Every item that somebody waits for comes back in exactly one part, in no particular order.
    pub(super) async fn run<S: Statement>(&mut self, statement: &S, items: Vec<S::Item>) -> Vec<Part<S>> {
        let mut parts = Vec::new();
        let begun = Instant::now();
        // A stack: the first half goes first.
        let mut waiting = vec![Waiting { items, tries: 0, uncertain: false }];
        let mut is_first = true;
        // Items that cannot be read, each with the error, and whether anything else could be.
        let mut damaged: Vec<(Waiting<S::Item>, sqlx::Error)> = Vec::new();
        let mut done = false;
        while let Some(Waiting { mut items, tries, uncertain }) = waiting.pop() {
            // Retries take time, and a lock granted to a caller who has left blocks its event until it expires.
            if !std::mem::take(&mut is_first) {
                items.retain(|item| !S::is_abandoned(item));
            }
            if items.is_empty() {
                continue;
            }
            let failed = |error: Error| told(uncertain, error);
            let (connection, slot) = match self.connection().await {
                Ok(open) => open,
                Err(error) => {
                    parts.push((items, Err(failed(error))));
                    continue;
                }
            };
            let span = span::<S>(items.len());
            let run = statement.run(connection, slot, &items).instrument(span);
            let answer = tokio::time::timeout(STATEMENT_TIME_MAX, run).await;
            let error = match answer {
                Ok(Ok(output)) => {
                    done = true;
                    parts.push((items, Ok(output)));
                    continue;
                }
                Ok(Err(error)) => error,
                Err(_elapsed) => failure::timed_out(),
            };
            let failure = failure::classify(&error);
            self.metrics.failed(failure.into());
            self.report(failure, &error, items.len());
            if failure.ends_connection() {
                self.discard();
            }
            let attempt = Attempt { items: items.len(), tries, spent: begun.elapsed() };
            let next = attempt.failed::<S>(failure);
            // Somebody holds a row. The others of the batch must not wait the full time for it again and again.
            if failure == Failure::Contended && matches!(next, Next::Again | Next::Halved) {
                self.hurry(true).await;
            }
            if failure.may_have_happened() {
                items.iter_mut().for_each(S::doubt);
            }
            let uncertain = uncertain || failure.may_have_happened();
            match next {
                Next::Again => {
                    waiting.push(Waiting { items, tries: tries + 1, uncertain });
                }
                Next::Halved => {
                    let second = items.split_off(items.len() / 2);
                    waiting.push(Waiting { items: second, tries, uncertain });
                    waiting.push(Waiting { items, tries, uncertain });
                }
                Next::Unavailable => parts.push((items, Err(failed(Error::unavailable())))),
                Next::Contended => parts.push((items, Err(failed(Error::contended())))),
                Next::Unknown => parts.push((items, Err(Error::OutcomeUnknown))),
                // The reason itself is worth more than that it may have happened: the call may be repeated either way, and is
                // answered like this until a version that knows the value runs.
                Next::Unreadable => parts.push((items, Err(Error::unreadable()))),
                Next::Damaged => {
                    damaged.push((Waiting { items, tries, uncertain }, error));
                    if Damage::ends_batch(done, damaged.len()) {
                        let rest = waiting.drain(..);
                        parts.extend(rest.map(|rest| (rest.items, Err(told(rest.uncertain, Error::unavailable())))));
                    }
                }
                Next::Defect => parts.push((items, Err(failed(refused(&error))))),
            }
        }
        let nothing_is_read = self.reads_nothing(done, damaged.len());
        for (Waiting { items, uncertain, .. }, error) in damaged {
            let error = if nothing_is_read { Error::unavailable() } else { unread(&error) };
            parts.push((items, Err(told(uncertain, error))));
        }
        self.hurry(false).await;
        parts
    }

    /// As [`Damage::reads_nothing`]. The connection is then given up, as of a server that refuses.
    fn reads_nothing(&mut self, done: bool, damaged: usize) -> bool {
        let nothing = self.damage.reads_nothing(done, damaged);
        if nothing {
            self.discard();
        }
        nothing
    }

    /// Logs why a statement failed: callers only hear that the ledger is unavailable. Throttled, since in an outage every batch
    /// fails.
    fn report(&self, failure: Failure, error: &sqlx::Error, items: usize) {
        let Some(unreported) = self.failures.pass() else { return };
        let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
        tracing::warn!(
            ?failure,
            sqlstate = code.as_deref(),
            error = error as &dyn std::error::Error,
            items,
            session = self.name,
            unreported,
            "a statement of the ledger failed"
        );
    }

    /// Sets how long statements wait for a locked row, unless already set. A connection on which this fails is given up.
    async fn hurry(&mut self, hurried: bool) {
        let Some(open) = self.open.as_mut().filter(|open| open.is_hurried != hurried) else { return };
        let wait = if hurried { HURRIED } else { LOCK_TIMEOUT };
        let set = sqlx::query("select set_config('lock_timeout', $1, false)").bind(wait).execute(&mut open.connection);
        match tokio::time::timeout(STATEMENT_TIME_MAX, set).await {
            Ok(Ok(_)) => open.is_hurried = hurried,
            Ok(Err(_)) | Err(_) => self.discard(),
        }
    }

    /// Asks whether the connection is alive and may write, and gives it up if not. Nothing else would notice while there are no
    /// calls, or only duplicates, which are only read. Does not connect.
    pub(super) async fn ask(&mut self) {
        let Some(open) = &mut self.open else { return };
        let ask = sqlx::query_scalar(READ_ONLY);
        match tokio::time::timeout(STATEMENT_TIME_MAX, ask.fetch_one(&mut open.connection)).await {
            Ok(Ok(false)) => {}
            Ok(Ok(true)) => {
                tracing::warn!(session = self.name, "the database refuses writes by now");
                self.discard();
            }
            Ok(Err(_)) | Err(_) => self.discard(),
        }
    }

    /// The connection; connects if there is none, no more often than the pause permits.
    pub(super) async fn connection(&mut self) -> Result<(&mut PgConnection, i32), Error> {
        if self.open.is_none() {
            if self.failed_at.is_some_and(|failed_at| failed_at.elapsed() < CONNECT_PAUSE) {
                return Err(Error::unavailable());
            }
            match connect::writing(&self.target.options(), self.name, self.slots).await {
                Ok((connection, node, slot)) => {
                    let session = self.name;
                    tracing::info!(identity = node.identity, session, slot, "the ledger is connected");
                    self.opened(connection, node, slot);
                }
                Err(error) => {
                    let session = self.name;
                    tracing::warn!(error = &error as &dyn std::error::Error, session, "the ledger cannot be reached");
                    if self.told.is_some() {
                        self.metrics.not_connected();
                    }
                    self.failed_at = Some(Instant::now());
                    return Err(Error::unavailable());
                }
            }
        }
        match &mut self.open {
            Some(open) => Ok((&mut open.connection, self.counts.number())),
            None => Err(Error::unavailable()),
        }
    }

    /// Gives the connection up. Its socket is closed, not returned to anybody: what answers are still outstanding on it is
    /// unknown.
    fn discard(&mut self) {
        if self.open.take().is_some() {
            if let Some(unreported) = self.given_up.pass() {
                tracing::warn!(session = self.name, unreported, "the ledger's connection is given up");
            }
            self.closed();
        }
    }

    /// Closes the connection in good order.
    pub(super) async fn close(&mut self) {
        if let Some(open) = self.open.take() {
            drop(tokio::time::timeout(Duration::from_millis(500), sqlx::Connection::close(open.connection)).await);
        }
        self.closed();
    }

    fn closed(&self) {
        if let Some(told) = &self.told {
            // Caches stop answering when the connection ends (C6).
            told.standing.send_replace(None);
            told.node.send_replace(None);
        }
    }
}

/// What the callers of items are told: some may have happened when they were tried before, whatever the result is now.
fn told(uncertain: bool, error: Error) -> Error {
    if uncertain { Error::OutcomeUnknown } else { error }
}

/// What a caller is told about an item that the database cannot read. The log has the rest.
fn unread(error: &sqlx::Error) -> Error {
    tracing::error!(error = error as &dyn std::error::Error, "the database cannot read what it keeps of an event");
    internal(error)
}

/// What a caller is told about a statement that the server should not have refused. The log has the rest.
fn refused(error: &sqlx::Error) -> Error {
    tracing::error!(
        error = error as &dyn std::error::Error,
        "the ledger refused a statement that it should have taken"
    );
    internal(error)
}

fn internal(error: &sqlx::Error) -> Error {
    Error::Internal(match error.as_database_error().and_then(sqlx::error::DatabaseError::code) {
        Some(code) => format!("sqlstate {code}"),
        None => "the answer could not be read".into(),
    })
}

/// The span of a statement within that of its batch, if the latter is recorded. It is named after the type.
fn span<S>(items: usize) -> Span {
    if Span::current().is_none() {
        return Span::none();
    }
    let name = std::any::type_name::<S>();
    let name = name.rsplit("::").next().unwrap_or(name);
    tracing::info_span!(
        "ledger_statement",
        otel.name = name,
        otel.kind = "client",
        db.system.name = "postgresql",
        db.operation.batch.size = items,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A statement whose items are run in parts or not, and run again or not.
    struct Of<const REPEATABLE: bool, const PARTS: bool>;

    impl<const REPEATABLE: bool, const PARTS: bool> Statement for Of<REPEATABLE, PARTS> {
        type Item = ();
        type Output = ();
        const REPEATABLE: bool = REPEATABLE;
        const PARTS: bool = PARTS;

        async fn run(&self, _: &mut PgConnection, _: i32, _: &[()]) -> Result<(), sqlx::Error> {
            Ok(())
        }
    }

    #[test]
    fn what_becomes_of_items_depends_on_the_failure_their_number_and_what_went_before() {
        type Common = Of<true, true>;
        const AT_ONCE: Duration = Duration::ZERO;
        let failed = |items, tries, spent, failure| Attempt { items, tries, spent }.failed::<Common>(failure);
        for (items, tries, spent, failure, next) in [
            (64, 0, AT_ONCE, Failure::Broken, Next::Again),
            (64, 1, AT_ONCE, Failure::Broken, Next::Again),
            (64, 2, AT_ONCE, Failure::Broken, Next::Unknown),
            (64, 0, AT_ONCE, Failure::Refusing, Next::Unavailable),
            (64, 2, AT_ONCE, Failure::Contended, Next::Halved),
            (1, 0, AT_ONCE, Failure::Contended, Next::Again),
            (1, 2, AT_ONCE, Failure::Contended, Next::Contended),
            (64, 0, AT_ONCE, Failure::BadItem, Next::Halved),
            (1, 0, AT_ONCE, Failure::BadItem, Next::Defect),
            (2, 0, AT_ONCE, Failure::TooSlow, Next::Halved),
            (1, 0, AT_ONCE, Failure::TooSlow, Next::Unavailable),
            (64, 0, HALVING_TIME_MAX, Failure::TooSlow, Next::Unavailable),
            (64, 0, HALVING_TIME_MAX, Failure::Contended, Next::Unavailable),
            (64, 0, HALVING_TIME_MAX, Failure::BadItem, Next::Halved),
            (64, 0, AT_ONCE, Failure::Unreadable, Next::Halved),
            (64, 2, HALVING_TIME_MAX, Failure::Unreadable, Next::Halved),
            (2, 0, AT_ONCE, Failure::Unreadable, Next::Halved),
            (1, 0, AT_ONCE, Failure::Unreadable, Next::Unreadable),
            (64, 0, AT_ONCE, Failure::Damaged, Next::Halved),
            (2, 2, AT_ONCE, Failure::Damaged, Next::Halved),
            (1, 0, AT_ONCE, Failure::Damaged, Next::Damaged),
            (64, 0, HALVING_TIME_MAX, Failure::Damaged, Next::Unavailable),
            (64, 0, AT_ONCE, Failure::Defect, Next::Defect),
        ] {
            assert_eq!(
                failed(items, tries, spent, failure),
                next,
                "{items} items, {tries} tries, {spent:?}, {failure:?}"
            );
        }
    }

    #[test]
    fn what_may_not_run_twice_is_not_tried_again_when_nobody_knows_whether_it_happened() {
        let attempt = Attempt { items: 1, tries: 0, spent: Duration::ZERO };
        assert_eq!(attempt.failed::<Of<false, true>>(Failure::Broken), Next::Unknown);
        assert_eq!(attempt.failed::<Of<false, true>>(Failure::Unreadable), Next::Unknown);
        let many = Attempt { items: 64, ..attempt };
        assert_eq!(many.failed::<Of<false, true>>(Failure::Unreadable), Next::Unknown);
        assert_eq!(attempt.failed::<Of<false, true>>(Failure::Contended), Next::Again);
    }

    #[test]
    fn what_waits_as_one_is_not_tried_in_parts() {
        let attempt = Attempt { items: 64, tries: 0, spent: Duration::ZERO };
        assert_eq!(attempt.failed::<Of<true, false>>(Failure::Contended), Next::Contended);
    }
}
