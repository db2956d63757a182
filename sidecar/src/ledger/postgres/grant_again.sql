-- Grants another attempt of events that the snapshot had and that may be claimed: pending, failed with the pause over,
-- or processing past the lock's expiry (S1, S3, S7).
--
-- In:  what was read of each event (row, state, token) and the claim, as arrays sorted by key; $10 is the writer's slot, $11
--      when the events were created.
-- Out: a row per grant, with the event as it stands after it and the claim's place. A claim in no row found the event
--      changed since it was read: ask again from the beginning.
-- Why it is safe: state, token and times are compared inside the lateral FOR NO KEY UPDATE, on the locked version, with
--      the database's clock read there (S5). The token is drawn in SET, when the row is locked (S2). The attempt that
--      ends here goes to the archive in the same statement (S9, I10).
-- Index: any that has the row's number, which the conditions on the creation are for: by statistics of no row or one, all of them
--        look alike to the planner. For the update ranges, as in hot/own_completions.sql.
with held as materialized (
    select q.place, q.claim_id as new_claim_id, q.holder as new_holder, q.lock_micros,
        q.fingerprint as new_fingerprint, q.payload_digest as new_payload_digest, clock_timestamp() as now, e.*
    from unnest(
        $1::bigint[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::bigint[], $7::bytea[], $8::bytea[],
        $9::integer[], $11::timestamptz[]
    ) as q (
        event_row, state, fencing_token, claim_id, holder, lock_micros, fingerprint, payload_digest, place, create_time
    )
    cross join lateral (
        select v.*
        from payment_webhook_events v
        where v.id = q.event_row and v.create_time = q.create_time and v.state = q.state
            and v.fencing_token = q.fencing_token
            and case v.state
                when 'processing' then v.lock_expire_time <= clock_timestamp()
                when 'failed' then v.retry_time is null or v.retry_time <= clock_timestamp()
                else v.state = 'pending'
            end
        for no key update
    ) e
),
granted as (
    update payment_webhook_events e set
        state = 'processing',
        outcome = 'running',
        attempt_count = e.attempt_count + 1,
        fencing_token = nextval('oncegate_fencing_token'),
        update_time = h.now,
        start_time = h.now,
        lock_expire_time = h.now + h.lock_micros * interval '1 microsecond',
        end_time = null,
        retry_time = null,
        claim_id = h.new_claim_id,
        holder = h.new_holder,
        fingerprint = coalesce(e.fingerprint, h.new_fingerprint),
        payload_digest = h.new_payload_digest,
        result_code = null,
        result_body = null,
        result_content_type = null
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
    select h.id, h.attempt_count, h.fencing_token, h.claim_id, h.holder, h.start_time,
        case when h.outcome = 'running' then h.now else coalesce(h.end_time, h.update_time) end,
        case when h.outcome = 'running' then 'lock_expired' else h.outcome end,
        case when h.outcome like 'failed%' then h.last_error end,
        h.payload_digest, h.result_code, h.result_content_type, h.result_body
    from held h
    where h.claim_id is not null
),
opened as (
    -- What is processing again is old, and the sweep does not come back to it.
    insert into payment_webhook_open (event_row)
    select g.id from granted g order by 1
    on conflict (event_row) do nothing
),
counted as (
    insert into payment_webhook_counts as c (
        slot, tenant, provider, hour, pending, processing, completed, failed, unknown, dead, retries
    )
    select $10::integer, g.tenant, g.provider, date_bin('1 hour', g.create_time, 'epoch') as hour,
        -count(*) filter (where g.from_state = 'pending'),
        count(*) filter (where g.from_state <> 'processing'),
        0,
        -count(*) filter (where g.from_state = 'failed'),
        0, 0,
        count(*) filter (where g.attempt_count > 1)
    from granted g
    group by g.tenant, g.provider, date_bin('1 hour', g.create_time, 'epoch')
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
from granted
