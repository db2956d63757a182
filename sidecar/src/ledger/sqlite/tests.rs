//! What only this ledger has: the file, its lock, its schema, its batches. What both have is in the conformance suite.

mod apart;
mod cleanup;

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use rusqlite::params;
use tempfile::TempDir;

use super::*;
use crate::{
    event::{
        Decision, Ending, FailureKind, FencingToken, KeyDigest, Micros, Resolved, StoredResult,
        fixture::{claim, key},
    },
    ledger::queue::Reply,
};

fn settings() -> SqliteSettings {
    SqliteSettings { migrate: true, busy_timeout: Duration::from_millis(20), ..SqliteSettings::default() }
}

fn file() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("oncegate.db");
    (directory, path)
}

fn completion(event_id: &str, fencing_token: FencingToken) -> Mark {
    Mark {
        key: key(event_id),
        fencing_token,
        claim_id: None,
        ending: Ending::Completed { metadata: None },
        result: None,
        attempts_max: None,
    }
}

async fn acquire(ledger: &SqliteLedger, event_id: &str) -> Lock {
    match ledger.claim(claim(event_id, "claim")).await.unwrap().decision {
        Decision::Acquired(lock) => lock,
        other => panic!("{other:?}"),
    }
}

/// Completes an event and replays it; as caches are told of it.
async fn replay(ledger: &SqliteLedger, event_id: &str) -> (KeyDigest, FencingToken) {
    let lock = acquire(ledger, event_id).await;
    ledger.mark(completion(event_id, lock.fencing_token)).await.unwrap();
    let event = ledger.resolve(resolution(event_id, true)).await.unwrap();
    (KeyDigest::of(&event.key), event.fencing_token)
}

fn resolution(event_id: &str, force: bool) -> Resolve {
    Resolve {
        key: key(event_id),
        fencing_token: None,
        to: Resolved::Pending,
        force,
        reason: "checked by hand".into(),
        actor: "amara".into(),
        result: None,
    }
}

/// Another program's connection.
fn shell(path: &Path) -> Connection {
    let shell = Connection::open(path).unwrap();
    shell.busy_timeout(Duration::from_secs(5)).unwrap();
    shell
}

fn refusal(path: &Path, settings: &SqliteSettings) -> OpenError {
    match SqliteLedger::open(path, settings) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

// === the file ===

#[test]
fn the_library_is_new_enough() {
    assert!(rusqlite::version_number() >= LIBRARY_VERSION_MIN, "{}", rusqlite::version());
}

#[test]
fn every_commit_waits_for_the_disk() {
    let (_directory, path) = file();
    let database = Database::open(&path, true, Duration::ZERO).unwrap();
    let pragma = |name| database.conn.pragma_query_value(None, name, |row| row.get::<_, String>(0));
    assert_eq!(pragma("journal_mode").unwrap(), "wal");
    let synchronous: i64 = database.conn.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
    assert_eq!(synchronous, 2, "full");
}

#[tokio::test]
async fn a_second_opener_is_refused_by_any_name_of_the_file() {
    let (directory, path) = file();
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    let dotted = directory.path().join(".").join("oncegate.db");
    let link = directory.path().join("link.db");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for name in [path.clone(), dotted, link] {
        let error = refusal(&name, &settings());
        let OpenError::InUse { lock, .. } = &error else { panic!("{error:?}") };
        assert!(lock.ends_with("oncegate.db.lock"), "{lock:?}");
        assert!(error.to_string().contains("oncegate.db.lock"), "{error}");
        assert!(matches!(SqliteLedger::migrate(&name), Err(OpenError::InUse { .. })));
    }
    // A file of two names, or mounted alone elsewhere: there is another file beside it.
    let elsewhere = tempfile::tempdir().unwrap();
    let second = elsewhere.path().join("second.db");
    fs::hard_link(&path, &second).unwrap();
    assert!(matches!(refusal(&second, &settings()), OpenError::InUse { .. }));
    assert!(matches!(SqliteLedger::migrate(&second), Err(OpenError::InUse { .. })));
    // Once it says that it is closed, it is.
    ledger.close().await;
    SqliteLedger::open(&path, &settings()).unwrap().close().await;
    SqliteLedger::open(&second, &settings()).unwrap().close().await;
}

#[tokio::test]
async fn files_that_are_made_are_their_owners_alone_and_others_keep_their_mode() {
    let (directory, path) = file();
    let modes = || {
        let names = ["oncegate.db", "oncegate.db-wal", "oncegate.db-shm", "oncegate.db.lock"];
        names.map(|name| fs::metadata(directory.path().join(name)).unwrap().permissions().mode() & 0o777)
    };
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    acquire(&ledger, "evt_1").await;
    assert_eq!(modes(), [0o600; 4]);
    ledger.close().await;
    for name in ["oncegate.db", "oncegate.db.lock"] {
        fs::set_permissions(directory.path().join(name), Permissions::from_mode(0o640)).unwrap();
    }
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    acquire(&ledger, "evt_2").await;
    assert_eq!(modes(), [0o640; 4]);
    ledger.close().await;
}

#[tokio::test]
async fn a_ledger_that_is_dropped_lets_go_of_the_file() {
    let (_directory, path) = file();
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    let lock = acquire(&ledger, "evt_1").await;
    drop(ledger);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let ledger = loop {
        match SqliteLedger::open(&path, &settings()) {
            Ok(ledger) => break ledger,
            Err(OpenError::InUse { .. }) if std::time::Instant::now() < deadline => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(!ledger.mark(completion("evt_1", lock.fencing_token)).await.unwrap().repeated);
    ledger.close().await;
}

#[tokio::test]
async fn a_restart_loses_nothing_and_goes_back_in_nothing() {
    let (_directory, path) = file();
    let (mut token, mut time) = (FencingToken::NONE, Time(0));
    for start in 0..5 {
        let ledger = SqliteLedger::open(&path, &settings()).unwrap();
        assert!(ledger.now().await.unwrap() >= time, "the clock");
        let lock = acquire(&ledger, &format!("evt_{start}")).await;
        assert!(lock.fencing_token > token, "{} after {token}", lock.fencing_token);
        token = lock.fencing_token;
        // Counted in memory, and written when it closes.
        for _ in 0..3 {
            ledger.claim(claim(&format!("evt_{start}"), "other")).await.unwrap();
        }
        ledger.mark(completion(&format!("evt_{start}"), token)).await.unwrap();
        ledger.close().await;
        let kept: (i64, i64) = shell(&path)
            .query_row("select fencing_token, clock_time from oncegate_counter", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .unwrap();
        assert!(kept.0 >= token.0);
        time = Time(kept.1);
    }
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    for start in 0..5 {
        let event = ledger.history_of(key(&format!("evt_{start}"))).await.unwrap().unwrap().event;
        assert_eq!((event.state, event.duplicate_count), (State::Completed, 3));
    }
    ledger.close().await;
}

// T11
#[tokio::test]
async fn neither_tokens_nor_times_go_back_when_the_clock_was_set_back() {
    let (_directory, path) = file();
    SqliteLedger::open(&path, &settings()).unwrap().close().await;
    let ahead = Clock::from(Time(0)).now().plus(Micros::HOUR).0;
    shell(&path).execute("update oncegate_counter set fencing_token = ?1, clock_time = ?1", params![ahead]).unwrap();
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    let lock = acquire(&ledger, "evt_1").await;
    assert!(lock.fencing_token.0 > ahead);
    let event = ledger.history_of(key("evt_1")).await.unwrap().unwrap().event;
    assert!(event.create_time.0 >= ahead);
    ledger.close().await;
}

#[tokio::test]
async fn cleanup_counts_its_days_from_the_machines_clock_when_that_was_set_back() {
    let (_directory, path) = file();
    SqliteLedger::open(&path, &settings()).unwrap().close().await;
    let machine = Clock::from(Time(0));
    let ahead = machine.now().plus(Micros(40 * Micros::DAY.0)).0;
    shell(&path).execute("update oncegate_counter set clock_time = ?1", params![ahead]).unwrap();
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    assert!(ledger.now().await.unwrap().0 >= ahead);
    assert!(ledger.cleanup_now().await.unwrap() <= machine.now());
    ledger.close().await;
}

#[tokio::test]
async fn a_file_that_came_back_from_a_backup_does_not_repeat_tokens() {
    let (_directory, path) = file();
    SqliteLedger::open(&path, &settings()).unwrap().close().await;
    let old = Clock::from(Time(0)).now().minus(Micros::HOUR).0;
    shell(&path).execute("update oncegate_counter set fencing_token = ?1, clock_time = ?1", params![old]).unwrap();
    let before = Clock::from(Time(0)).now().0;
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    assert!(acquire(&ledger, "evt_1").await.fencing_token.0 > before);
    ledger.close().await;
}

// === the schema ===

#[test]
fn a_schema_that_does_not_fit_is_refused() {
    let (directory, path) = file();
    let plain = SqliteSettings { migrate: false, ..settings() };
    let needed = migrate::needed();
    let error = refusal(&path, &plain);
    assert!(matches!(error, OpenError::Behind { found: 0, needed: found, .. } if found == needed), "{error:?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "and nothing was made");

    assert_eq!(SqliteLedger::migrate(&path).unwrap(), Migrated { from: 0, to: needed });
    assert_eq!(SqliteLedger::migrate(&path).unwrap(), Migrated { from: needed, to: needed });

    let newer = newer(&path);
    for compatible_from in [(needed + 1).to_string(), "not a number".to_owned()] {
        newer.execute(COMPATIBLE_FROM, [compatible_from]).unwrap();
        for settings in [plain.clone(), settings()] {
            let error = refusal(&path, &settings);
            let OpenError::Ahead { found, known, compatible_from, .. } = error else { panic!("{error:?}") };
            assert_eq!((found, known, compatible_from), (needed + 1, needed, needed + 1));
        }
        assert!(matches!(check(&path), Err(OpenError::Ahead { .. })));
    }

    let foreign = directory.path().join("foreign.db");
    shell(&foreign).execute_batch("create table orders (id integer)").unwrap();
    assert!(matches!(refusal(&foreign, &settings()), OpenError::Foreign { .. }));
    assert!(matches!(check(&foreign), Err(OpenError::Foreign { .. })));

    let text = directory.path().join("text.db");
    fs::write(&text, "not a database, but long enough to be taken for one at first sight".repeat(100)).unwrap();
    assert!(matches!(refusal(&text, &settings()), OpenError::Open { .. }));

    let nowhere = directory.path().join("absent").join("oncegate.db");
    assert!(matches!(refusal(&nowhere, &settings()), OpenError::Lock { .. }));
}

/// A schema that the next version would make: it knows more, and has more.
fn newer(path: &Path) -> Connection {
    let shell = shell(path);
    shell
        .execute_batch(
            "alter table payment_webhook_events add column colour text; \
             create table payment_webhook_colours (id integer primary key) strict;",
        )
        .unwrap();
    shell.pragma_update(None, "user_version", migrate::needed() + 1).unwrap();
    shell
}

#[test]
fn times_from_before_there_were_days_are_summed_by_the_migration() {
    let (_directory, path) = file();
    SqliteLedger::migrate(&path).unwrap();
    let shell = shell(&path);
    // As the version before left it.
    shell
        .execute_batch(
            "drop trigger payment_webhook_timings_added; drop trigger payment_webhook_timings_changed;
            drop trigger payment_webhook_timings_removed; drop table payment_webhook_timing_days;
            drop index payment_webhook_resolutions_replays;
            pragma user_version = 3;
            insert into payment_webhook_timings values
                ('default', 'stripe', 1728000000000000 - 3600000000, 3, 1), ('default', 'stripe', 1728000000000000, 3, 20),
                ('default', 'stripe', 1728082800000000, 3, 300), ('default', 'stripe', 1728000000000000, 4, 4000)",
        )
        .unwrap();
    assert_eq!(SqliteLedger::migrate(&path).unwrap(), Migrated { from: 3, to: migrate::needed() });
    let days: Vec<(i64, i64, i64)> = shell
        .prepare("select day, bucket, count from payment_webhook_timing_days order by 1, 2")
        .unwrap()
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let day = 1_728_000_000_000_000;
    assert_eq!(days, [(day - 86_400_000_000, 3, 1), (day, 3, 320), (day, 4, 4_000)]);
    assert_eq!(check(&path).unwrap().differences, []);
}

const COMPATIBLE_FROM: &str = "update oncegate_meta set value = ?1 where key = 'schema_compatible_from'";

#[tokio::test]
async fn an_older_version_works_on_a_newer_schema_that_says_it_may() {
    let (_directory, path) = file();
    let needed = migrate::needed();
    SqliteLedger::migrate(&path).unwrap();
    newer(&path).execute(COMPATIBLE_FROM, [needed.to_string()]).unwrap();
    assert_eq!(SqliteLedger::migrate(&path).unwrap(), Migrated { from: needed + 1, to: needed + 1 });
    for settings in [SqliteSettings { migrate: false, ..settings() }, settings()] {
        let ledger = SqliteLedger::open(&path, &settings).unwrap();
        let event_id = format!("evt_{}", settings.migrate);
        let lock = acquire(&ledger, &event_id).await;
        let marked = ledger.mark(completion(&event_id, lock.fencing_token)).await.unwrap();
        assert_eq!(marked.event.state, State::Completed);
        ledger.close().await;
    }
    assert!(check(&path).is_ok());
    let version: i64 = shell(&path).pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(version, needed + 1, "it was left as it is");
}

#[test]
fn an_event_that_breaks_the_rules_cannot_be_stored() {
    let (_directory, path) = file();
    let database = Database::open(&path, true, Duration::ZERO).unwrap();
    let insert = |state: &str, outcome: Option<&str>, claim_id: Option<&str>| {
        database.conn.execute(
            "insert into payment_webhook_events (
                id, tenant, provider, event_id, event_type, state, attempt_count, fencing_token, create_time,
                update_time, outcome, claim_id, holder, start_time, lock_expire_time
            ) values (?1, 'default', 'stripe', ?1, 'paid', ?2, 1, 1, 1, 1, ?3, ?4, ?4, ?5, ?5)",
            params![rand_id(), state, outcome, claim_id, claim_id.map(|_| 1)],
        )
    };
    insert("processing", Some("running"), Some("claim")).unwrap();
    insert("pending", None, None).unwrap();
    for (state, outcome, claim_id) in [
        ("processed", Some("running"), Some("claim")),
        ("completed", Some("done"), Some("claim")),
        ("processing", Some("completed"), Some("claim")),
        ("processing", None, None),
        ("completed", Some("completed"), None),
        ("completed", None, Some("claim")),
    ] {
        let error = insert(state, outcome, claim_id).unwrap_err();
        let code = error.sqlite_error_code();
        assert_eq!(code, Some(rusqlite::ErrorCode::ConstraintViolation), "{state} {outcome:?}: {error}");
    }
}

fn rand_id() -> i64 {
    use std::sync::atomic::{AtomicI64, Ordering};
    static NEXT: AtomicI64 = AtomicI64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

// === the batches ===

/// A writer without its thread, so that a test decides what is in a batch.
fn writer(path: &Path) -> (Queue, Writer) {
    let database = Database::open(path, true, Duration::from_millis(20)).unwrap();
    let clock = Arc::new(Clock::from(database.clock_time));
    let (queue, ops) = Queue::bounded(64, Arc::default());
    let (_, cleanups) = mpsc::channel(1);
    let writer = Writer {
        token: database.fencing_token.max(FencingToken(clock.now().0)),
        clock,
        conn: database.conn,
        tally: Tally::default(),
        metrics: Arc::default(),
        load: Arc::default(),
        faults: Throttle::default(),
        damage: Damage::default(),
        is_ahead: false,
        batch_max: 64,
        ops,
        cleanups,
        _lock: database.lock,
    };
    (queue, writer)
}

/// Changes when another connection has committed something.
fn version(shell: &Connection) -> i64 {
    shell.pragma_query_value(None, "data_version", |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn a_batch_of_duplicates_writes_nothing() {
    let (_directory, path) = file();
    let (_queue, mut writer) = writer(&path);
    let shell = shell(&path);
    let ask = |writer: &mut Writer, claims: Vec<Claim>| {
        let (calls, answers): (Vec<_>, Vec<_>) = claims
            .into_iter()
            .map(|claim| {
                let (reply, answer) = Reply::channel();
                (Op::Claim(claim, reply), answer)
            })
            .unzip();
        writer.calls(calls);
        answers.into_iter().map(|mut answer| answer.try_recv().unwrap().unwrap().decision).collect::<Vec<_>>()
    };
    let before = version(&shell);
    let first = ask(&mut writer, vec![claim("evt_1", "claim")]);
    assert!(matches!(first[..], [Decision::Acquired(_)]), "{first:?}");
    let granted = version(&shell);
    assert_ne!(granted, before);
    // Somebody else may hold the right to write, a backup for instance: duplicates do not need it.
    shell.execute_batch("begin immediate").unwrap();
    let duplicates = ask(&mut writer, vec![claim("evt_1", "other"); 50]);
    assert!(duplicates.iter().all(|decision| matches!(decision, Decision::InProgress { .. })), "{duplicates:?}");
    shell.execute_batch("rollback").unwrap();
    assert_eq!(version(&shell), granted);
    // The counts follow with the flush.
    writer.flush();
    assert_ne!(version(&shell), granted);
    let counted: i64 =
        shell.query_row("select duplicate_count from payment_webhook_events", [], |row| row.get(0)).unwrap();
    assert_eq!(counted, 50);
}

#[tokio::test]
async fn a_file_that_somebody_has_locked_is_unavailable_and_then_is_not() {
    let (_directory, path) = file();
    let (_queue, mut writer) = writer(&path);
    let shell = shell(&path);
    let ask = |writer: &mut Writer, claim_id: &str| {
        let (reply, mut answer) = Reply::channel();
        writer.calls(vec![Op::Claim(claim("evt_1", claim_id), reply)]);
        answer.try_recv().unwrap()
    };
    shell.execute_batch("begin immediate").unwrap();
    assert!(matches!(ask(&mut writer, "claim"), Err(Error::Unavailable { .. })));
    shell.execute_batch("commit").unwrap();
    ask(&mut writer, "claim").unwrap();
    // What could not be written is kept for the next time.
    ask(&mut writer, "other").unwrap();
    shell.execute_batch("begin immediate").unwrap();
    writer.flush();
    shell.execute_batch("commit").unwrap();
    ask(&mut writer, "other").unwrap();
    writer.flush();
    let counted: i64 =
        shell.query_row("select duplicate_count from payment_webhook_events", [], |row| row.get(0)).unwrap();
    assert_eq!(counted, 2);
}

#[tokio::test]
async fn abandoned_claims_are_dropped_and_abandoned_marks_are_done() {
    let (_directory, path) = file();
    let (queue, mut writer) = writer(&path);
    // Asked once, which queues it, and given up.
    async fn abandon<T>(asked: impl Future<Output = T>) {
        let mut asked = std::pin::pin!(asked);
        assert!(futures::poll!(&mut asked).is_pending());
    }
    abandon(queue.ask(|reply| Op::Claim(claim("evt_1", "gone"), reply))).await;
    abandon(queue.ask(|reply| Op::Mark(completion("evt_1", FencingToken(1)), reply))).await;
    queue.flush();
    let first = writer.ops.try_recv().unwrap();
    let batch = writer.batch(first);
    assert!(matches!(batch.calls[..], [Op::Mark(..)]), "{:?}", batch.calls);
    assert!(batch.flush && batch.close.is_none());
}

// L3
#[tokio::test]
async fn a_batch_ends_where_it_has_payload_enough() {
    let (_directory, path) = file();
    let (queue, mut writer) = writer(&path);
    let large = |number: i32| {
        let mut mark = completion(&format!("evt_{number}"), FencingToken(1));
        mark.result = Some(StoredResult { code: 200, body: vec![0; 128 << 10].into(), content_type: String::new() });
        mark
    };
    let mut asked: Vec<_> =
        (0..60).map(|number| Box::pin(queue.ask(move |reply| Op::Mark(large(number), reply)))).collect();
    for asked in &mut asked {
        assert!(futures::poll!(asked).is_pending());
    }
    let mut calls = Vec::new();
    while let Ok(first) = writer.ops.try_recv() {
        calls.push(writer.batch(first).calls.len());
    }
    // 4 MiB and what passes them.
    assert_eq!(calls, [33, 27]);
}

/// As a provider that repeats days of events makes them, which the cache answers.
#[tokio::test]
async fn however_many_events_have_duplicates_their_counts_are_written_by_one_flush_and_at_the_end() {
    let (_directory, path) = file();
    many(&path);
    let (queue, writer) = writer(&path);
    let tally = writer.tally.clone();
    let count = |events: std::ops::RangeInclusive<i32>| {
        for number in events {
            let provider = if (20_001..=25_000).contains(&number) { "paypal" } else { "stripe" };
            tally.duplicate(&Key { provider: provider.into(), ..key(&format!("evt_{number}")) }, None);
        }
    };
    let written = || -> i64 {
        shell(&path).query_row("select sum(duplicate_count) from payment_webhook_events", [], |row| row.get(0)).unwrap()
    };
    count(1..=20_000);
    let writer = thread::spawn(move || writer.run());
    queue.flush();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while tally.is_full() {
        assert!(std::time::Instant::now() < deadline, "{} keys are left", tally.len());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Nobody asks for these to be written.
    count(20_001..=50_000);
    queue.close().await;
    writer.join().unwrap();
    assert_eq!((written(), tally.len()), (50_000, 0));
}

// === reading beside the writer ===

// C7
#[tokio::test]
async fn replays_are_told_once_each_and_those_before_the_opening_not_at_all() {
    let (_directory, path) = file();
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    replay(&ledger, "evt_before").await;
    ledger.close().await;
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    let standing = ledger.standing().borrow().clone().unwrap();
    let read = async |after: Option<&Replayed>| {
        let after = after.map(|earlier| earlier.bookmark.clone().unwrap());
        ledger.replays(&standing, after).await.unwrap()
    };
    // What is cached begins with the opening.
    let none = read(None).await;
    assert_eq!((none.events.as_slice(), none.floor), (&[][..], FencingToken::NONE));
    let first = replay(&ledger, "evt_1").await;
    // Another decision is none: what it is about was not completed.
    let lock = acquire(&ledger, "evt_failed").await;
    let ending = Ending::Failed { kind: FailureKind::Terminal, error: None, retry_after: None };
    ledger.mark(Mark { ending, ..completion("evt_failed", lock.fencing_token) }).await.unwrap();
    ledger.resolve(resolution("evt_failed", false)).await.unwrap();
    let some = read(Some(&none)).await;
    assert_eq!(some.events, [first]);
    let (second, third) = (replay(&ledger, "evt_2").await, replay(&ledger, "evt_3").await);
    let more = read(Some(&some)).await;
    assert_eq!(more.events, [second, third]);
    assert!(read(Some(&more)).await.events.is_empty());
    assert!(none.now < some.now && some.now < more.now, "{none:?} {some:?} {more:?}");
    assert_eq!(read(None).await.events, [first, second, third]);
    ledger.close().await;
}

#[tokio::test]
async fn listings_hold_up_neither_health_nor_what_waiters_and_caches_have_to_know() {
    let (_directory, path) = file();
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    let (digest, token) = replay(&ledger, "evt_1").await;
    let (mut listings, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..settings().readers_max {
        let (begin, begun) = oneshot::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let readers = Arc::clone(&ledger.lists);
        listings.push(tokio::spawn(async move {
            let listing = move |_: &Connection| {
                begin.send(()).unwrap();
                let _let_go = ended.recv();
                Ok(())
            };
            readers.read(listing).await
        }));
        begun.await.unwrap();
        ends.push(end);
    }
    ledger.check().await.unwrap();
    assert_eq!(ledger.peek(vec![key("evt_1")]).await.unwrap(), [(key("evt_1"), State::Pending, token)]);
    let standing = ledger.standing().borrow().clone().unwrap();
    assert_eq!(ledger.replays(&standing, None).await.unwrap().events, [(digest, token)]);
    drop(ends);
    for listing in listings {
        listing.await.unwrap().unwrap();
    }
    ledger.close().await;
}

/// Fills a file with 50,000 events, one each ten seconds. Every 4,000th is of a rare type; some hours have none of stripe's.
fn many(path: &Path) {
    SqliteLedger::migrate(path).unwrap();
    shell(path)
        .execute_batch(
            "insert into payment_webhook_events (
                id, fencing_token, tenant, provider, event_id, event_type, state, attempt_count, create_time, update_time
            )
            with recursive events (n) as (select 1 union all select n + 1 from events where n < 50000)
            select n, n, 'default', case when n between 20001 and 25000 then 'paypal' else 'stripe' end, 'evt_' || n,
                case when n % 4000 = 2001 then 'rare' else 'paid' end, 'pending', 0, n * 10000000, n * 10000000
            from events;
            insert into payment_webhook_counts (tenant, provider, hour, pending)
            select tenant, provider, create_time / 3600000000 * 3600000000, count(*)
            from payment_webhook_events group by 1, 2, 3;",
        )
        .unwrap();
}

/// All pages of a listing, each of which ends after the first part that it has looked at.
fn hurried(conn: &Connection, mut filter: HistoryFilter) -> Vec<Vec<Event>> {
    let mut pages = Vec::new();
    loop {
        let page = read::history(conn, &filter, Duration::ZERO).unwrap();
        pages.push(page.events);
        filter.after = page.next;
        if page.next.is_none() {
            return pages;
        }
    }
}

#[test]
fn a_page_whose_time_is_over_ends_where_it_has_come_to_and_the_next_one_goes_on() {
    let (_directory, path) = file();
    many(&path);
    let conn = shell(&path);
    let rare: Vec<i64> = (0..12).rev().map(|number| number * 4_000 + 2_001).collect();
    let of_stripe: Vec<i64> = rare.iter().copied().filter(|row| !(20_001..=25_000).contains(row)).collect();
    for (provider, rows) in [(None, rare), (Some("stripe".to_owned()), of_stripe)] {
        let filter =
            HistoryFilter { provider, event_type: Some("rare".into()), page_size: 100, ..HistoryFilter::default() };
        let whole = read::history(&conn, &filter, Duration::MAX).unwrap();
        assert_eq!(whole.events.iter().map(|event| event.row.0).collect::<Vec<_>>(), rows);
        assert_eq!(whole.next, None);
        let pages = hurried(&conn, filter.clone());
        // A statement looks at 20,000 rows, and some of those that it ends with are among them.
        assert!((3..=5).contains(&pages.len()) && pages.iter().all(|page| page.len() <= 6), "{pages:?}");
        assert_eq!(pages.concat(), whole.events, "neither gaps nor repeats");
        let pages = hurried(&conn, HistoryFilter { page_size: 2, ..filter.clone() });
        assert!(pages.iter().any(|page| page.len() == 2) && pages.iter().all(|page| page.len() <= 2), "{pages:?}");
        assert_eq!(pages.concat(), whole.events, "nor where some are full");
    }
    let nothing = HistoryFilter { event_type: Some("absent".into()), page_size: 100, ..HistoryFilter::default() };
    let pages = hurried(&conn, nothing);
    assert_eq!((pages.len(), pages.concat().len()), (3, 0));
}
