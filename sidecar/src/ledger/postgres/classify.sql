-- Reads the events of marks and extensions that were not applied, of resolutions, and of claims that were refused for their
-- delivery id: what the pure rules decide on.
--
-- In:  keys and the token that each request names, as arrays. Writes and locks nothing.
-- Out: per key that exists, the event as it stands; the archived attempt with that token, if there is one; the latest
--      resolution, if there is one.
-- Index: payment_webhook_events_key, payment_webhook_attempts_token, the primary key of the resolutions.
select
    q.place, clock_timestamp() as now,
    e.id, e.tenant, e.provider, e.event_id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven,
    e.duplicate_count, e.mismatch_count, e.last_mismatch_time, e.fencing_token, e.create_time, e.update_time,
    e.end_time, e.retry_time, e.fingerprint, e.metadata::text as metadata,
    e.completion_metadata::text as completion_metadata, e.result_code, e.result_body, e.result_content_type,
    e.last_error, e.claim_id, e.holder, e.start_time, e.lock_expire_time, e.outcome, e.payload_digest,
    a.attempt as archived_attempt, a.fencing_token as archived_fencing_token, a.claim_id as archived_claim_id,
    a.holder as archived_holder, a.start_time as archived_start_time, a.end_time as archived_end_time,
    a.outcome as archived_outcome, a.error as archived_error, a.payload_digest as archived_payload_digest,
    a.result_code as archived_result_code, a.result_body as archived_result_body,
    a.result_content_type as archived_result_content_type,
    r.from_state as resolved_from_state, r.to_state as resolved_to_state,
    r.from_fencing_token as resolved_from_fencing_token, r.fencing_token as resolved_fencing_token,
    r.reason as resolved_reason, r.actor as resolved_actor, r.time as resolved_time
from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::integer[])
    as q (tenant, provider, event_id, fencing_token, place)
cross join lateral (
    select * from payment_webhook_events v
    where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
    limit 1
) e
left join lateral (
    -- The first from this token on: only one index has them in that order, whatever the statistics say.
    select * from payment_webhook_attempts v
    where v.event_row = e.id and v.fencing_token >= q.fencing_token
    order by v.fencing_token
    limit 1
) a on a.fencing_token = q.fencing_token
left join lateral (
    select * from payment_webhook_resolutions v where v.event_row = e.id order by v.fencing_token desc limit 1
) r on true
