-- 'marks' for one completion of an event that is processing, as nearly all are. Where it changes nothing, 'marks' is
-- asked, which knows the other state that a completion may end.
-- Why it is safe: it is one conditional update, and it decides on the version that it locks.
with marked as (
    update payment_webhook_events e set
        state = 'completed',
        outcome = 'completed',
        update_time = t.now,
        end_time = t.now,
        retry_time = null,
        result_code = $7::integer,
        result_body = $8::bytea,
        result_content_type = $9::text,
        completion_metadata = case when $10::text is null then e.completion_metadata
            else coalesce(e.completion_metadata, '{}'::jsonb) || $10::text::jsonb end
    from (select clock_timestamp() as now) t
    where e.tenant = $2::text and e.provider = $3::text and e.event_id = $4::text
        and e.fencing_token = $5::bigint
        and ($6::text is null or e.claim_id = $6::text)
        and e.state = 'processing'
    returning
        t.now, e.tenant, e.provider,
        e.id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven, e.duplicate_count, e.mismatch_count,
        e.last_mismatch_time, e.create_time, e.fingerprint, e.metadata::text as metadata,
        e.completion_metadata::text as completion_metadata, e.last_error, e.claim_id, e.holder, e.start_time,
        e.lock_expire_time, e.payload_digest
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
select
    now,
    id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count, last_mismatch_time, create_time,
    fingerprint, metadata, completion_metadata, last_error, claim_id, holder, start_time, lock_expire_time, payload_digest
from marked
