-- Moves the expiry of locks to the later of what it is and now plus the duration (S3: also of an expired one that
-- nobody has taken over).
--
-- In:  keys, tokens, claim ids (null: any) and durations, as arrays sorted by key.
-- Out: a row per lock that was extended. A request in no row: read the event and classify.
-- Why it is safe: the conditions stand inside the lateral FOR NO KEY UPDATE, on the locked version.
-- Index: payment_webhook_events_key, then any that has the row's number: ranges of all its columns, as in hot/own_completions.sql.
with held as materialized (
    select q.place, q.lock_micros, clock_timestamp() as now, e.id, e.create_time
    from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::bigint[], $7::integer[])
        as q (tenant, provider, event_id, fencing_token, claim_id, lock_micros, place)
    cross join lateral (
        select v.id, v.create_time
        from payment_webhook_events v
        where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
            and v.fencing_token = q.fencing_token and v.state = 'processing'
            and (q.claim_id is null or v.claim_id = q.claim_id)
        for no key update
    ) e
)
update payment_webhook_events e set
    lock_expire_time = greatest(e.lock_expire_time, h.now + h.lock_micros * interval '1 microsecond'),
    update_time = h.now
from held h
where e.id between h.id and h.id and e.create_time between h.create_time and h.create_time
returning h.place, h.now,
    e.id, e.tenant, e.provider, e.event_id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven,
    e.duplicate_count, e.mismatch_count, e.last_mismatch_time, e.fencing_token, e.create_time, e.update_time,
    e.end_time, e.retry_time, e.fingerprint, e.metadata::text as metadata,
    e.completion_metadata::text as completion_metadata, e.result_code, e.result_body, e.result_content_type,
    e.last_error, e.claim_id, e.holder, e.start_time, e.lock_expire_time, e.outcome, e.payload_digest
