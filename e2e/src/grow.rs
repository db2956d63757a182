//! Quickly fills a database with events as years of service would have left them: one statement per part, with counts,
//! attempts and histograms that agree with the rows, so that `oncegate check` passes.

use anyhow::{Context as _, Result};
use oncegate_sidecar::{event::Micros, ledger::timings::Timings};
use sqlx::{PgConnection, postgres::PgBindIterExt as _};

/// What a table should look like.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// How many events.
    pub rows: i64,
    /// The number of days before now over which their creation is spread evenly.
    pub days: i64,
    /// One in this many is held (dead and unknown in turn), one in this many is failed, and one in twice this many is
    /// processing with an expired lock.
    pub rare: i64,
}

impl Growth {
    /// Thirty days of events, one in a thousand of which is in a rare state.
    pub fn of(rows: i64) -> Growth {
        Growth { rows, days: 30, rare: 1_000 }
    }
}

/// Rows that one statement inserts.
const PART: i64 = 500_000;

/// Processing times: most around 100 ms, some up to half a minute.
fn times() -> Vec<i64> {
    (0..251_i64).map(|place| 20_000 + place * 1_500 + if place % 20 == 0 { place * place * 480 } else { 0 }).collect()
}

fn bucket(micros: i64) -> i16 {
    let mut timings = Timings::default();
    timings.record(Micros(micros));
    timings.buckets().next().map_or(0, |(bucket, _)| bucket)
}

/// The event number `n` (from 1) of a filled table: tenant, provider and event id.
pub fn key(n: i64) -> (&'static str, &'static str, String) {
    let provider = ["stripe", "paypal", "paystack", "flutterwave"];
    let tenant = if n % 97 == 0 { "acme" } else { "default" };
    (tenant, provider[usize::try_from(n % 4).unwrap_or_default()], format!("evt_{n:010}"))
}

/// Fills a migrated, empty database. The events reach up to now, so that the newest hours have some.
///
/// # Errors
/// When the database does.
pub async fn fill(connection: &mut PgConnection, growth: Growth) -> Result<()> {
    let times = times();
    let mut done = 0;
    while done < growth.rows {
        let upto = (done + PART).min(growth.rows);
        sqlx::query(
            "insert into payment_webhook_events (
                fencing_token, create_time, update_time, end_time, start_time, lock_expire_time, duplicate_count,
                attempt_count, state, outcome, tenant, provider, event_id, event_type, claim_id, holder
            )
            select nextval('oncegate_fencing_token'), t.at, t.at + t.took,
                case when t.state in ('processing', 'failed') then null else t.at + t.took end,
                t.at, t.at + interval '5 minutes', case when t.n % 10 = 0 then 1 else 0 end,
                case when t.n % 50 = 0 then 2 else 1 end, t.state,
                case t.state when 'processing' then 'running' when 'completed' then 'completed'
                    when 'failed' then 'failed_retryable' when 'dead' then 'failed_terminal' else 'failed_unknown' end,
                case when t.n % 97 = 0 then 'acme' else 'default' end,
                (array['stripe', 'paypal', 'paystack', 'flutterwave'])[1 + t.n % 4],
                'evt_' || lpad(t.n::text, 10, '0'),
                case when t.n % 100003 = 0 then 'dispute.created' else 'payment_intent.succeeded' end,
                'claim-' || t.n, 'pod-1'
            from (
                select n, now() - interval '1 hour' - ($3 - n) * ($4 * interval '1 day' / $3) as at,
                    ($6::bigint[])[1 + n % cardinality($6::bigint[])] * interval '1 microsecond' as took,
                    case n % $5 when 1 then case when n % (2 * $5) = 1 then 'dead' else 'unknown' end
                        when 2 then 'failed'
                        when 3 then case when n % (2 * $5) = 3 then 'processing' else 'completed' end
                        else 'completed' end as state
                from generate_series($1::bigint, $2::bigint) n
            ) t
            order by t.n",
        )
        .bind(done + 1)
        .bind(upto)
        .bind(growth.rows)
        .bind(growth.days)
        .bind(growth.rare.max(4))
        .bind(&times)
        .execute(&mut *connection)
        .await
        .context("cannot insert events")?;
        done = upto;
    }
    for (sql, what) in [
        (
            "insert into payment_webhook_attempts (
                event_row, attempt, fencing_token, claim_id, holder, start_time, end_time, outcome
            )
            select id, 1, fencing_token - 1000000000, claim_id || '-first', holder, start_time - interval '1 minute',
                start_time - interval '30 seconds', 'failed_retryable'
            from payment_webhook_events where attempt_count > 1 order by id",
            "attempts",
        ),
        (
            "insert into payment_webhook_counts (
                slot, tenant, provider, hour, processing, completed, failed, unknown, dead, duplicates, retries
            )
            select 1, tenant, provider, date_trunc('hour', create_time, 'UTC'),
                count(*) filter (where state = 'processing'), count(*) filter (where state = 'completed'),
                count(*) filter (where state = 'failed'), count(*) filter (where state = 'unknown'),
                count(*) filter (where state = 'dead'), sum(duplicate_count), sum(attempt_count - 1)
            from payment_webhook_events group by tenant, provider, date_trunc('hour', create_time, 'UTC')",
            "counts",
        ),
        (
            "insert into payment_webhook_open (event_row)
            select id from payment_webhook_events where state = 'processing' order by id",
            "what is open",
        ),
        ("update payment_webhook_sweep set swept_until = clock_timestamp() - interval '5 seconds'", "the sweep"),
    ] {
        sqlx::query(sql).execute(&mut *connection).await.with_context(|| format!("cannot fill {what}"))?;
    }
    sqlx::query(
        "insert into payment_webhook_timings (slot, tenant, provider, hour, buckets, counts)
        select 1, tenant, provider, hour, array_agg(bucket order by bucket), array_agg(count order by bucket)
        from (
            select e.tenant, e.provider, date_trunc('hour', e.create_time, 'UTC') as hour, b.bucket, count(*) as count
            from payment_webhook_events e
            -- Distinct, for two of the times are the same, and would count each of theirs twice.
            join (select distinct * from unnest($1::bigint[], $2::smallint[])) b (micros, bucket)
                on b.micros = (extract(epoch from e.end_time - e.start_time) * 1000000)::bigint
            where e.state = 'completed'
            group by 1, 2, 3, 4
        ) t
        group by tenant, provider, hour",
    )
    .bind(&times)
    .bind(times.iter().map(|micros| bucket(*micros)).bind_iter())
    .execute(&mut *connection)
    .await
    .context("cannot fill the histograms")?;
    Ok(())
}
