//! What is true of the Postgres ledger alone: how it shares statements, what its statements cost, and what it does when
//! the server stands in the way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use oncegate_e2e::{
    eventually,
    postgres::{Cluster, Database, Options},
};
use oncegate_sidecar::{
    event::{Claim, Decision, FailureKind, Micros, State},
    ledger::{
        Error, Ledger,
        postgres::{self, OpenError, PostgresLedger, PostgresSettings},
    },
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Postgres, Transaction};

use super::{claim, completion, failure, key, stats::everything};

pub(super) async fn ledger() -> (PostgresLedger, Database) {
    let database = Database::create().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    (ledger, database)
}

/// Somebody else works on the row of an event, until the transaction ends.
pub(super) async fn hold<'c>(outsider: &'c mut PgConnection, event_id: &str) -> Transaction<'c, Postgres> {
    let mut held = outsider.begin().await.unwrap();
    let lock = "select from payment_webhook_events where event_id = $1 for update";
    sqlx::query(lock).bind(event_id).execute(&mut *held).await.unwrap();
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_item_fails_alone() {
    let (ledger, _database) = ledger().await;
    for round in 0..10 {
        let calls = (0..64).map(|number| {
            let mut claim = claim(&key(&format!("evt_{round}_{number}")), "a");
            if number == 17 {
                // The API refuses it; were it to come this far, Postgres would.
                claim.holder = "a\0b".into();
            }
            ledger.claim(claim)
        });
        let answers = futures::future::join_all(calls).await;
        for (number, answer) in answers.into_iter().enumerate() {
            match answer {
                Ok(claimed) => assert!(matches!(claimed.decision, Decision::Acquired(_)) && number != 17),
                Err(Error::Internal(_)) => assert_eq!(number, 17),
                Err(other) => panic!("{number}: {other}"),
            }
        }
    }
    ledger.close().await;
}

// T13
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_locked_elsewhere_holds_up_its_own_call_only() {
    let (ledger, database) = ledger().await;
    let mut locks = Vec::new();
    for number in 0..32 {
        let key = key(&format!("evt_{number}"));
        let Decision::Acquired(lock) = ledger.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
        locks.push((key, lock));
    }
    let mut outsider = database.connect().await.unwrap();
    let held = hold(&mut outsider, "evt_9").await;
    let marks = locks.iter().map(|(key, lock)| ledger.mark(completion(key, lock)));
    for (number, answer) in futures::future::join_all(marks).await.into_iter().enumerate() {
        match answer {
            Ok(marked) => assert!(marked.event.state == State::Completed && number != 9),
            // Not done, or nobody knows: never a wrong answer, and the same call may be repeated.
            Err(Error::Unavailable { .. } | Error::OutcomeUnknown) => {}
            Err(other) => panic!("{number}: {other}"),
        }
    }
    held.rollback().await.unwrap();
    for (key, lock) in &locks {
        eventually("every mark is accepted, repeated or not", async || {
            ledger.mark(completion(key, lock)).await.is_ok().then_some(())
        })
        .await;
    }
    ledger.close().await;
}

pub(super) const UNTIL_ONE_WAITS_FOR_US: &str = "do $$ begin loop
        perform pg_stat_clear_snapshot();
        exit when exists (
            select from pg_stat_activity
            where datname = current_database() and pg_backend_pid() = any (pg_blocking_pids(pid))
        );
        perform pg_sleep(0.002);
    end loop; end $$";

// S1, S5: what a claim has read is compared again on the locked row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_waited_for_the_row_is_judged_by_what_it_then_finds() {
    let (ledger, database) = ledger().await;
    let mut outsider = database.connect().await.unwrap();
    for (event, fails, meanwhile) in [
        ("extended", false, "lock_expire_time = clock_timestamp() + interval '1 hour'"),
        ("paused", true, "retry_time = clock_timestamp() + interval '1 hour'"),
    ] {
        let key = key(event);
        // Its lock has expired at once.
        let first = Claim { lock_duration: Micros::ZERO, ..claim(&key, "a") };
        let Decision::Acquired(lock) = ledger.claim(first).await.unwrap().decision else { panic!("held") };
        if fails {
            ledger.mark(failure(&key, &lock, FailureKind::Retryable)).await.unwrap();
        }
        let mut held = outsider.begin().await.unwrap();
        let change = format!("update payment_webhook_events set {meanwhile} where event_id = $1");
        sqlx::query(sqlx::AssertSqlSafe(change)).bind(event).execute(&mut *held).await.unwrap();
        let waits = async {
            // In the server: a wait for a row is short.
            sqlx::query(UNTIL_ONE_WAITS_FOR_US).execute(&mut *held).await.unwrap();
            held.commit().await.unwrap();
        };
        let (answer, ()) = tokio::join!(ledger.claim(claim(&key, "b")), waits);
        let claimed = answer.unwrap();
        assert!(matches!(claimed.decision, Decision::InProgress { .. }), "{event}: {:?}", claimed.decision);
        assert_eq!(claimed.event.fencing_token, lock.fencing_token, "{event}");
    }
    ledger.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completions_are_heap_only_updates_and_duplicates_write_nothing() {
    // A server of its own: transaction ids are counted over all databases.
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    for round in 0..20 {
        let cycles = (0..64).map(|number| {
            let key = key(&format!("evt_{round}_{number}"));
            let ledger = &ledger;
            async move {
                let Decision::Acquired(lock) = ledger.claim(claim(&key, "a")).await.unwrap().decision else {
                    panic!("held")
                };
                ledger.mark(completion(&key, &lock)).await.unwrap();
            }
        });
        futures::future::join_all(cycles).await;
    }
    let xid = "pg_snapshot_xmax(pg_current_snapshot())";
    let before: u64 = database.query(xid).await.unwrap().parse().unwrap();
    let began = Instant::now();
    for _ in 0..20 {
        let duplicates = (0..64).map(|number| ledger.claim(claim(&key(&format!("evt_3_{number}")), "b")));
        for answer in futures::future::join_all(duplicates).await {
            assert_eq!(answer.unwrap().decision, Decision::AlreadyCompleted);
        }
    }
    // Each second's counts are one statement (L2); nothing else takes a transaction id.
    let after: u64 = database.query(xid).await.unwrap().parse().unwrap();
    let flushes = began.elapsed().as_secs() + 2;
    assert!(after - before <= flushes, "{} transactions for 1,280 duplicates", after - before);
    ledger.close().await;

    eventually("the statistics of the updates are in", async || {
        let share = "select n_tup_hot_upd::float8 / n_tup_upd from pg_stat_user_tables \
            where relname = 'payment_webhook_events' and n_tup_upd >= 1280";
        let share: f64 = database.query(share).await.ok()?.parse().ok()?;
        assert!(share >= 0.95, "{share} of the updates are heap-only");
        Some(())
    })
    .await;
}

// L2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_written_each_second_however_many_duplicates_come_meanwhile() {
    // A server of its own: transaction ids are counted over all databases.
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    let keys: Vec<_> = (0..16).map(|number| key(&format!("evt_{number}"))).collect();
    for key in &keys {
        let Decision::Acquired(lock) = ledger.claim(claim(key, "a")).await.unwrap().decision else { panic!("held") };
        ledger.mark(completion(key, &lock)).await.unwrap();
    }
    let xid = "pg_snapshot_xmax(pg_current_snapshot())";
    let before: u64 = database.query(xid).await.unwrap().parse().unwrap();
    let (began, mut duplicates) = (Instant::now(), 0);
    // As the cache counts them, beside the writer, also while it flushes.
    while began.elapsed() < Duration::from_millis(2_500) {
        for key in &keys {
            ledger.count_duplicate(key);
            duplicates += 1;
        }
        tokio::task::yield_now().await;
    }
    let after: u64 = database.query(xid).await.unwrap().parse().unwrap();
    // Each second one statement for the counts, and one for processing times.
    let flushes = 2 * (began.elapsed().as_secs() + 2);
    assert!(after - before <= flushes, "{} transactions for {duplicates} duplicates", after - before);
    ledger.close().await;
    let written = "(select sum(duplicate_count) from payment_webhook_events)";
    assert_eq!(database.query(written).await.unwrap(), duplicates.to_string());
}

// L2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_locked_elsewhere_holds_up_the_counts_of_its_duplicates_and_no_grant() {
    let (ledger, database) = ledger().await;
    let known = key("evt_known");
    let Decision::Acquired(lock) = ledger.claim(claim(&known, "a")).await.unwrap().decision else { panic!("held") };
    ledger.mark(completion(&known, &lock)).await.unwrap();
    let mut outsider = database.connect().await.unwrap();
    let mut held = outsider.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid() from payment_webhook_events for update")
        .fetch_one(&mut *held)
        .await
        .unwrap();
    assert_eq!(ledger.claim(claim(&known, "b")).await.unwrap().decision, Decision::AlreadyCompleted);
    let waits = format!(
        "(select coalesce(max(application_name), '') from pg_stat_activity where {pid} = any (pg_blocking_pids(pid)))"
    );
    let who = eventually("somebody waits for the row", async || {
        Some(database.query(&waits).await.unwrap()).filter(|name| !name.is_empty())
    })
    .await;
    assert_eq!(who, "oncegate-counts");
    let new = key("evt_new");
    let Decision::Acquired(lock) = ledger.claim(claim(&new, "a")).await.unwrap().decision else { panic!("held") };
    ledger.mark(completion(&new, &lock)).await.unwrap();
    held.rollback().await.unwrap();
    ledger.close().await;
    let counted = "(select sum(duplicate_count) from payment_webhook_events)";
    assert_eq!(database.query(counted).await.unwrap(), "1");
}

// L3: whatever statement takes several rows takes them in the order of their keys, so that none waits for another in a circle.
// On one thread, so that both claims are in the queue before the writer looks.
#[tokio::test]
async fn rows_are_locked_in_the_order_of_their_keys_and_not_of_their_numbers() {
    let (ledger, database) = ledger().await;
    // The second by its key has the lower number. Both locks have expired at once.
    for event in ["evt_2", "evt_1"] {
        let expired = Claim { lock_duration: Micros::ZERO, ..claim(&key(event), "a") };
        assert!(matches!(ledger.claim(expired).await.unwrap().decision, Decision::Acquired(_)));
    }
    let (mut outsider, mut other) = (database.connect().await.unwrap(), database.connect().await.unwrap());
    let mut held = outsider.begin().await.unwrap();
    let lock = "select from payment_webhook_events where event_id = $1 for update nowait";
    sqlx::query(lock).bind("evt_1").execute(&mut *held).await.unwrap();
    let waits = async {
        sqlx::query(UNTIL_ONE_WAITS_FOR_US).execute(&mut *held).await.unwrap();
        sqlx::query(lock).bind("evt_2").execute(&mut other).await.expect("nobody holds the second yet");
        held.rollback().await.unwrap();
    };
    let (first, second) = (key("evt_1"), key("evt_2"));
    let claims = futures::future::join(ledger.claim(claim(&first, "b")), ledger.claim(claim(&second, "b")));
    let ((first, second), ()) = tokio::join!(claims, waits);
    for claimed in [first.unwrap(), second.unwrap()] {
        assert!(matches!(claimed.decision, Decision::Acquired(_)), "{:?}", claimed.decision);
    }
    ledger.close().await;
}

// L2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_locked_elsewhere_holds_up_its_own_count_only() {
    let (ledger, database) = ledger().await;
    // More than one statement writes.
    let keys: Vec<_> = (0..1_000).map(|number| key(&format!("evt_{number}"))).collect();
    for answer in futures::future::join_all(keys.iter().map(|key| ledger.claim(claim(key, "a")))).await {
        assert!(matches!(answer.unwrap().decision, Decision::Acquired(_)));
    }
    let mut outsider = database.connect().await.unwrap();
    let held = hold(&mut outsider, "evt_500").await;
    for key in &keys {
        ledger.count_duplicate(key);
    }
    // The last flush, if not an earlier one.
    ledger.close().await;
    held.rollback().await.unwrap();
    let counted = "(select sum(duplicate_count) from payment_webhook_events)";
    assert_eq!(database.query(counted).await.unwrap(), "999");
}

/// No session of this database keeps a transaction open that nobody works on. The ledger is at work yet: a session of its own
/// may be between the two ends of one for a moment.
async fn nothing_is_left_in_transaction(database: &Database) {
    let sessions = "select count(*) from pg_stat_activity
        where datname = current_database() and state like 'idle in transaction%'";
    eventually("no session idle in a transaction", async || {
        (database.query(sessions).await.unwrap() == "0").then_some(())
    })
    .await;
}

// T23
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_cut_under_load_lose_nothing_that_was_acknowledged() {
    let (ledger, database) = ledger().await;
    let mut admin = database.connect().await.unwrap();
    let ended = tokio_util::sync::CancellationToken::new();
    let load = futures::future::join_all((0..16).map(|worker| {
        let (ledger, ended) = (&ledger, ended.clone());
        async move {
            let mut acknowledged = Vec::new();
            let mut number = 0;
            while !ended.is_cancelled() {
                number += 1;
                let key = key(&format!("evt_{worker}_{number}"));
                // The same claim again, as a client does whose reply was lost: it gets its own lock.
                let lock = eventually("a lock", async || match ledger.claim(claim(&key, "a")).await {
                    Ok(claimed) => match claimed.decision {
                        Decision::Acquired(lock) => Some(lock),
                        other => panic!("{key:?}: {other:?}"),
                    },
                    Err(Error::Unavailable { .. } | Error::OutcomeUnknown) => None,
                    Err(other) => panic!("{key:?}: {other}"),
                })
                .await;
                eventually("a completion", async || match ledger.mark(completion(&key, &lock)).await {
                    Ok(marked) => {
                        assert_eq!(marked.event.state, State::Completed);
                        Some(())
                    }
                    Err(Error::Unavailable { .. } | Error::OutcomeUnknown) => None,
                    Err(other) => panic!("{key:?}: {other}"),
                })
                .await;
                acknowledged.push((key, lock));
            }
            acknowledged
        }
    }));
    let cut = async {
        for _ in 0..20 {
            sqlx::query(
                "select pg_terminate_backend(pid) from pg_stat_activity
                where datname = current_database() and pid <> pg_backend_pid()",
            )
            .execute(&mut admin)
            .await
            .unwrap();
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        ended.cancel();
    };
    let (acknowledged, ()) = tokio::join!(load, cut);
    let acknowledged: Vec<_> = acknowledged.into_iter().flatten().collect();
    assert!(acknowledged.len() > 100, "{}", acknowledged.len());
    let completed = "select count(*) from payment_webhook_events where state = 'completed' and attempt_count = 1";
    assert_eq!(database.query(completed).await.unwrap(), acknowledged.len().to_string());
    let tokens = "select count(distinct fencing_token) from payment_webhook_events";
    assert_eq!(database.query(tokens).await.unwrap(), acknowledged.len().to_string());
    let counted = "select sum(completed) from payment_webhook_counts";
    assert_eq!(database.query(counted).await.unwrap(), acknowledged.len().to_string());
    nothing_is_left_in_transaction(&database).await;
    ledger.close().await;
}

#[tokio::test]
async fn tokens_continue_from_the_present_after_a_restore() {
    let (ledger, database) = ledger().await;
    let Decision::Acquired(first) = ledger.claim(claim(&key("evt_1"), "a")).await.unwrap().decision else {
        panic!("held")
    };
    ledger.close().await;
    // A backup from long ago, brought back into another server: an old sequence, another identity.
    let mut admin = database.connect().await.unwrap();
    sqlx::query("select setval('oncegate_fencing_token', 1000)").execute(&mut admin).await.unwrap();
    sqlx::query("update oncegate_meta set value = 'another:00000001:1' where key = 'database_identity'")
        .execute(&mut admin)
        .await
        .unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    let Decision::Acquired(second) = ledger.claim(claim(&key("evt_2"), "a")).await.unwrap().decision else {
        panic!("held")
    };
    assert!(second.fencing_token > first.fencing_token, "{second:?} after {first:?}");
    ledger.close().await;
}

#[tokio::test]
async fn a_schema_that_does_not_fit_is_a_clear_refusal() {
    let database = Database::create_empty().await.unwrap();
    let refusal = |result: Result<PostgresLedger, OpenError>| match result {
        Ok(_) => panic!("opened"),
        Err(error) => error.to_string(),
    };
    let settings = PostgresSettings::default();
    let error = refusal(PostgresLedger::connect(database.url(), &settings).await);
    assert!(error.contains("version 0") && error.contains("oncegate migrate"), "{error}");
    let newer = Database::create().await.unwrap();
    make_newer(&newer).await;
    // Neither its word nor its silence permits it.
    for statement in [
        "update oncegate_meta set value = '999' where key = 'schema_compatible_from'",
        "delete from oncegate_meta where key = 'schema_compatible_from'",
    ] {
        sqlx::query(statement).execute(&mut newer.connect().await.unwrap()).await.unwrap();
        let error = refusal(PostgresLedger::connect(newer.url(), &settings).await);
        assert!(error.contains("999"), "{error}");
        assert!(postgres::migrate::run(newer.url()).await.is_err());
        assert!(postgres::check(newer.url()).await.is_err());
    }
}

// A completion would be refused for a character of its result, for ever.
#[tokio::test]
async fn a_database_that_cannot_keep_all_text_is_refused_before_anything_is_made_in_it() {
    let latin = Database::create_in("LATIN1").await.unwrap();
    let refusals = [
        postgres::migrate::run(latin.url()).await.map(drop).unwrap_err(),
        PostgresLedger::connect(latin.url(), &PostgresSettings::default()).await.map(drop).unwrap_err(),
    ];
    for error in refusals {
        let error = error.to_string();
        assert!(error.contains("LATIN1") && error.contains("UTF8"), "{error}");
    }
    assert_eq!(latin.query("select count(*) from pg_tables where schemaname = 'public'").await.unwrap(), "0");
    // Where bytes are kept as they come, all text is.
    let bytes = Database::create_in("SQL_ASCII").await.unwrap();
    postgres::migrate::run(bytes.url()).await.unwrap();
    let ledger = PostgresLedger::connect(bytes.url(), &PostgresSettings::default()).await.unwrap();
    let given = Claim { holder: "größer €".into(), ..claim(&key("evt"), "a") };
    assert_eq!(ledger.claim(given).await.unwrap().event.latest.unwrap().holder, "größer €");
    let kept = ledger.history_of(key("evt")).await.unwrap().unwrap().event;
    assert_eq!(kept.latest.unwrap().holder, "größer €");
    ledger.close().await;
}

/// A role that may not read what migrations were applied is told that, and not that a migration failed.
#[tokio::test]
async fn a_role_without_rights_is_told_of_the_right_that_it_lacks() {
    let database = Database::create().await.unwrap();
    let mut admin = database.connect().await.unwrap();
    let role = format!("{}_poor", database.name());
    for sql in [format!("create role {role} login password 'poor'"), format!("grant usage on schema public to {role}")]
    {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut admin).await.unwrap();
    }
    let (_, place) = database.url().split_once("://").unwrap();
    let place = place.split_once('@').map_or(place, |(_, place)| place);
    let error = postgres::check(&format!("postgres://{role}:poor@{place}")).await.unwrap_err();
    let drop_role = format!("drop owned by {role}; drop role {role}");
    sqlx::raw_sql(AssertSqlSafe(drop_role)).execute(&mut admin).await.unwrap();
    let told = format!("{:#}", anyhow::Error::from(error));
    assert!(told.contains("the state of the schema could not be read") && told.contains("permission denied"), "{told}");
}

/// What a next version's migration would make of the schema: it knows more, and has more.
async fn make_newer(database: &Database) {
    let mut admin = database.connect().await.unwrap();
    for statement in [
        "alter table payment_webhook_events add column colour text",
        "alter table payment_webhook_attempts add column colour text",
        "create table payment_webhook_colours (id bigint primary key)",
        "insert into oncegate_migrations (version, description, success, checksum, execution_time)
        values (999, 'from the future', true, '', 0)",
    ] {
        sqlx::query(statement).execute(&mut admin).await.unwrap();
    }
}

/// A database as the version before there were days left it, and a session in it.
async fn without_days() -> (Database, sqlx::PgConnection) {
    let (before, database) = ledger().await;
    before.close().await;
    let mut admin = database.connect().await.unwrap();
    let sql = "drop function payment_webhook_timings_to_days cascade;
        drop table payment_webhook_timing_days;
        delete from oncegate_migrations where version = 5";
    sqlx::raw_sql(sql).execute(&mut admin).await.unwrap();
    (database, admin)
}

#[tokio::test]
async fn times_from_before_there_were_days_are_summed_by_the_migration() {
    let (database, mut admin) = without_days().await;
    sqlx::raw_sql(
        "insert into payment_webhook_timings
        select h % 2, 'default', 'stripe', to_timestamp(1728000000 + h * 3600), array[3, h % 3 + 5], array[h + 1, 2]
        from generate_series(0, 47) h",
    )
    .execute(&mut admin)
    .await
    .unwrap();
    postgres::migrate::run(database.url()).await.unwrap();
    assert_eq!(postgres::check(database.url()).await.unwrap().differences, []);
    let days =
        "select string_agg(day::date || ' ' || slot || ' ' || buckets::text || counts::text, '; ' order by day, slot)
        from payment_webhook_timing_days";
    assert_eq!(
        database.query(days).await.unwrap(),
        "2024-10-04 0 {3,5,6,7}{144,8,8,8}; 2024-10-04 1 {3,5,6,7}{156,8,8,8}; \
        2024-10-05 0 {3,5,6,7}{432,8,8,8}; 2024-10-05 1 {3,5,6,7}{444,8,8,8}"
    );
}

/// During a roll-out the version before is at work while the schema is brought up to date.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_time_is_missed_that_is_written_while_days_are_summed() {
    let (database, mut admin) = without_days().await;
    // Enough to sum for many to be written meanwhile.
    sqlx::raw_sql(
        "insert into payment_webhook_timings
        select 1, 'default', 'stripe', to_timestamp(1728000000 + h * 3600), buckets, counts
        from generate_series(0, 1500) h,
            (select array_agg(b::smallint) as buckets, array_agg(b::bigint) as counts from generate_series(1, 100) b) t",
    )
    .execute(&mut admin)
    .await
    .unwrap();
    let ended = tokio_util::sync::CancellationToken::new();
    let written = Arc::new(AtomicU32::new(0));
    let writers: Vec<_> = (2..4)
        .map(|slot| {
            let (ended, written, url) = (ended.clone(), Arc::clone(&written), database.url().to_owned());
            tokio::spawn(async move {
                let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
                while !ended.is_cancelled() {
                    sqlx::query(
                        "insert into payment_webhook_timings as t
                        values ($1, 'default', 'stripe', to_timestamp(1728000000), '{7}', '{1}')
                        on conflict (slot, tenant, provider, hour) do update set counts = array[t.counts[1] + 1]",
                    )
                    .bind(slot)
                    .execute(&mut connection)
                    .await
                    .unwrap();
                    written.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let some_more = async |what: &str| {
        let before = written.load(Ordering::Relaxed);
        eventually(what, async || (written.load(Ordering::Relaxed) > before + 20).then_some(())).await;
    };
    some_more("times written before the migration").await;
    postgres::migrate::run(database.url()).await.unwrap();
    some_more("times written after the migration").await;
    ended.cancel();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(postgres::check(database.url()).await.unwrap().differences, []);
}

#[tokio::test]
async fn an_older_version_works_on_a_newer_schema_that_says_it_may() {
    let (before, database) = ledger().await;
    let life = async |ledger: &PostgresLedger, name: &str| {
        let first = key(&format!("evt_{name}"));
        let Decision::Acquired(lock) = ledger.claim(claim(&first, "a")).await.unwrap().decision else { panic!("held") };
        ledger.mark(failure(&first, &lock, FailureKind::Retryable)).await.unwrap();
        let Decision::Acquired(lock) = ledger.claim(claim(&first, "b")).await.unwrap().decision else { panic!("held") };
        let marked = ledger.mark(completion(&first, &lock)).await.unwrap();
        assert_eq!(marked.event.state, State::Completed);
        let again = ledger.claim(claim(&first, "c")).await.unwrap();
        assert!(matches!(again.decision, Decision::AlreadyCompleted), "{again:?}");
        let history = ledger.history_of(first).await.unwrap().unwrap();
        assert_eq!(history.attempts.len(), 2, "{history:?}");
    };
    life(&before, "before").await;
    // The program that runs meanwhile has prepared its statements on the schema as it was.
    make_newer(&database).await;
    life(&before, "meanwhile").await;
    before.close().await;
    // One that starts then, as on the way back from a roll-out.
    let done = postgres::migrate::run(database.url()).await.unwrap();
    assert_eq!((done.from, done.to), (999, 999), "nothing to do");
    let after = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    life(&after, "after").await;
    after.close().await;
    assert_eq!(postgres::check(database.url()).await.unwrap().differences, []);
}

// T01
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_go_away_leave_no_transaction_and_no_lost_mark() {
    let (ledger, database) = ledger().await;
    let ledger = std::sync::Arc::new(ledger);
    let mut kept = Vec::new();
    for number in 0..500 {
        let key = key(&format!("evt_{number}"));
        let request = Claim { lock_duration: super::MINUTE, ..claim(&key, "a") };
        let asked = tokio::spawn({
            let (ledger, request) = (ledger.clone(), request.clone());
            async move { ledger.claim(request).await }
        });
        // Somewhere on its way.
        for _ in 0..number % 7 {
            tokio::task::yield_now().await;
        }
        asked.abort();
        drop(asked.await);
        if number % 10 == 0 {
            let Decision::Acquired(lock) = ledger.claim(request).await.unwrap().decision else { panic!("held") };
            let marked = tokio::spawn({
                let (ledger, mark) = (ledger.clone(), completion(&key, &lock));
                async move { ledger.mark(mark).await }
            });
            tokio::task::yield_now().await;
            marked.abort();
            drop(marked.await);
            kept.push((key, lock));
        }
    }
    for (key, lock) in kept {
        // From outside: a mark that was queued is never dropped; one that was not yet is accepted now.
        let marked = ledger.mark(completion(&key, &lock)).await.unwrap();
        assert_eq!(marked.event.state, State::Completed);
    }
    nothing_is_left_in_transaction(&database).await;
    ledger.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_that_take_long_keep_nobody_from_asking_whether_the_server_answers() {
    let (ledger, database) = ledger().await;
    let mut outsider = database.connect().await.unwrap();
    let mut held = outsider.begin().await.unwrap();
    sqlx::query("lock table payment_webhook_counts").execute(&mut *held).await.unwrap();
    let lists = futures::future::join_all((0..16).map(|_| ledger.stats(everything())));
    let checked = async {
        let waiting = "(select count(*) from pg_stat_activity
            where datname = current_database() and cardinality(pg_blocking_pids(pid)) > 0)";
        eventually("all that there are connections for wait", async || {
            (database.query(waiting).await.unwrap() == "4").then_some(())
        })
        .await;
        ledger.check().await.unwrap();
        assert_eq!(ledger.peek(vec![key("evt")]).await.unwrap(), []);
        held.rollback().await.unwrap();
    };
    let (answers, ()) = tokio::join!(lists, checked);
    for answer in answers {
        // Or it has waited for a connection for too long.
        assert!(matches!(answer, Ok(_) | Err(Error::Unavailable { .. })), "{answer:?}");
    }
    ledger.close().await;
}
