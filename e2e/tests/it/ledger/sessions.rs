//! The sessions of the Postgres ledger: when they are given up, made anew, and when none may be made.

use oncegate_e2e::{
    eventually,
    postgres::{Cluster, Database, Options},
};
use oncegate_sidecar::{
    event::{Claim, Decision, Key, Micros, State},
    ledger::{
        Error, Ledger,
        filter::{CleanupProgress, CleanupScope},
        postgres::{PostgresLedger, PostgresSettings},
    },
};
use sqlx::{AssertSqlSafe, Connection as _};

use super::{
    claim, completion, connected, key,
    postgres_only::{UNTIL_ONE_WAITS_FOR_US, ledger},
};

/// A whole Cleanup of what has completed until now.
async fn clean_up(ledger: &PostgresLedger) {
    let scope = CleanupScope {
        tenant: None,
        provider: None,
        before: ledger.now().await.unwrap(),
        states: vec![State::Completed],
        dry_run: false,
        batch_size: 1_000,
    };
    let mut progress = CleanupProgress::default();
    while !progress.done {
        ledger.cleanup_step(&scope, &mut progress).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_without_calls_knows_that_its_server_is_gone_and_back() {
    let mut cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    let before = ledger.node().unwrap().identity;
    cluster.stop().unwrap();
    eventually("it knows that the server is gone", async || ledger.node().is_none().then_some(())).await;
    cluster.restart().await.unwrap();
    let after = eventually("it is connected again", async || Some(ledger.node()?.identity)).await;
    assert_ne!(before, after, "a server that was started again is another one");
    ledger.close().await;
}

// L4, I5
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_commit_is_on_the_disk_whatever_the_default_of_the_database_is_or_becomes() {
    // A server that acknowledges before the disk has it, from the start or by a change under a ledger that is connected; and that
    // then misses its standby: who waits for one of them waits for the other.
    for settings in [vec![("synchronous_commit".to_owned(), "off".to_owned())], Vec::new()] {
        let from_the_start = !settings.is_empty();
        let cluster = Cluster::start(Options { settings, ..Options::default() }).await.unwrap();
        let database = cluster.database().await.unwrap();
        let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
        ledger.claim(claim(&key("evt_1"), "a")).await.unwrap();
        let mut admin = database.connect().await.unwrap();
        for sql in [
            "alter system set synchronous_commit = off",
            "alter system set synchronous_standby_names = 'elsewhere'",
            "select pg_reload_conf()",
        ] {
            sqlx::query(sql).execute(&mut admin).await.unwrap();
        }
        let mut number = 0;
        eventually(
            &format!("a claim waits for the standby in vain; off from the start: {from_the_start}"),
            async || {
                number += 1;
                let answer = ledger.claim(claim(&key(&format!("evt_late_{number}")), "a")).await;
                matches!(answer, Err(Error::OutcomeUnknown)).then_some(())
            },
        )
        .await;
        for sql in ["alter system reset synchronous_standby_names", "select pg_reload_conf()"] {
            sqlx::query(sql).execute(&mut admin).await.unwrap();
        }
        ledger.close().await;
    }
}

// L2, L6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_say_how_they_are_isolated_and_when_they_are_ended_whatever_the_defaults_of_the_database() {
    let database = Database::create().await.unwrap();
    let mut admin = database.connect().await.unwrap();
    for (setting, value) in [
        ("default_transaction_isolation", "serializable"),
        ("idle_in_transaction_session_timeout", "0"),
        ("statement_timeout", "0"),
        ("lock_timeout", "0"),
    ] {
        let set = format!("alter database {} set {setting} = '{value}'", database.name());
        sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut admin).await.unwrap();
    }
    // Nobody is told the settings of another session, except by what that session itself writes.
    let watch = "
        create table seen (operation text, settings text[]);
        create function see() returns trigger language plpgsql as $$ begin
            insert into seen
            select lower(tg_op), array_agg(current_setting(s.name) order by s.place)
            from unnest(array['transaction_isolation', 'idle_in_transaction_session_timeout', 'statement_timeout',
                'lock_timeout']) with ordinality as s (name, place);
            return null;
        end $$;
        create trigger see after insert or update or delete on payment_webhook_events
            for each row execute function see()";
    sqlx::raw_sql(watch).execute(&mut admin).await.unwrap();
    let ledger = connected(&database).await;
    let key = key("evt_1");
    let Decision::Acquired(lock) = ledger.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
    ledger.mark(completion(&key, &lock)).await.unwrap();
    clean_up(&ledger).await;
    let seen = "select operation, settings from seen order by operation";
    let seen: Vec<(String, Vec<String>)> = sqlx::query_as(seen).fetch_all(&mut admin).await.unwrap();
    let seen: Vec<(&str, Vec<&str>)> =
        seen.iter().map(|(operation, settings)| (&**operation, settings.iter().map(|s| &**s).collect())).collect();
    let (writing, reading) = (["read committed", "5s", "1s", "500ms"], ["read committed", "5s", "5s", "4s"]);
    // A Cleanup's sessions are those that read.
    assert_eq!(seen, [("delete", reading.to_vec()), ("insert", writing.to_vec()), ("update", writing.to_vec())]);
    ledger.close().await;
}

// L3, L6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_connection_dies_is_run_again_and_answered() {
    let (ledger, database) = ledger().await;
    let key = key("evt_1");
    ledger.claim(Claim { lock_duration: Micros::ZERO, ..claim(&key, "a") }).await.unwrap();
    let mut outsider = database.connect().await.unwrap();
    let mut held = outsider.begin().await.unwrap();
    sqlx::query("select from payment_webhook_events for update").execute(&mut *held).await.unwrap();
    let cut = async {
        sqlx::query(UNTIL_ONE_WAITS_FOR_US).execute(&mut *held).await.unwrap();
        let cut = "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pg_backend_pid() = any (pg_blocking_pids(pid))";
        sqlx::query(cut).execute(&mut *held).await.unwrap();
        held.rollback().await.unwrap();
    };
    let (answer, ()) = tokio::join!(ledger.claim(claim(&key, "b")), cut);
    let claimed = answer.unwrap();
    assert!(matches!(claimed.decision, Decision::Acquired(_)), "{:?}", claimed.decision);
    ledger.close().await;
}

/// A commit that waits for a standby cannot be cancelled, and the server does not notice that its client has gone. Each attempt to
/// connect anew would leave one more session there, until nobody could connect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_standby_leaves_few_sessions_behind() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    let mut admin = database.connect().await.unwrap();
    for sql in ["alter system set synchronous_standby_names = 'elsewhere'", "select pg_reload_conf()"] {
        sqlx::query(sql).execute(&mut admin).await.unwrap();
    }
    let mut refused = 0;
    let mut number = 0;
    eventually("ten claims in a row are refused without a try", async || {
        number += 1;
        let answer = ledger.claim(claim(&key(&format!("evt_{number}")), "a")).await;
        refused = if matches!(answer, Err(Error::Unavailable { .. })) { refused + 1 } else { 0 };
        (refused >= 10).then_some(())
    })
    .await;
    let sessions = "select count(*) from pg_stat_activity where application_name = 'oncegate-writer'";
    let left: i64 = sqlx::query_scalar(sessions).fetch_one(&mut admin).await.unwrap();
    assert!(left <= 4, "{left} sessions of the writer are left");
    for sql in ["alter system reset synchronous_standby_names", "select pg_reload_conf()"] {
        sqlx::query(sql).execute(&mut admin).await.unwrap();
    }
    eventually("claims are granted again", async || ledger.claim(claim(&key("evt_last"), "a")).await.ok()).await;
    ledger.close().await;
}

/// Nobody is told of what a Cleanup deletes and folds that it is durable, and a fold holds counts that writers add to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_step_of_a_cleanup_waits_for_a_standby() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = connected(&database).await;
    let key = key("evt_1");
    let first = Claim { delivery_id: Some("dlv_1".into()), payload_digest: Some([7; 32]), ..claim(&key, "a") };
    let Decision::Acquired(lock) = ledger.claim(first).await.unwrap().decision else { panic!("held") };
    ledger.mark(completion(&key, &lock)).await.unwrap();
    let mut admin = database.connect().await.unwrap();
    // What two sidecars that are gone have left: counts of events that are there, of such that are not, and their times.
    let left = "insert into payment_webhook_counts (slot, tenant, provider, hour, completed)
        select s.slot, s.tenant, 'stripe', date_trunc('hour', now(), 'UTC') - interval '2 days', s.completed
        from (values (5, 'there', 2), (6, 'there', 1), (5, 'gone', 2), (6, 'gone', -2)) as s (slot, tenant, completed);
        insert into payment_webhook_timings (slot, tenant, provider, hour, buckets, counts)
        select 105, 'gone', 'stripe', date_trunc('hour', now(), 'UTC') - interval '2 days', '{509}', '{2}'";
    sqlx::raw_sql(left).execute(&mut admin).await.unwrap();
    for sql in ["alter system set synchronous_standby_names = 'elsewhere'", "select pg_reload_conf()"] {
        sqlx::query(sql).execute(&mut admin).await.unwrap();
    }
    let mut number = 0;
    eventually("a claim waits for the standby in vain", async || {
        number += 1;
        let answer = ledger.claim(claim(&Key { event_id: format!("evt_late_{number}"), ..key.clone() }, "a")).await;
        matches!(answer, Err(Error::OutcomeUnknown)).then_some(())
    })
    .await;
    clean_up(&ledger).await;
    let left = "select concat_ws(', ', (select count(*) from payment_webhook_deliveries),
        (select string_agg(slot || ' ' || tenant || ' ' || completed, ' ') from payment_webhook_counts
            where hour < now() - interval '1 day'),
        (select count(*) from payment_webhook_timings where hour < now() - interval '1 day'),
        (select count(*) from payment_webhook_events where state = 'completed'))";
    assert_eq!(database.query(left).await.unwrap(), "0, 0 there 3, 0, 0");
    for sql in ["alter system reset synchronous_standby_names", "select pg_reload_conf()"] {
        sqlx::query(sql).execute(&mut admin).await.unwrap();
    }
    ledger.close().await;
}

/// What a sweep writes would wait as every other commit does, on one more session each second: only the writer knows whether the
/// node may decide.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_swept_while_the_writer_is_away() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    ledger.claim(Claim { lock_duration: Micros::ZERO, ..claim(&key("evt_1"), "a") }).await.unwrap();
    let mut admin = database.connect().await.unwrap();
    for sql in ["alter system set default_transaction_read_only = on", "select pg_reload_conf()"] {
        sqlx::query(sql).execute(&mut admin).await.unwrap();
    }
    eventually("the writer is away", async || ledger.node().is_none().then_some(())).await;
    // It would be refused.
    ledger.maintain().await.unwrap();
    ledger.close().await;
}

/// Duplicates are read, and would be answered by a node that may decide nothing (L6).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_becomes_read_only_is_noticed_though_only_duplicates_come() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    let held = key("evt_1");
    ledger.claim(claim(&held, "a")).await.unwrap();
    // Until no new events are expected: a statement that could insert one would be refused.
    for _ in 0..32 {
        ledger.claim(claim(&held, "b")).await.unwrap();
    }
    let mut admin = database.connect().await.unwrap();
    for sql in ["alter system set default_transaction_read_only = on", "select pg_reload_conf()"] {
        sqlx::query(sql).execute(&mut admin).await.unwrap();
    }
    eventually("a duplicate is not answered any more", async || {
        let answer = ledger.claim(claim(&held, "b")).await;
        matches!(answer, Err(Error::Unavailable { .. })).then_some(())
    })
    .await;
    assert!(ledger.node().is_none(), "caches do not answer either");
    ledger.close().await;
}
