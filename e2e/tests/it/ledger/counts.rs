//! What is counted in memory and written each second, when its connection is in trouble: grants do not wait for it, and
//! counts are kept (L2).

use std::time::{Duration, Instant};

use futures::future::join_all;
use oncegate_e2e::{
    eventually,
    postgres::{Cluster, Database, Options},
    proxy::{Link, Proxy},
};
use oncegate_sidecar::{
    event::{Decision, Key},
    ledger::{
        Ledger,
        postgres::{PostgresLedger, PostgresSettings},
    },
};

use super::{claim, completion, key};

/// A ledger that reaches its database through a proxy.
pub(super) struct Reached {
    pub(super) ledger: PostgresLedger,
    pub(super) proxy: Proxy,
    pub(super) database: Database,
    pub(super) _cluster: Cluster,
}

pub(super) async fn through_a_proxy() -> Reached {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let proxy = Proxy::start(cluster.address()).await.unwrap();
    let url = format!("postgres://postgres@{}/{}", proxy.address(), database.name());
    let ledger = PostgresLedger::connect(&url, &PostgresSettings::default()).await.unwrap();
    Reached { ledger, proxy, database, _cluster: cluster }
}

/// Waits until so many duplicates have been written.
async fn written(database: &Database, duplicates: i64) {
    let sum = "(select sum(duplicate_count) from payment_webhook_events)";
    eventually(&format!("{duplicates} duplicates are written"), async || {
        (database.query(sum).await.unwrap() == duplicates.to_string()).then_some(())
    })
    .await;
}

async fn sessions(database: &Database) -> String {
    let sessions = "(select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'oncegate-counts')";
    database.query(sessions).await.unwrap()
}

// L2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_grant_waits_for_counts_that_cannot_be_written() {
    let Reached { ledger, proxy, database, _cluster } = through_a_proxy().await;
    let known = key("evt_0");
    ledger.claim(claim(&known, "a")).await.unwrap();
    // The writer's connection stands. That of the counts is made when there are some, and cannot be.
    proxy.set(Link::Refuse);
    // So many that calls would wait for those who write.
    for number in 0..40_000 {
        ledger.count_duplicate(&key(&format!("evt_{number}")));
    }
    let (mut number, grants) = (0, 20);
    eventually("grants follow each other without a wait", async || {
        let begun = Instant::now();
        for _ in 0..grants {
            number += 1;
            let claimed = ledger.claim(claim(&key(&format!("new_{number}")), "a")).await.unwrap();
            assert!(matches!(claimed.decision, Decision::Acquired(_)), "{:?}", claimed.decision);
        }
        // Half of what they would take if each waited.
        (begun.elapsed() < grants * Duration::from_millis(25)).then_some(())
    })
    .await;
    proxy.set(Link::Up);
    written(&database, 1).await;
    ledger.close().await;
}

// L2: times and counts are in tables of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_that_cannot_be_written_hold_up_no_counts() {
    let database = Database::create().await.unwrap();
    let ledger = PostgresLedger::connect(database.url(), &PostgresSettings::default()).await.unwrap();
    let mut outsider = database.connect().await.unwrap();
    sqlx::raw_sql("begin; lock table payment_webhook_timings in share mode").execute(&mut outsider).await.unwrap();
    // Each has a time of its own: waited for one by one they take longer than anybody waits here.
    let tenants = 300;
    join_all((0..tenants).map(async |number| {
        let key = Key { tenant: format!("tenant_{number}"), ..key("evt_1") };
        let Decision::Acquired(lock) = ledger.claim(claim(&key, "a")).await.unwrap().decision else { panic!("held") };
        ledger.mark(completion(&key, &lock)).await.unwrap();
    }))
    .await;
    let known = Key { tenant: "tenant_0".into(), ..key("evt_1") };
    for round in 1..=3 {
        assert_eq!(ledger.claim(claim(&known, "b")).await.unwrap().decision, Decision::AlreadyCompleted);
        written(&database, round).await;
    }
    // What could not be written was kept.
    sqlx::raw_sql("rollback").execute(&mut outsider).await.unwrap();
    ledger.close().await;
    let times = "(select sum(count) from payment_webhook_timings cross join lateral unnest(counts) count)";
    assert_eq!(database.query(times).await.unwrap(), tenants.to_string());
}

// L2: whatever stands between forgets connections that are silent, and tells nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_survive_a_connection_that_died_while_there_was_nothing_to_write() {
    let Reached { ledger, proxy, database, _cluster } = through_a_proxy().await;
    let known = key("evt_1");
    ledger.claim(claim(&known, "a")).await.unwrap();
    for round in 1..=3 {
        ledger.count_duplicate(&known);
        written(&database, round).await;
        proxy.reset();
        // Nor is it made anew before there is something to write.
        eventually("its session has ended", async || (sessions(&database).await == "0").then_some(())).await;
    }
    ledger.close().await;
}
