//! Plans: no statement walks a table, or an index of it, because the statistics are of another day (L4).

use std::num::NonZeroU32;

use futures::future::join_all;
use oncegate_sidecar::{
    event::{
        Claim, Decision, Ending, FailureKind, FencingToken, Key, Loss, Mark, Micros, Refusal, Resolved, RowId, State,
    },
    ledger::{
        Ledger,
        filter::{CleanupProgress, CleanupScope, Cursor},
        postgres::PostgresLedger,
    },
};
use sqlx::{AssertSqlSafe, Connection as _};

use super::{
    Fixture, claim, completion, extension, failure,
    growth::grown,
    key, mark, refused, resolution,
    stats::{everything, total},
};

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

/// Statistics that tell of a handful of rows, of one or of none, as a Cleanup of nearly all leaves them: no statement of a call
/// walks the table that fills again behind them, nor an index of it (L4).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_reads_all_of_a_table_that_was_nearly_empty_when_it_was_analyzed() {
    let grown = grown().await;
    for (round, kept) in ["id % 6000 = 0", "id = 60000", "false"].into_iter().enumerate() {
        let mut connection = grown.database.connect().await.unwrap();
        for sql in [
            "alter table payment_webhook_events set (autovacuum_enabled = off)",
            // Over all of its pages, which stay.
            &format!("delete from payment_webhook_events where not ({kept})"),
            "vacuum analyze payment_webhook_events",
            // As the sessions that plan for these few rows find them.
            "insert into payment_webhook_events (
                fencing_token, create_time, update_time, end_time, start_time, lock_expire_time, attempt_count, state,
                outcome, tenant, provider, event_id, event_type, claim_id, holder
            )
            select n, now(), now(), now(), now(), now(), 1, 'completed', 'completed', 'default', 'stripe', 'again_' || n,
                'paid', 'a', 'pod-1'
            from generate_series(1, 20000) n",
        ] {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
        }
        connection.close().await.unwrap();
        let blocks = grown.index_blocks().await;
        let calls = 64;
        let ((), read) = grown
            .reads(async |ledger| {
                join_all((0..calls).map(async |number| {
                    all_that_may_happen_to_an_event(ledger, &key(&format!("new_{round}_{number}"))).await;
                }))
                .await;
            })
            .await;
        assert!(read <= calls * 60, "{kept}: {read} rows were read for {calls} events");
        let blocks = grown.index_blocks().await - blocks;
        // Two or three blocks a look-up; one walk of the smallest index is a hundred.
        assert!(blocks <= calls * 150, "{kept}: {blocks} blocks of indexes were read for {calls} events");
    }
}

/// Grants, extends, fails, grants again, completes, decides by hand, lets expire and buries, and counts duplicates.
async fn all_that_may_happen_to_an_event(ledger: &PostgresLedger, key: &Key) {
    let acquire = async |request: Claim| match ledger.claim(request).await.unwrap().decision {
        Decision::Acquired(lock) => lock,
        other => panic!("not granted: {other:?}"),
    };
    let lock = acquire(claim(key, "a")).await;
    ledger.extend(extension(key, &lock, Micros(60_000_000))).await.unwrap();
    let kind = FailureKind::Retryable;
    let at_once = Ending::Failed { kind, error: None, retry_after: Some(Micros::ZERO) };
    ledger.mark(mark(key, &lock, at_once)).await.unwrap();
    let lock = acquire(claim(key, "b")).await;
    ledger.mark(failure(key, &lock, FailureKind::Terminal)).await.unwrap();
    assert_eq!(ledger.claim(claim(key, "c")).await.unwrap().decision, Decision::Refused);
    ledger.resolve(resolution(key, Resolved::Pending)).await.unwrap();
    acquire(Claim { lock_duration: Micros::ZERO, ..claim(key, "d") }).await;
    let buried = ledger.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(key, "e") }).await.unwrap();
    assert_eq!(buried.decision, Decision::Refused);
    ledger.resolve(resolution(key, Resolved::Pending)).await.unwrap();
    let lock = acquire(claim(key, "failing")).await;
    ledger.mark(failure(key, &lock, kind)).await.unwrap();
    let buried = ledger.claim(Claim { attempts_max: NonZeroU32::new(1), ..claim(key, "beyond") }).await.unwrap();
    assert_eq!(buried.decision, Decision::Refused);
    ledger.resolve(resolution(key, Resolved::Pending)).await.unwrap();
    let lock = acquire(claim(key, "f")).await;
    ledger.mark(completion(key, &lock)).await.unwrap();
    assert_eq!(ledger.claim(claim(key, "g")).await.unwrap().decision, Decision::AlreadyCompleted);
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
            for token in [9_999, 30_000].map(FencingToken) {
                let late = Mark {
                    key: key.clone(),
                    fencing_token: token,
                    claim_id: None,
                    ending: Ending::Completed { metadata: None },
                    result: None,
                    attempts_max: None,
                };
                let lost = Refusal::LockLost {
                    loss: Loss::TakenOver,
                    state: State::Processing,
                    fencing_token: FencingToken(20_001),
                };
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
            let cursor = Some(Cursor { create_time: before, row: RowId::NONE });
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
