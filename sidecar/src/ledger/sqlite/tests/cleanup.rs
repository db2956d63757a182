//! Cleanup beside calls: one thread does both.

use super::*;
use crate::ledger::{
    load::Seen,
    sqlite::transaction::cleanup::{DELIVERIES_MAX, ROWS_MIN},
};

fn scope() -> CleanupScope {
    CleanupScope {
        tenant: None,
        provider: None,
        before: Time(i64::MAX),
        states: vec![State::Completed],
        dry_run: false,
        batch_size: 10_000,
    }
}

/// Without that a Cleanup knows of nobody, and goes on without a pause.
#[tokio::test]
async fn a_cleanup_is_shown_the_calls_between_its_steps() {
    let (_directory, path) = file();
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    let load = ledger.load().expect("it is measured");
    let mut seen = Seen::default();
    let mut progress = CleanupProgress::default();
    ledger.cleanup_step(&scope(), &mut progress).await.unwrap();
    let idle = load.look(&mut seen);
    assert_eq!((idle.all, idle.is_busy), (None, false), "a step is no call");
    let lock = acquire(&ledger, "evt_1").await;
    assert!(load.look(&mut seen).quiet.is_some(), "a claim");
    ledger.mark(completion("evt_1", lock.fencing_token)).await.unwrap();
    assert!(load.look(&mut seen).quiet.is_some(), "a mark");
    assert_eq!(load.look(&mut seen).all, None);
    ledger.close().await;
}

/// Rows of a hundred bytes or of many kilobytes, on any disk: all calls wait for a step.
#[test]
fn a_step_whose_time_is_over_ends_where_it_has_come_to_and_the_next_one_goes_on() {
    const ROWS: usize = 3 * ROWS_MIN;
    for (time_max, deleted) in [(Duration::MAX, vec![ROWS]), (Duration::ZERO, vec![ROWS_MIN, 2 * ROWS_MIN, ROWS, ROWS])]
    {
        let (_directory, path) = file();
        let (_queue, mut writer) = writer(&path);
        shell(&path)
            .execute_batch(&format!(
                "insert into payment_webhook_events (
                    id, fencing_token, tenant, provider, event_id, event_type, state, attempt_count, create_time,
                    update_time, end_time
                )
                with recursive events (n) as (select 1 union all select n + 1 from events where n < {ROWS})
                select n, n, 'default', 'stripe', 'evt_' || n, 'paid', 'completed', 0, n, n, n from events;
                insert into payment_webhook_counts (tenant, provider, hour, completed)
                values ('default', 'stripe', 0, {ROWS});"
            ))
            .unwrap();
        let mut progress = CleanupProgress::default();
        let mut steps = Vec::new();
        while !progress.done {
            let (reply, mut answer) = oneshot::channel();
            writer.cleanup(CleanupStep { scope: scope(), progress, reply }, time_max);
            progress = answer.try_recv().expect("it answers").unwrap();
            steps.push(usize::try_from(progress.providers["stripe"].deleted).unwrap());
        }
        assert_eq!(steps, deleted, "at most {time_max:?} each");
    }
}

/// Rows of events are few here: what is left is the ids.
#[test]
fn a_step_deletes_so_many_delivery_ids_at_most() {
    let (_directory, path) = file();
    let (_queue, mut writer) = writer(&path);
    let ids = DELIVERIES_MAX + 1;
    let shell = shell(&path);
    shell
        .execute_batch(&format!(
            "insert into payment_webhook_deliveries (tenant, provider, delivery_id, payload_digest, create_time)
            with recursive ids (n) as (select 1 union all select n + 1 from ids where n < {ids})
            select 'default', 'paypal', n, zeroblob(32), n from ids;"
        ))
        .unwrap();
    let mut progress = CleanupProgress::default();
    for left in [1, 0] {
        assert!(!progress.done, "{left} are left");
        let (reply, mut answer) = oneshot::channel();
        writer.cleanup(CleanupStep { scope: scope(), progress, reply }, Duration::MAX);
        progress = answer.try_recv().expect("it answers").unwrap();
        let found: i64 =
            shell.query_row("select count(*) from payment_webhook_deliveries", [], |row| row.get(0)).unwrap();
        assert_eq!(found, left);
    }
    assert!(progress.done);
}
