//! Large tables: what is rare is found without reading what lies between, and Cleanups get along with each other.

use std::sync::Arc;

use oncegate_e2e::{
    eventually,
    grow::{Growth, fill},
    postgres::{Cluster, Options},
};
use oncegate_sidecar::{
    event::{Event, Micros, State},
    ledger::{
        Ledger,
        filter::{CleanupProgress, CleanupScope, HistoryFilter, StatsFilter},
        postgres::{self, PostgresLedger, PostgresSettings},
    },
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::{
    Fixture, claim, key,
    postgres_only::UNTIL_ONE_WAITS_FOR_US,
    stats::{everything, total},
};

const ROWS: i64 = 60_000;

pub(super) struct Grown {
    pub(super) database: oncegate_e2e::postgres::Database,
    // Its own: what is read is counted for a whole table.
    _cluster: Cluster,
}

pub(super) async fn grown() -> Grown {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let mut connection = database.connect().await.unwrap();
    fill(&mut connection, Growth { rows: ROWS, days: 10, rare: 20_000 }).await.unwrap();
    sqlx::raw_sql("vacuum analyze payment_webhook_events").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    Grown { database, _cluster: cluster }
}

impl Grown {
    /// A session to ask for what others have read: each reports that when it ends, and has ended by now.
    async fn alone(&self) -> PgConnection {
        let mut connection = self.database.connect().await.unwrap();
        eventually("all sessions have ended", async || {
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
        connection
    }

    /// Rows of a table that were read so far.
    async fn read(&self, table: &str) -> i64 {
        sqlx::query_scalar(
            "select (coalesce(idx_tup_fetch, 0) + seq_tup_read)::bigint from pg_stat_user_tables
            where relname = $1",
        )
        .bind(table)
        .fetch_one(&mut self.alone().await)
        .await
        .unwrap()
    }

    /// Blocks of the indexes of the events' table that were read so far.
    pub(super) async fn index_blocks(&self) -> i64 {
        sqlx::query_scalar(
            "select sum(idx_blks_read + idx_blks_hit)::bigint from pg_statio_user_tables
            where relname = 'payment_webhook_events'",
        )
        .fetch_one(&mut self.alone().await)
        .await
        .unwrap()
    }

    /// How many rows of the events' table a ledger reads for a query.
    pub(super) async fn reads<T>(&self, query: impl AsyncFnOnce(&PostgresLedger) -> T) -> (T, i64) {
        self.reads_of("payment_webhook_events", query).await
    }

    /// The same, of another table.
    pub(super) async fn reads_of<T>(&self, table: &str, query: impl AsyncFnOnce(&PostgresLedger) -> T) -> (T, i64) {
        let before = self.read(table).await;
        let ledger = self.ledger().await;
        let answer = query(&ledger).await;
        ledger.close().await;
        drop(ledger);
        (answer, self.read(table).await - before)
    }

    pub(super) async fn ledger(&self) -> PostgresLedger {
        PostgresLedger::connect(self.database.url(), &PostgresSettings::default()).await.unwrap()
    }
}

/// As many events as one page has room for, and how many pages they took: on a slow machine one ends early, for its time is over.
async fn listed(ledger: &PostgresLedger, filter: &HistoryFilter) -> (Vec<Event>, i64) {
    let (mut events, mut filter, mut pages) = (Vec::new(), filter.clone(), 0);
    loop {
        let page = ledger.history(filter.clone()).await.unwrap();
        events.extend(page.events);
        pages += 1;
        filter.after = page.next;
        if filter.after.is_none() || events.len() >= filter.page_size {
            return (events, pages);
        }
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
        let ((events, pages), read) = grown.reads(async |ledger| listed(ledger, &filter).await).await;
        assert_eq!(events.len(), found, "{filter:?}");
        // Twice: the boundary is looked for after it. A page that took its time ends early, and the next one looks again.
        assert!(read <= 2 * (hours + pages - 1) * (hour + 2) + 120, "{read} rows were read for {filter:?}");
    }
    let (report, read) = grown.reads(async |ledger| ledger.stats(everything()).await.unwrap()).await;
    let stuck: i64 = report.counts.values().map(|counts| counts.stuck).sum();
    assert!(stuck > 0 && read <= 4 * stuck + 4, "{read} rows were read to count {stuck} that are stuck");
}

/// Counts and times of all tenants lie together, hour by hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stats_and_history_of_one_tenant_read_nothing_of_the_others() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let database = cluster.database().await.unwrap();
    let (tenants, hours, days) = (400, 48, 2);
    let filled = "
        insert into payment_webhook_counts (slot, tenant, provider, hour, completed)
        select 1, 'tenant_' || t, 'stripe', date_trunc('day', now(), 'UTC') - h * interval '1 hour', 1
        from generate_series(1, 400) t, generate_series(1, 48) h;
        insert into payment_webhook_timings (slot, tenant, provider, hour, buckets, counts)
        select slot, tenant, provider, hour, '{509}', '{1}' from payment_webhook_counts;
        analyze";
    sqlx::raw_sql(filled).execute(&mut database.connect().await.unwrap()).await.unwrap();
    let grown = Grown { database, _cluster: cluster };
    let of = || Some("tenant_7".to_owned());
    for (table, most) in [
        // Once for each of Stats, with buckets and without, and once for History.
        ("payment_webhook_counts", 3 * hours),
        ("payment_webhook_timings", hours),
        ("payment_webhook_timing_days", days),
    ] {
        let ((), read) = grown
            .reads_of(table, async |ledger| {
                let whole = StatsFilter { tenant: of(), ..everything() };
                let bucketed = StatsFilter { bucket: Some(Micros::HOUR), ..whole.clone() };
                for filter in [whole, bucketed] {
                    assert_eq!(total(&ledger.stats(filter).await.unwrap()).total(), hours);
                }
                let filter = HistoryFilter { tenant: of(), states: vec![State::Dead], ..listing() };
                assert!(ledger.history(filter).await.unwrap().events.is_empty());
            })
            .await;
        assert!(read > 0 && read <= most, "{read} rows of {table} were read for one of {tenants} tenants");
    }
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

/// Where events take longer than two seconds each is noted: what is no longer open is forgotten as fast as it was noted, or Stats
/// reads more and more of it (L5).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_longer_open_is_forgotten_faster_than_a_sweep_notes_it() {
    let fixture = Fixture::postgres().await;
    fixture.expired(&key("stuck"), "claim").await;
    fixture.tamper("insert into payment_webhook_open select n from generate_series(1000000, 1059999) n").await;
    let sql = "select count(*) from payment_webhook_open where event_row >= 1000000";
    let mut left: Vec<i64> = Vec::new();
    for _ in 0..2 {
        fixture.ledger.maintain().await.unwrap();
        left.push(sqlx::query_scalar(sql).fetch_one(&mut fixture.connect().await).await.unwrap());
    }
    assert!(left[0] <= 20_000 && left[1] == 0, "{left:?}");
    assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap()).stuck, 1);
    fixture.close().await;
}

/// The database's clock was ahead by an hour, and has been set right: what is created now is noted although the sweep had come
/// further, and what was created ahead of time is noted once, not read by each Stats until that time comes (L5).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_noted_after_the_clock_of_the_database_has_gone_back() {
    let fixture = Fixture::postgres().await;
    fixture
        .tamper(
            "create table made as
            select t.at, n
            from (values (1, clock_timestamp() - interval '5 seconds'), (2, clock_timestamp() + interval '50 minutes')) t (n, at);
            insert into payment_webhook_events (
                fencing_token, create_time, update_time, start_time, lock_expire_time, attempt_count, state, outcome,
                tenant, provider, event_id, event_type, claim_id, holder
            )
            select n, at, at, at, at - interval '2 hours', 1, 'processing', 'running', 'default', 'stripe', 'open_' || n, 'paid',
                'a', 'pod-1'
            from made;
            insert into payment_webhook_counts (slot, tenant, provider, hour, processing)
            select 0, 'default', 'stripe', date_trunc('hour', at, 'UTC'), count(*) from made group by 4;
            update payment_webhook_sweep set swept_until = clock_timestamp() + interval '1 hour'",
        )
        .await;
    let mut connection = fixture.connect().await;
    let mut noted = async || {
        let sql = "select coalesce(array_agg(e.event_id order by e.event_id), '{}')
            from payment_webhook_open o join payment_webhook_events e on e.id = o.event_row";
        let noted: Vec<String> = sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap();
        noted
    };
    fixture.ledger.maintain().await.unwrap();
    assert_eq!(noted().await, ["open_1"], "the sweep begins again at the present");
    assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap()).stuck, 2);
    assert_eq!(noted().await, ["open_1", "open_2"], "it was missed, and is known from here on");
    assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap()).stuck, 2);
    fixture.close().await;
}

/// A dump keeps Postgres from removing the old versions of the counts, which each batch adds to and looks through: the writer goes
/// on in other rows meanwhile, and only then (L5).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_go_on_in_other_rows_while_a_snapshot_keeps_their_old_versions() {
    let fixture = Fixture::postgres().await;
    let mut claimed = 0;
    let mut slots_after = async |claims: u64| {
        for _ in 0..claims {
            fixture.acquire(claim(&key(&format!("evt_{claimed}")), "a")).await;
            claimed += 1;
        }
        fixture.ledger.maintain().await.unwrap();
        let sql = "select count(distinct slot) from payment_webhook_counts";
        let slots: i64 = sqlx::query_scalar(sql).fetch_one(&mut fixture.connect().await).await.unwrap();
        (slots, claimed)
    };
    for _ in 0..4 {
        assert_eq!(slots_after(400).await.0, 1, "their old versions are removed");
    }
    let mut dump = fixture.connect().await;
    for sql in ["begin isolation level repeatable read", "select from payment_webhook_counts"] {
        sqlx::query(sql).execute(&mut dump).await.unwrap();
    }
    // The server's statistics lag behind by a second.
    let claimed = eventually("counts go on in other rows", async || {
        let (slots, claimed) = slots_after(200).await;
        (slots > 1).then_some(claimed)
    })
    .await;
    assert_eq!(total(&fixture.ledger.stats(everything()).await.unwrap())[State::Processing], claimed);
    fixture.close().await;
}
