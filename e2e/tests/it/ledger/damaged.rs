//! A database whose disk is damaged: what one event meets there is that event's alone, and what all meet is an outage (L3).

use futures::future::join_all;
use oncegate_e2e::postgres::{Cluster, Database, Options};
use oncegate_sidecar::{
    event::{Decision, Key, Mark, StoredResult},
    ledger::{Error, Ledger, postgres::PostgresLedger},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{claim, completion, connected, key};

async fn complete(ledger: &PostgresLedger, key: &Key, result: Option<StoredResult>) {
    let Decision::Acquired(lock) = ledger.claim(claim(key, "a")).await.unwrap().decision else { panic!("held") };
    ledger.mark(Mark { result, ..completion(key, &lock) }).await.unwrap();
}

/// Stops the server, overwrites the file of a relation, and starts it.
async fn damage(cluster: &mut Cluster, database: &Database, relation: &str) {
    let file = database.query(&format!("select pg_relation_filepath({relation})")).await.unwrap();
    cluster.stop().unwrap();
    cluster.damage(&file).unwrap();
    cluster.restart().await.unwrap();
}

async fn writer(database: &Database) -> String {
    let writer = "select string_agg(pid::text, ' ') from pg_stat_activity
        where datname = current_database() and application_name = 'oncegate-writer'";
    database.query(writer).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_callers_of_an_event_that_the_database_cannot_read_are_told() {
    let mut cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = connected(&database).await;
    // One that is stored apart from its row, in a file in which nothing else is. It does not compress.
    let mut random = StdRng::seed_from_u64(1);
    let body: Vec<u8> = (0..32 << 10).map(|_| random.random_range(0..=u8::MAX)).collect();
    let result = StoredResult { code: 200, body: body.into(), content_type: String::new() };
    let keys: Vec<Key> = (0..64).map(|number| key(&format!("evt_{number}"))).collect();
    for (number, key) in keys.iter().enumerate() {
        complete(&ledger, key, (number == 17).then(|| result.clone())).await;
    }
    ledger.close().await;
    let apart = "(select reltoastrelid from pg_class where relname = 'payment_webhook_events')";
    damage(&mut cluster, &database, apart).await;
    let ledger = connected(&database).await;
    let before = writer(&database).await;
    for round in 0..3 {
        let answers = join_all(keys.iter().map(|key| ledger.claim(claim(key, "b")))).await;
        for (number, answer) in answers.into_iter().enumerate() {
            match (number, answer) {
                (17, Err(Error::Internal(told))) => assert!(told.contains("XX001"), "{told}"),
                (0..=16 | 18.., Ok(claimed)) => assert_eq!(claimed.decision, Decision::AlreadyCompleted),
                (number, other) => panic!("{round}, {number}: {other:?}"),
            }
        }
    }
    assert_eq!(writer(&database).await, before, "the connection is good, and kept");
    ledger.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_can_read_nothing_is_unavailable_until_it_is_mended() {
    let mut cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let ledger = connected(&database).await;
    complete(&ledger, &key("evt"), None).await;
    ledger.close().await;
    damage(&mut cluster, &database, "'payment_webhook_events_key'").await;
    let ledger = connected(&database).await;
    let answers = join_all((0..256).map(async |number| ledger.claim(claim(&key(&format!("evt_{number}")), "a")).await));
    let (mut alone, mut unavailable) = (0, 0);
    for answer in answers.await {
        match answer {
            Err(Error::Unavailable { .. }) => unavailable += 1,
            // The first call may have been a batch of its own.
            Err(Error::Internal(_)) => alone += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(alone <= 2 && unavailable >= 254, "{alone}, {unavailable}");
    // One after the other, each may be the only one that is damaged, and then no longer.
    let mut answers = Vec::new();
    for number in 0..6 {
        answers.push(ledger.claim(claim(&key(&format!("evt_alone_{number}")), "a")).await);
    }
    for (number, answer) in answers.into_iter().enumerate() {
        let told = matches!(answer, Err(Error::Unavailable { .. })) || number < 2 && answer.is_err();
        assert!(told, "{number}: {answer:?}");
    }
    let mended = sqlx::query("reindex index payment_webhook_events_key");
    mended.execute(&mut database.connect().await.unwrap()).await.unwrap();
    complete(&ledger, &key("evt_after"), None).await;
    assert_eq!(ledger.claim(claim(&key("evt"), "b")).await.unwrap().decision, Decision::AlreadyCompleted);
    ledger.close().await;
}
