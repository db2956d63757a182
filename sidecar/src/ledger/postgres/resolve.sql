-- Puts events into the state that an operator decided on, with a new token, a record of the decision, and the latest
-- attempt in the archive (S9).
--
-- In:  what was read of each event and the decision, as arrays sorted by key; $11 is the writer's slot, $12
--      when the events were created.
-- Out: a row per event that was resolved, as it stands after it. A request in no row found the event changed since it
--      was read: classify again.
-- Why it is safe: state and token are compared on the locked version; a processing event also needs its lock to have
--      expired by the database's clock. The token is drawn in SET (S2).
-- Index: any that has the row's number, as in grant_again.sql.
with held as materialized (
    select q.place, q.to_state, q.reason, q.actor, q.result_code as new_result_code, q.result_body as new_result_body,
        q.result_content_type as new_result_content_type, clock_timestamp() as now, e.*
    from unnest(
        $1::bigint[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::integer[], $8::bytea[],
        $9::text[], $10::integer[], $12::timestamptz[]
    ) as q (
        event_row, state, fencing_token, to_state, reason, actor, result_code, result_body, result_content_type, place,
        create_time
    )
    cross join lateral (
        select v.*
        from payment_webhook_events v
        where v.id = q.event_row and v.create_time = q.create_time and v.state = q.state
            and v.fencing_token = q.fencing_token
            and (v.state <> 'processing' or v.lock_expire_time <= clock_timestamp())
        for no key update
    ) e
),
resolved as (
    update payment_webhook_events e set
        state = h.to_state,
        fencing_token = nextval('oncegate_fencing_token'),
        update_time = h.now,
        end_time = case when h.to_state = 'pending' then null else h.now end,
        retry_time = null,
        attempts_forgiven = case when h.to_state = 'pending' then e.attempt_count else e.attempts_forgiven end,
        claim_id = null,
        holder = null,
        start_time = null,
        lock_expire_time = null,
        outcome = null,
        payload_digest = null,
        result_code = h.new_result_code,
        result_body = h.new_result_body,
        result_content_type = h.new_result_content_type
    from held h
    where e.id between h.id and h.id and e.create_time between h.create_time and h.create_time
    returning h.place, h.state as from_state, h.fencing_token as from_fencing_token, h.reason, h.actor, h.now,
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
recorded as (
    insert into payment_webhook_resolutions (
        event_row, fencing_token, from_fencing_token, from_state, to_state, reason, actor, time
    )
    select r.id, r.fencing_token, r.from_fencing_token, r.from_state, r.state, r.reason, r.actor, r.now
    from resolved r
),
counted as (
    insert into payment_webhook_counts as c (
        slot, tenant, provider, hour, pending, processing, completed, failed, unknown, dead, retries
    )
    select $11::integer, r.tenant, r.provider, date_bin('1 hour', r.create_time, 'epoch') as hour,
        count(*) filter (where r.state = 'pending') - count(*) filter (where r.from_state = 'pending'),
        -count(*) filter (where r.from_state = 'processing'),
        count(*) filter (where r.state = 'completed') - count(*) filter (where r.from_state = 'completed'),
        -count(*) filter (where r.from_state = 'failed'),
        -count(*) filter (where r.from_state = 'unknown'),
        count(*) filter (where r.state = 'dead') - count(*) filter (where r.from_state = 'dead'),
        0
    from resolved r
    group by r.tenant, r.provider, date_bin('1 hour', r.create_time, 'epoch')
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
from resolved
