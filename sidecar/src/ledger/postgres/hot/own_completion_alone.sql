-- 'own_completions' for a completion that comes alone. The creation time is there for the index, as the ranges
-- are in that file.
with marked as (
    update payment_webhook_events e set
        state = 'completed',
        outcome = 'completed',
        update_time = t.now,
        end_time = t.now,
        retry_time = null,
        result_code = $4::integer,
        result_body = $5::bytea,
        result_content_type = $6::text,
        completion_metadata = case when $7::text is null then e.completion_metadata
            else coalesce(e.completion_metadata, '{}'::jsonb) || $7::text::jsonb end
    from (select clock_timestamp() as now) t
    where e.id = $2::bigint and e.create_time = $8::timestamptz and e.fencing_token = $3::bigint and e.state = 'processing'
    returning
        t.now, e.tenant, e.provider, e.create_time, e.duplicate_count, e.mismatch_count, e.last_mismatch_time,
        e.lock_expire_time, e.completion_metadata::text as completion_metadata
),
-- The counts of this writer's slot (L5).
counted as (
    insert into payment_webhook_counts as c (slot, tenant, provider, hour, processing, completed)
    select $1::integer, m.tenant, m.provider, date_bin('1 hour', m.create_time, 'epoch'), -1, 1
    from marked m
    on conflict (slot, tenant, provider, hour) do update set
        processing = c.processing + excluded.processing,
        completed = c.completed + excluded.completed
)
select now, duplicate_count, mismatch_count, last_mismatch_time, lock_expire_time, completion_metadata from marked
