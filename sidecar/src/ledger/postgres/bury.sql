-- Makes events dead whose attempts are used up: processing past the lock's expiry (outcome lock expired), or failed (S7). An
-- attempt that failed goes to the archive, where it keeps the time of its own end (S9): the row's times become those of the burial.
--
-- In:  what was read of each event and the cap, as arrays sorted by key; $6 is the writer's slot, $7 when they were created.
-- Out: a row per event that was made dead, as it stands after it, with the claim's place. A claim in no row found the
--      event changed since it was read: ask again from the beginning.
-- Why it is safe: as in grant_again.sql. The token stays: a late Mark of it is still accepted (S3), or meets its record in the
--      archive.
-- Index: any that has the row's number, as in grant_again.sql.
with held as materialized (
    select q.place, clock_timestamp() as now, e.*
    from unnest($1::bigint[], $2::text[], $3::bigint[], $4::integer[], $5::integer[], $7::timestamptz[])
        as q (event_row, state, fencing_token, attempts_max, place, create_time)
    cross join lateral (
        select v.*
        from payment_webhook_events v
        where v.id = q.event_row and v.create_time = q.create_time and v.state = q.state and v.fencing_token = q.fencing_token
            and v.attempt_count - v.attempts_forgiven >= q.attempts_max
            and (v.state = 'failed' or (v.state = 'processing' and v.lock_expire_time <= clock_timestamp()))
        for no key update
    ) e
),
buried as (
    update payment_webhook_events e set
        state = 'dead',
        claim_id = case when h.state = 'processing' then e.claim_id end,
        holder = case when h.state = 'processing' then e.holder end,
        start_time = case when h.state = 'processing' then e.start_time end,
        lock_expire_time = case when h.state = 'processing' then e.lock_expire_time end,
        outcome = case when h.state = 'processing' then 'lock_expired' end,
        payload_digest = case when h.state = 'processing' then e.payload_digest end,
        update_time = h.now,
        end_time = h.now,
        retry_time = null
    from held h
    where e.id between h.id and h.id and e.create_time between h.create_time and h.create_time
    returning h.place, h.state as from_state, h.now,
        e.id, e.tenant, e.provider, e.event_id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven,
        e.duplicate_count, e.mismatch_count, e.last_mismatch_time, e.fencing_token, e.create_time, e.update_time,
        e.end_time, e.retry_time, e.fingerprint, e.metadata::text as metadata,
        e.completion_metadata::text as completion_metadata, e.result_code, e.result_body, e.result_content_type,
        e.last_error, e.claim_id, e.holder, e.start_time, e.lock_expire_time, e.outcome, e.payload_digest
),
archived as (
    insert into payment_webhook_attempts (
        event_row, attempt, fencing_token, claim_id, holder, start_time, end_time, outcome, error, payload_digest,
        result_code, result_content_type, result_body
    )
    select h.id, h.attempt_count, h.fencing_token, h.claim_id, h.holder, h.start_time, h.update_time, h.outcome, h.last_error,
        h.payload_digest, h.result_code, h.result_content_type, h.result_body
    from held h
    where h.state = 'failed'
),
counted as (
    insert into payment_webhook_counts as c (
        slot, tenant, provider, hour, pending, processing, completed, failed, unknown, dead, retries
    )
    select $6::integer, b.tenant, b.provider, date_bin('1 hour', b.create_time, 'epoch') as hour,
        0, -count(*) filter (where b.from_state = 'processing'), 0, -count(*) filter (where b.from_state = 'failed'),
        0, count(*), 0
    from buried b
    group by b.tenant, b.provider, date_bin('1 hour', b.create_time, 'epoch')
    order by 2, 3, 4
    on conflict (slot, tenant, provider, hour) do update set
        pending = c.pending + excluded.pending,
        processing = c.processing + excluded.processing,
        completed = c.completed + excluded.completed,
        failed = c.failed + excluded.failed,
        unknown = c.unknown + excluded.unknown,
        dead = c.dead + excluded.dead,
        retries = c.retries + excluded.retries
)
select place, now,
    id, tenant, provider, event_id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count,
    last_mismatch_time, fencing_token, create_time, update_time, end_time, retry_time, fingerprint, metadata,
    completion_metadata, result_code, result_body, result_content_type, last_error, claim_id, holder, start_time,
    lock_expire_time, outcome, payload_digest
from buried
