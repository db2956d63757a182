-- New claims, duplicates, and marks: the path of every event that completes at once (L3).
--
-- In:  claims and marks as arrays with their places, each sorted by key; per key either one mark or claims (a mark and a
--      claim of one key in one statement: the mark would silently change nothing). $25 is the writer's slot.
-- Out: 'seen'   a claim's event that the snapshot has, as it stands: the caller decides and writes nothing for a duplicate
--      'fresh'  a claim's event that this statement inserted and granted; only id, key, claim, token and times are filled
--      'marked' a mark that was applied, with the event as it stands after it, and the mark's place in the input
--      A claim in no row met an insert that the snapshot cannot see: ask again in a new statement (PG2). A mark in no
--      row was not applied: read the event and classify (S3).
-- Why it is safe: the insert yields to the unique key. Every condition of a mark is evaluated inside the lateral
--      FOR NO KEY UPDATE, that is, on the version that is then locked; the update joins that row by its primary key only.
--      Tokens are drawn in the INSERT's own values (S2). A call without new events and marks writes nothing at all.
-- Index: payment_webhook_events_key for look-ups and conflicts, payment_webhook_events_pkey for the update. LIMIT and
--      OFFSET keep the planner from turning the laterals into joins over whole tables (a plan trap, measured).
with seen as materialized (
    select
        q.place, q.event_type as claim_event_type, q.claim_id as claim_claim_id, q.holder as claim_holder,
        q.lock_micros, q.fingerprint as claim_fingerprint, q.metadata as claim_metadata,
        q.payload_digest as claim_payload_digest,
        q.tenant as claim_tenant, q.provider as claim_provider, q.event_id as claim_event_id,
        e.*,
        -- Only where an archive can exist.
        case when e.attempt_count > 1 or e.claim_id is null then exists (
            select from payment_webhook_attempts a where a.event_row = e.id and a.claim_id = q.claim_id
        ) else false end as claim_ended
    from unnest(
        $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::bytea[],
        $9::text[], $10::bytea[], $26::integer[]
    ) as q (
        tenant, provider, event_id, event_type, claim_id, holder, lock_micros, fingerprint, metadata, payload_digest, place
    )
    left join lateral (
        select
            v.id, v.tenant, v.provider, v.event_id, v.event_type, v.state, v.attempt_count, v.attempts_forgiven,
            v.duplicate_count, v.mismatch_count, v.last_mismatch_time, v.fencing_token, v.create_time, v.update_time,
            v.end_time, v.retry_time, v.fingerprint, v.metadata::text as metadata,
            v.completion_metadata::text as completion_metadata, v.result_code, v.result_body, v.result_content_type,
            v.last_error, v.claim_id, v.holder, v.start_time, v.lock_expire_time, v.outcome, v.payload_digest
        from payment_webhook_events v
        where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
        limit 1
    ) e on true
),
fresh as (
    insert into payment_webhook_events (
        tenant, provider, event_id, event_type, state, outcome, attempt_count, fencing_token,
        create_time, update_time, start_time, lock_expire_time, claim_id, holder, fingerprint, metadata, payload_digest
    )
    select
        s.claim_tenant, s.claim_provider, s.claim_event_id, s.claim_event_type, 'processing', 'running', 1,
        nextval('oncegate_fencing_token'),
        t.now, t.now, t.now, t.now + s.lock_micros * interval '1 microsecond',
        s.claim_claim_id, s.claim_holder, s.claim_fingerprint, s.claim_metadata::jsonb, s.claim_payload_digest
    from seen s cross join (select clock_timestamp() as now) t
    where s.id is null
    on conflict (tenant, provider, event_id) do nothing
    returning id, tenant, provider, event_id, fencing_token, create_time, lock_expire_time, claim_id
),
held as materialized (
    select
        m.place, m.outcome, m.error, m.retry_micros, m.result_code, m.result_body, m.result_content_type, m.metadata,
        e.id, e.state as from_state, clock_timestamp() as now,
        case m.outcome
            when 'completed' then 'completed'
            when 'failed_unknown' then 'unknown'
            when 'failed_terminal' then 'dead'
            when 'failed_retryable' then
                case when m.attempts_max > 0 and e.attempt_count - e.attempts_forgiven >= m.attempts_max
                    then 'dead' else 'failed' end
        end as to_state
    from unnest(
        $11::text[], $12::text[], $13::text[], $14::bigint[], $15::text[], $16::text[], $17::integer[],
        $18::text[], $19::bigint[], $20::integer[], $21::bytea[], $22::text[], $23::text[], $24::integer[]
    ) as m (
        tenant, provider, event_id, fencing_token, claim_id, outcome, attempts_max,
        error, retry_micros, result_code, result_body, result_content_type, metadata, place
    )
    cross join lateral (
        select v.id, v.state, v.attempt_count, v.attempts_forgiven
        from payment_webhook_events v
        where v.tenant = m.tenant and v.provider = m.provider and v.event_id = m.event_id
            and v.fencing_token = m.fencing_token
            and (m.claim_id is null or v.claim_id = m.claim_id)
            -- Processing, expired or not; or the token that an expiry at the cap made dead (S3).
            and (v.state = 'processing' or (v.state = 'dead' and v.outcome = 'lock_expired'))
        for no key update
    ) e
),
marked as (
    update payment_webhook_events e set
        state = h.to_state,
        outcome = h.outcome,
        update_time = h.now,
        end_time = case when h.to_state = 'failed' then null else h.now end,
        retry_time = case when h.to_state = 'failed' then h.now + h.retry_micros * interval '1 microsecond' end,
        last_error = case when h.outcome = 'completed' then e.last_error else h.error end,
        result_code = h.result_code,
        result_body = h.result_body,
        result_content_type = h.result_content_type,
        completion_metadata = case when h.metadata is null then e.completion_metadata
            else coalesce(e.completion_metadata, '{}'::jsonb) || h.metadata::jsonb end
    from held h
    where e.id = h.id
    returning h.place, h.from_state, h.now,
        e.id, e.tenant, e.provider, e.event_id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven,
        e.duplicate_count, e.mismatch_count, e.last_mismatch_time, e.fencing_token, e.create_time, e.update_time,
        e.end_time, e.retry_time, e.fingerprint, e.metadata::text as metadata,
        e.completion_metadata::text as completion_metadata, e.result_code, e.result_body, e.result_content_type,
        e.last_error, e.claim_id, e.holder, e.start_time, e.lock_expire_time, e.outcome, e.payload_digest
),
counted as (
    insert into payment_webhook_counts as c (
        slot, tenant, provider, hour, pending, processing, completed, failed, unknown, dead, retries
    )
    select $25::integer, d.tenant, d.provider, date_trunc('hour', d.create_time, 'UTC') as hour,
        0, sum(d.processing), sum(d.completed), sum(d.failed), sum(d.unknown), sum(d.dead), 0
    from (
        select tenant, provider, create_time, 1 as processing, 0 as completed, 0 as failed, 0 as unknown, 0 as dead
        from fresh
        union all
        select tenant, provider, create_time,
            -(from_state = 'processing')::integer, (state = 'completed')::integer, (state = 'failed')::integer,
            (state = 'unknown')::integer, (state = 'dead')::integer - (from_state = 'dead')::integer
        from marked
    ) d
    group by d.tenant, d.provider, date_trunc('hour', d.create_time, 'UTC')
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
select
    'seen' as source, place, clock_timestamp() as now, claim_ended,
    id, tenant, provider, event_id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count,
    last_mismatch_time, fencing_token, create_time, update_time, end_time, retry_time, fingerprint, metadata,
    completion_metadata, result_code, result_body, result_content_type, last_error, claim_id, holder, start_time,
    lock_expire_time, outcome, payload_digest
from seen
where id is not null
union all
select
    'fresh', null, create_time, false,
    id, tenant, provider, event_id, null, null, null, null, null, null,
    null, fencing_token, create_time, null, null, null, null, null,
    null, null, null, null, null, claim_id, null, null,
    lock_expire_time, null, null
from fresh
union all
select
    'marked', place, now, false,
    id, tenant, provider, event_id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count,
    last_mismatch_time, fencing_token, create_time, update_time, end_time, retry_time, fingerprint, metadata,
    completion_metadata, result_code, result_body, result_content_type, last_error, claim_id, holder, start_time,
    lock_expire_time, outcome, payload_digest
from marked
