//! Large tables: what is rare is found without reading what lies between, and Cleanups get along with each other.

use std::sync::Arc;

use oncegate_e2e::{
    grow::{Growth, fill},
    postgres::{Cluster, Options},
};
use oncegate_sidecar::{
    event::State,
    ledger::{
        Ledger,
        filter::{CleanupProgress, CleanupScope, HistoryFilter, StatsFilter},
        postgres::{self, PostgresLedger, PostgresSettings},
    },
};
use sqlx::Connection as _;

const ROWS: i64 = 60_000;

struct Grown {
    database: oncegate_e2e::postgres::Database,
    // Its own: what is read is counted for a whole table.
    _cluster: Cluster,
}

async fn grown() -> Grown {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let mut connection = database.connect().await.unwrap();
    fill(&mut connection, Growth { rows: ROWS, days: 10, rare: 20_000 }).await.unwrap();
    sqlx::raw_sql("vacuum analyze payment_webhook_events").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    Grown { database, _cluster: cluster }
}

impl Grown {
    /// Rows of the events' table that were read so far. A session reports what it read when it ends: nobody else is there.
    async fn read(&self) -> i64 {
        let mut connection = self.database.connect().await.unwrap();
        oncegate_e2e::eventually("all sessions have ended", async || {
            let others: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity
                where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()",
            )
            .fetch_one(&mut connection)
            .await
            .unwrap();
            (others == 0).then_some(())
        })
        .await;
        sqlx::query_scalar(
            "select (coalesce(idx_tup_fetch, 0) + seq_tup_read)::bigint from pg_stat_user_tables
            where relname = 'payment_webhook_events'",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap()
    }

    /// How many rows of the events' table a ledger reads for a query.
    async fn reads<T>(&self, query: impl AsyncFnOnce(&PostgresLedger) -> T) -> (T, i64) {
        let before = self.read().await;
        let ledger = self.ledger().await;
        let answer = query(&ledger).await;
        ledger.close().await;
        drop(ledger);
        (answer, self.read().await - before)
    }

    async fn ledger(&self) -> PostgresLedger {
        PostgresLedger::connect(self.database.url(), &PostgresSettings::default()).await.unwrap()
    }
}

fn listing() -> HistoryFilter {
    HistoryFilter {
        tenant: None,
        provider: None,
        event_type: None,
        states: Vec::new(),
        start_time: None,
        end_time: None,
        page_size: 50,
        after: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_rare_is_found_without_reading_what_lies_between() {
    let grown = grown().await;
    let report = postgres::check(grown.database.url()).await.unwrap();
    assert_eq!((report.differences.as_slice(), report.events), (&[][..], ROWS), "the filled table agrees with itself");
    // 240 hours, 250 events in each.
    let hour = ROWS / 240;
    for (filter, found, hours) in [
        (HistoryFilter { states: vec![State::Dead], ..listing() }, 2, 2),
        (HistoryFilter { states: vec![State::Dead, State::Failed], ..listing() }, 5, 5),
        (HistoryFilter { states: vec![State::Pending], ..listing() }, 0, 0),
        (HistoryFilter { tenant: Some("nobody".into()), ..listing() }, 0, 0),
        (listing(), 50, 1),
    ] {
        let (page, read) = grown.reads(async |ledger| ledger.history(filter.clone()).await.unwrap()).await;
        assert_eq!(page.events.len(), found, "{filter:?}");
        // Twice: the boundary is looked for after it.
        assert!(read <= 2 * hours * (hour + 2) + 120, "{read} rows were read for {filter:?}");
    }
    let everything = StatsFilter { tenant: None, provider: None, start_time: None, end_time: None, bucket: None };
    let (report, read) = grown.reads(async |ledger| ledger.stats(everything).await.unwrap()).await;
    let stuck: i64 = report.counts.values().map(|counts| counts.stuck).sum();
    assert!(stuck > 0 && read <= 4 * stuck + 4, "{read} rows were read to count {stuck} that are stuck");
}

/// Dry runs say what real ones do; two at once delete each event once; one that ends half-way leaves the rest for the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cleanups_at_once_and_cut_off_delete_each_event_once() {
    let grown = grown().await;
    let ledger = Arc::new(grown.ledger().await);
    let now = ledger.now().await.unwrap();
    let scope = CleanupScope {
        tenant: None,
        provider: None,
        before: oncegate_sidecar::event::Time(now.0 - 5 * 86_400_000_000),
        states: vec![State::Completed],
        dry_run: false,
        batch_size: 500,
    };
    let deleted = |progress: &CleanupProgress| -> i64 { progress.providers.values().map(|of| of.deleted).sum() };
    let dry_scope = CleanupScope { dry_run: true, ..scope.clone() };
    let mut dry = CleanupProgress::default();
    while !dry.done {
        ledger.cleanup_step(&dry_scope, &mut dry).await.unwrap();
    }
    let matched: i64 = dry.providers.values().map(|of| of.matched).sum();
    assert!(matched > ROWS / 4, "{matched}");
    // One is cut off after some steps, as by a kill: nothing of it is kept but what it deleted.
    let mut first = CleanupProgress::default();
    for _ in 0..5 {
        ledger.cleanup_step(&scope, &mut first).await.unwrap();
    }
    let both = [0, 1].map(|_| {
        let (ledger, scope) = (ledger.clone(), scope.clone());
        tokio::spawn(async move {
            let mut progress = CleanupProgress::default();
            while !progress.done {
                ledger.cleanup_step(&scope, &mut progress).await.unwrap();
            }
            progress
        })
    });
    let mut total = deleted(&first);
    for run in both {
        total += deleted(&run.await.unwrap());
    }
    assert_eq!(total, matched, "each event went once, and none was left");
    let report = postgres::check(grown.database.url()).await.unwrap();
    assert_eq!(report.differences, [], "counts agree after it");
    assert_eq!(report.events, ROWS - matched);
    ledger.close().await;
}
