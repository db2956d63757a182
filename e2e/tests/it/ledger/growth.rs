//! Large tables: what is rare is found without reading what lies between, and Cleanups get along with each other.

use std::sync::Arc;

use futures::future::join_all;
use oncegate_e2e::{
    eventually,
    grow::{Growth, fill},
    postgres::{Cluster, Options},
};
use oncegate_sidecar::{
    event::{Decision, Ending, FailureKind, Mark, Micros, Refusal, State},
    ledger::{
        Ledger,
        filter::{CleanupProgress, CleanupScope, Cursor, HistoryFilter},
        postgres::{self, PostgresLedger, PostgresSettings},
    },
};
use sqlx::{AssertSqlSafe, Connection as _};

use super::{
    Fixture, claim, completion, extension, failure, key,
    postgres_only::UNTIL_ONE_WAITS_FOR_US,
    refused,
    stats::{everything, total},
};

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
    /// Rows of a table that were read so far. A session reports what it read when it ends: nobody else is there.
    async fn read(&self, table: &str) -> i64 {
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
            where relname = $1",
        )
        .bind(table)
        .fetch_one(&mut connection)
        .await
        .unwrap()
    }

    /// How many rows of the events' table a ledger reads for a query.
    async fn reads<T>(&self, query: impl AsyncFnOnce(&PostgresLedger) -> T) -> (T, i64) {
        self.reads_of("payment_webhook_events", query).await
    }

    /// The same, of another table.
    async fn reads_of<T>(&self, table: &str, query: impl AsyncFnOnce(&PostgresLedger) -> T) -> (T, i64) {
        let before = self.read(table).await;
        let ledger = self.ledger().await;
        let answer = query(&ledger).await;
        ledger.close().await;
        drop(ledger);
        (answer, self.read(table).await - before)
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
    let (report, read) = grown.reads(async |ledger| ledger.stats(everything()).await.unwrap()).await;
    let stuck: i64 = report.counts.values().map(|counts| counts.stuck).sum();
    assert!(stuck > 0 && read <= 4 * stuck + 4, "{read} rows were read to count {stuck} that are stuck");
}

/// A part of a page and the place where it ended are of one moment: the next part begins right behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_repeats_and_skips_nothing_that_comes_and_goes_while_it_is_read() {
    let fixture = Fixture::postgres().await;
    // More than one statement looks at, by their place from the newest on. The last one that it looks at is wanted; so is one
    // with a result that has to be fetched from elsewhere, where it can be held up.
    fixture
        .tamper(
            "insert into payment_webhook_events (
                fencing_token, create_time, update_time, end_time, start_time, lock_expire_time, attempt_count, state,
                outcome, tenant, provider, event_id, event_type, claim_id, holder, result_body
            )
            select n, t.at, t.at, t.at, t.at, t.at, 1, 'completed', 'completed', 'default', 'stripe', 'evt_' || n,
                case when n in (2, 20000) then 'wanted' else 'other' end, 'a', 'pod-1',
                case when n = 2 then (
                    select decode(string_agg(md5(random()::text), ''), 'hex') from generate_series(1, 300)
                ) end
            from generate_series(1, 20100) n
            cross join lateral (select now() - interval '1 hour' - n * interval '1 millisecond' as at) t",
        )
        .await;
    let mut outsider = fixture.connect().await;
    let elsewhere: String = sqlx::query_scalar(
        "select reltoastrelid::regclass::text from pg_class where oid = 'payment_webhook_events'::regclass",
    )
    .fetch_one(&mut outsider)
    .await
    .unwrap();
    let mut pages = Vec::new();
    for meanwhile in [
        "insert into payment_webhook_events (
            fencing_token, create_time, update_time, end_time, start_time, lock_expire_time, attempt_count, state,
            outcome, tenant, provider, event_id, event_type, claim_id, holder
        )
        select fencing_token, now(), now(), now(), start_time, lock_expire_time, 1, state,
            outcome, tenant, provider, 'new_' || event_id, 'other', claim_id, holder
        from payment_webhook_events where fencing_token between 11 and 15",
        "delete from payment_webhook_events where fencing_token between 11 and 15",
    ] {
        let mut held = outsider.begin().await.unwrap();
        // Locks the index of what is elsewhere until the end.
        let hold_up = format!("reindex table {elsewhere}");
        sqlx::raw_sql(AssertSqlSafe(hold_up)).execute(&mut *held).await.unwrap();
        let walk = async {
            let mut filter = HistoryFilter { event_type: Some("wanted".into()), ..listing() };
            let mut found = Vec::new();
            loop {
                let page = fixture.ledger.history(filter.clone()).await.unwrap();
                found.extend(page.events.into_iter().map(|event| event.key.event_id));
                filter.after = page.next;
                if page.next.is_none() {
                    break found;
                }
            }
        };
        let change = async {
            sqlx::raw_sql(UNTIL_ONE_WAITS_FOR_US).execute(&mut *held).await.unwrap();
            sqlx::raw_sql(meanwhile).execute(&mut *held).await.unwrap();
            held.commit().await.unwrap();
        };
        let (found, ()) = tokio::join!(walk, change);
        pages.push(found);
    }
    assert_eq!(pages, [["evt_2", "evt_20000"]; 2], "while events came, and while they went");
    fixture.close().await;
}

/// The statistics, and whatever was made of them, are those of quiet days when a consumer goes away (L4).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stats_answer_when_very_much_is_open_that_was_not_before() {
    let fixture = Fixture::postgres().await;
    fixture.expired(&key("evt_1"), "a").await;
    // Nobody but the test analyzes.
    fixture
        .tamper(
            "alter table payment_webhook_events set (autovacuum_enabled = off);
            alter table payment_webhook_open set (autovacuum_enabled = off);
            alter table payment_webhook_counts set (autovacuum_enabled = off);
            insert into payment_webhook_open (event_row) select id from payment_webhook_events;
            update payment_webhook_sweep set swept_until = clock_timestamp();
            analyze payment_webhook_events, payment_webhook_open, payment_webhook_counts, payment_webhook_sweep",
        )
        .await;
    // On each of its connections more often than it takes to keep a plan.
    for _ in 0..40 {
        assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap()).stuck, 1);
    }
    fixture
        .tamper(
            "insert into payment_webhook_events (
                fencing_token, create_time, update_time, start_time, lock_expire_time, attempt_count, state, outcome,
                tenant, provider, event_id, event_type, claim_id, holder
            )
            select n, now(), now(), now(), now(), 1, 'processing', 'running', 'default', 'stripe', 'open_' || n, 'paid',
                'a', 'pod-1'
            from generate_series(1, 100000) n;
            insert into payment_webhook_open (event_row)
            select id from payment_webhook_events where event_id like 'open%' order by id;
            insert into payment_webhook_counts (slot, tenant, provider, hour, processing)
            select 0, 'default', 'stripe', date_trunc('hour', now(), 'UTC'), 100000;
            update payment_webhook_sweep set swept_until = clock_timestamp()",
        )
        .await;
    let stats = fixture.ledger.stats(everything()).await.unwrap();
    assert_eq!(total(&stats).stuck, 100_001);
    fixture.close().await;
}

/// Statistics that tell of a handful of rows, as a Cleanup of nearly all leaves them: no statement of a call walks the table
/// that fills again behind them (L4).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_reads_all_of_a_table_that_was_nearly_empty_when_it_was_analyzed() {
    let grown = grown().await;
    let mut connection = grown.database.connect().await.unwrap();
    for sql in [
        "alter table payment_webhook_events set (autovacuum_enabled = off)",
        // Over all of its pages, which stay.
        "delete from payment_webhook_events where id % 6000 <> 0",
        "vacuum analyze payment_webhook_events",
        "insert into payment_webhook_events (
            fencing_token, create_time, update_time, end_time, start_time, lock_expire_time, attempt_count, state, outcome,
            tenant, provider, event_id, event_type, claim_id, holder
        )
        select n, now(), now(), now(), now(), now(), 1, 'completed', 'completed', 'default', 'stripe', 'again_' || n, 'paid',
            'a', 'pod-1'
        from generate_series(1, 20000) n",
    ] {
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
    let calls = 64;
    let ((), read) = grown
        .reads(async |ledger| {
            join_all((0..calls).map(async |number| {
                let key = key(&format!("new_{number}"));
                let Decision::Acquired(lock) = ledger.claim(claim(&key, "a")).await.unwrap().decision else {
                    panic!("it is new")
                };
                ledger.extend(extension(&key, &lock, Micros(60_000_000))).await.unwrap();
                // In its own statement, unlike a completion of what the same process granted.
                let failed = number % 2 == 0;
                let mark = if failed { failure(&key, &lock, FailureKind::Terminal) } else { completion(&key, &lock) };
                ledger.mark(mark).await.unwrap();
                let again = ledger.claim(claim(&key, "b")).await.unwrap();
                assert_eq!(again.decision, if failed { Decision::Refused } else { Decision::AlreadyCompleted });
            }))
            .await;
        })
        .await;
    assert!(read <= calls * 30, "{read} rows were read for {calls} events");
}

/// Where attempts have no cap an event may have very many of them, and each call on it is in everybody's batch. The statistics are
/// those of a handful.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_reads_all_attempts_of_an_event() {
    let grown = grown().await;
    let mut connection = grown.database.connect().await.unwrap();
    for sql in [
        "alter table payment_webhook_attempts set (autovacuum_enabled = off)",
        // Over all of its pages, which stay.
        "delete from payment_webhook_attempts where event_row % 20000 <> 0",
        "vacuum analyze payment_webhook_attempts",
        "insert into payment_webhook_events (
            id, fencing_token, create_time, update_time, start_time, lock_expire_time, attempt_count, state, outcome,
            tenant, provider, event_id, event_type, claim_id, holder
        )
        overriding system value
        values (-1, 20001, now(), now(), now(), now() + interval '1 hour', 20001, 'processing', 'running', 'default',
            'stripe', 'tried', 'paid', 'claim-20001', 'pod-1')",
        "insert into payment_webhook_attempts (
            event_row, attempt, fencing_token, claim_id, holder, start_time, end_time, outcome
        )
        select -1, n, n, 'claim-' || n, 'pod-1', now(), now(), 'failed_retryable' from generate_series(1, 20000) n",
    ] {
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
    let ((), read) = grown
        .reads_of("payment_webhook_attempts", async |ledger| {
            let key = key("tried");
            let again = ledger.claim(claim(&key, "claim-9999")).await;
            assert_eq!(refused(again), Refusal::ClaimEnded);
            let other = ledger.claim(claim(&key, "another")).await.unwrap().decision;
            assert!(matches!(other, Decision::InProgress { .. }), "{other:?}");
            for token in [9_999, 30_000] {
                let late = Mark {
                    key: key.clone(),
                    fencing_token: token,
                    claim_id: None,
                    ending: Ending::Completed { metadata: None },
                    result: None,
                    attempts_max: 0,
                };
                let lost = Refusal::LockLost { state: State::Processing, fencing_token: 20_001 };
                assert_eq!(refused(ledger.mark(late).await), lost, "{token}");
            }
        })
        .await;
    assert!(read <= 20, "{read} attempts were read for four calls");
}

/// Most delivery ids are another provider's, and kept; and the statistics are of a handful of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cleanup_of_one_provider_reads_each_delivery_id_of_the_others_once() {
    let grown = grown().await;
    let mut connection = grown.database.connect().await.unwrap();
    let filled = "insert into payment_webhook_deliveries (tenant, provider, delivery_id, payload_digest, create_time)
        select 'default', case when n % 1000 = 0 then 'stripe' else 'paypal' end, md5(n::text), '\\x00',
            now() - interval '1 day' + n * interval '1 second'
        from generate_series(1, 30000) n";
    for sql in [
        "alter table payment_webhook_deliveries set (autovacuum_enabled = off)",
        filled,
        // Over all of its pages, which stay.
        "delete from payment_webhook_deliveries where delivery_id <> md5('30000')",
        "vacuum analyze payment_webhook_deliveries",
        "delete from payment_webhook_deliveries",
        filled,
    ] {
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
    let (steps, read) = grown
        .reads_of("payment_webhook_deliveries", async |ledger| {
            let before = ledger.now().await.unwrap();
            let scope = CleanupScope {
                tenant: None,
                provider: Some("stripe".into()),
                before,
                states: vec![State::Completed],
                dry_run: false,
                batch_size: 1_000,
            };
            // Past the events, which are others' business.
            let cursor = Some(Cursor { create_time: before, row: 0 });
            let mut progress = CleanupProgress { cursor, ..CleanupProgress::default() };
            let mut steps = 0;
            // Counts are folded from the last of them on.
            while progress.folded_until.is_none() {
                ledger.cleanup_step(&scope, &mut progress).await.unwrap();
                steps += 1;
            }
            steps
        })
        .await;
    assert_eq!(steps, 31, "30,000 in steps of 1,000, and one that finds no more");
    assert!(read <= 32_000, "{read} rows were read for 30,000");
    let left = "select string_agg(provider || ' ' || count, ', ') from (
        select provider, count(*) from payment_webhook_deliveries group by provider) t";
    assert_eq!(grown.database.query(left).await.unwrap(), "paypal 29970");
}

/// The same statistics, of events and attempts, as the Cleanup before it left them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cleanup_reads_each_event_a_few_times_whatever_the_statistics_say() {
    let grown = grown().await;
    let mut connection = grown.database.connect().await.unwrap();
    for sql in [
        "alter table payment_webhook_events set (autovacuum_enabled = off)",
        "alter table payment_webhook_attempts set (autovacuum_enabled = off)",
        // Over all of their pages, which stay.
        "delete from payment_webhook_events where id % 6000 <> 0",
        "delete from payment_webhook_attempts where event_row % 6000 <> 0",
        "vacuum analyze payment_webhook_events, payment_webhook_attempts",
        "insert into payment_webhook_events (
            fencing_token, create_time, update_time, end_time, start_time, lock_expire_time, attempt_count, state, outcome,
            tenant, provider, event_id, event_type, claim_id, holder
        )
        select n, t.at, t.at, t.at, t.at, t.at, 2, 'completed', 'completed', 'default', 'stripe', 'again_' || n, 'paid', 'b',
            'pod-1'
        from generate_series(1, 20000) n
        cross join lateral (select now() - interval '1 hour' + n * interval '1 millisecond' as at) t",
        "insert into payment_webhook_attempts (
            event_row, attempt, fencing_token, claim_id, holder, start_time, end_time, outcome
        )
        select id, 1, -fencing_token, 'a', 'pod-1', start_time, start_time, 'failed_retryable'
        from payment_webhook_events where event_id like 'again%'",
    ] {
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
    for (table, dry_run) in
        [("payment_webhook_events", true), ("payment_webhook_events", false), ("payment_webhook_attempts", false)]
    {
        let ((), read) = grown
            .reads_of(table, async |ledger| {
                let scope = CleanupScope {
                    tenant: None,
                    provider: None,
                    before: ledger.now().await.unwrap(),
                    states: vec![State::Completed],
                    dry_run,
                    batch_size: 1_000,
                };
                let mut progress = CleanupProgress::default();
                // A part of them, so that some are left for the next.
                for _ in 0..8 {
                    ledger.cleanup_step(&scope, &mut progress).await.unwrap();
                }
                let matched: i64 = progress.providers.values().map(|of| of.matched).sum();
                assert!(matched > 7_900, "{table}: {matched}");
            })
            .await;
        assert!(read <= 8_000 * 6, "{read} rows of {table} were read for 8,000 events, dry run: {dry_run}");
    }
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

/// Two Cleanups at once change the same counts. The one that comes second waits for the first one's step, however long that
/// takes on a busy machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cleanup_waits_for_the_counts_that_another_one_is_changing() {
    let fixture = Fixture::postgres().await;
    fixture.completed(&key("evt_1")).await;
    let scope = everything_completed(&fixture, 10).await;
    // As a step of another one leaves it before its commit: the row of this hour, in the slot of Cleanups.
    let mut other = fixture.connect().await;
    sqlx::raw_sql(
        "begin; insert into payment_webhook_counts (slot, tenant, provider, hour)
        select 0, tenant, provider, hour from payment_webhook_counts",
    )
    .execute(&mut other)
    .await
    .unwrap();
    let step = tokio::spawn({
        let (ledger, scope) = (fixture.ledger.clone(), scope.clone());
        async move {
            let mut progress = CleanupProgress::default();
            ledger.cleanup_step(&scope, &mut progress).await.map(|()| progress)
        }
    });
    let waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'
        and datname = current_database() and clock_timestamp() - query_start > interval '1 second'";
    eventually("it has waited for more than a second", async || {
        assert!(!step.is_finished(), "it did not wait");
        let mut admin = fixture.connect().await;
        let count: i64 = sqlx::query_scalar(waits).fetch_one(&mut admin).await.unwrap();
        (count > 0).then_some(())
    })
    .await;
    sqlx::raw_sql("commit").execute(&mut other).await.unwrap();
    let progress = step.await.unwrap().unwrap();
    assert!(progress.done && progress.providers["stripe"].deleted == 1, "{progress:?}");
    assert_eq!(fixture.check().await.differences, []);
    fixture.close().await;
}

/// All that was completed by now.
async fn everything_completed(fixture: &Fixture, batch_size: usize) -> CleanupScope {
    CleanupScope {
        tenant: None,
        provider: None,
        before: fixture.now().await,
        states: vec![State::Completed],
        dry_run: false,
        batch_size,
    }
}

/// Folding counts holds nothing that others want while it waits for them, and what it cannot have it leaves to the next run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_that_others_are_changing_are_folded_by_the_next_run() {
    let fixture = Fixture::postgres().await;
    let scope = everything_completed(&fixture, 10).await;
    let cleanup = async || {
        let mut progress = CleanupProgress::default();
        fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        assert!(progress.done);
    };
    fixture
        .tamper(
            "insert into payment_webhook_counts (slot, tenant, provider, hour, completed)
            select slot, 'default', 'stripe', date_trunc('hour', now(), 'UTC') - hours * interval '1 hour', slot + hours - 1
            from unnest(array[0, 7, 8, 9]) slot, unnest(array[2, 3]) hours where (slot, hours) <> (0, 3)",
        )
        .await;
    let mut admin = fixture.connect().await;
    let mut slots = async || -> Vec<(i32, i64)> {
        let sql = "select slot, sum(completed)::bigint from payment_webhook_counts group by slot order by slot";
        sqlx::query_as(sql).fetch_all(&mut admin).await.unwrap()
    };
    // A writer is at one row, and a step of another Cleanup at a row that there was not before.
    let mut writer = fixture.connect().await;
    let change = "begin; update payment_webhook_counts set completed = completed where slot = 8 and completed = 9";
    sqlx::raw_sql(change).execute(&mut writer).await.unwrap();
    let mut step = fixture.connect().await;
    let insert = "begin; insert into payment_webhook_counts (slot, tenant, provider, hour, completed)
        select 0, 'default', 'stripe', min(hour), 2 from payment_webhook_counts";
    sqlx::raw_sql(insert).execute(&mut step).await.unwrap();
    cleanup().await;
    assert_eq!(slots().await, [(0, 1), (7, 17), (8, 19), (9, 21)], "nothing was taken, and nobody was kept waiting");
    sqlx::raw_sql("commit").execute(&mut step).await.unwrap();
    cleanup().await;
    assert_eq!(slots().await, [(0, 1 + 2 + 17 + 10 + 21), (8, 9)], "all but what the writer has in hand");
    sqlx::raw_sql("rollback").execute(&mut writer).await.unwrap();
    cleanup().await;
    assert_eq!(slots().await, [(0, 60)]);
    // What says nothing any more goes.
    sqlx::raw_sql("update payment_webhook_counts set completed = 0").execute(&mut step).await.unwrap();
    cleanup().await;
    assert!(slots().await.is_empty());
    fixture.close().await;
}

/// After a long time without a Cleanup there is much to fold, and no statement may take long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_and_times_of_many_hours_are_folded_in_bounded_steps() {
    let fixture = Fixture::postgres().await;
    // The hours of three days in three slots each, and times of the older half, which has nothing completed any more.
    fixture
        .tamper(
            "insert into payment_webhook_counts (slot, tenant, provider, hour, completed, dead)
            select slot, 'default', 'stripe', date_trunc('hour', now(), 'UTC') - hours * interval '1 hour',
                case when hours <= 36 then 1 else 0 end, case when hours <= 54 then 1 else 0 end
            from generate_series(7, 9) slot, generate_series(1, 72) hours;
            insert into payment_webhook_timings (slot, tenant, provider, hour, buckets, counts)
            select 107, tenant, provider, hour, '{3}', '{1}' from payment_webhook_counts where slot = 7",
        )
        .await;
    let scope = everything_completed(&fixture, 10).await;
    let mut admin = fixture.connect().await;
    let mut rows = async || -> (i64, i64, i64) {
        let sql = "select (select count(*) from payment_webhook_counts where slot <> 0),
            (select count(*) from payment_webhook_counts where slot = 0), (select count(*) from payment_webhook_timings)";
        sqlx::query_as(sql).fetch_one(&mut admin).await.unwrap()
    };
    let mut progress = CleanupProgress::default();
    let (mut unfolded, mut folded, mut times) = rows().await;
    while !progress.done {
        fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        let (of_slots, of_cleanup, of_times) = rows().await;
        // So many, and the rest of their last hour.
        assert!(unfolded - of_slots <= 12 && times - of_times <= 4, "{unfolded} {of_slots}, {times} {of_times}");
        (unfolded, folded, times) = (of_slots, of_cleanup, of_times);
    }
    assert_eq!((unfolded, folded, times), (0, 54, 36), "each hour has a row, if it says anything");
    let sums = "select sum(completed)::bigint, sum(dead)::bigint, max(dead)::bigint from payment_webhook_counts";
    let sums: (i64, i64, i64) = sqlx::query_as(sums).fetch_one(&mut fixture.connect().await).await.unwrap();
    assert_eq!(sums, (3 * 36, 3 * 54, 3));
    fixture.close().await;
}

/// Folding only tidies: hours that cannot be folded now fail no Cleanup, and keep no others from being folded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hours_that_take_too_long_to_fold_are_left_to_the_next_run() {
    let fixture = Fixture::postgres().await;
    fixture
        .tamper(
            "insert into payment_webhook_counts (slot, tenant, provider, hour, completed)
            select 7, 'default', 'stripe', date_trunc('hour', now(), 'UTC') - hours * interval '1 hour', hours
            from generate_series(1, 9) hours;
            create function take_too_long() returns trigger language plpgsql as $$ begin
                -- As the server's statement time-out does.
                if old.completed = 5 then raise exception 'too slow' using errcode = 'query_canceled'; end if;
                return old;
            end $$;
            create trigger take_too_long before delete on payment_webhook_counts
            for each row execute function take_too_long()",
        )
        .await;
    let scope = everything_completed(&fixture, 3).await;
    let run = async || {
        let mut progress = CleanupProgress::default();
        while !progress.done {
            fixture.ledger.cleanup_step(&scope, &mut progress).await.unwrap();
        }
        let sql = "select array_agg(completed order by completed) from payment_webhook_counts where slot <> 0";
        let left: Option<Vec<i64>> = sqlx::query_scalar(sql).fetch_one(&mut fixture.connect().await).await.unwrap();
        left.unwrap_or_default()
    };
    assert_eq!(run().await, [4, 5, 6], "those of the step that was cut off");
    fixture.tamper("drop function take_too_long() cascade").await;
    assert!(run().await.is_empty());
    fixture.close().await;
}

/// A consumer has gone away: what came meanwhile is written down a part a second, so that calls do not wait for it, and Stats
/// knows of all of it all the time (L5).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_noted_over_several_sweeps_and_counted_at_once() {
    let fixture = Fixture::postgres().await;
    fixture
        .tamper(
            "create function a_while_ago() returns timestamptz language sql as
                $$ select date_trunc('hour', clock_timestamp() - interval '1 minute', 'UTC') $$;
            -- Half of it was created at one moment, more than one sweep notes.
            insert into payment_webhook_events (
                fencing_token, create_time, update_time, start_time, lock_expire_time, attempt_count, state, outcome,
                tenant, provider, event_id, event_type, claim_id, holder
            )
            select n, t.at, t.at, t.at, t.at, 1, 'processing', 'running', 'default', 'stripe', 'open_' || n, 'paid', 'a', 'pod-1'
            from a_while_ago() as begun,
                generate_series(1, 50000) n,
                lateral (select begun + greatest(n - 25000, 0) * interval '1 microsecond' as at) t;
            insert into payment_webhook_counts (slot, tenant, provider, hour, processing)
            select 0, 'default', 'stripe', a_while_ago(), 50000;
            update payment_webhook_sweep set swept_until = a_while_ago() - interval '1 hour';
            analyze payment_webhook_events",
        )
        .await;
    let mut connection = fixture.connect().await;
    let mut noted: Vec<i64> = Vec::new();
    for _ in 0..3 {
        fixture.ledger.maintain().await.unwrap();
        let count = sqlx::query_scalar("select count(*) from payment_webhook_open").fetch_one(&mut connection);
        noted.push(count.await.unwrap());
        assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap()).stuck, 50_000);
    }
    // The second one found those of the first again, and went on. Stats noticed that some were passed over, and noted all.
    assert_eq!(noted, [20_000, 20_000, 50_000]);
    fixture.close().await;
}
