-- 'seen': the event as it stands; the caller decides, and writes nothing for a duplicate.
select
    'seen' as source, s.place, clock_timestamp() as now,
    -- Only where an archive can exist. It asks for the first claim id from this one on, because only one index has them in that
    -- order: when asked for exactly this one, with statistics of few attempts, the planner read all attempts of the event, or
    -- listed the whole table.
    case when e.attempt_count > 1 or e.claim_id is null then coalesce((
        select a.claim_id = s.claim_id from payment_webhook_attempts a
        where a.event_row = e.id and a.claim_id >= s.claim_id
        order by a.claim_id
        limit 1
    ), false) else false end as claim_ended,
    e.*
from seen s
cross join lateral (
    select
        v.id, v.tenant, v.provider, v.event_id, v.event_type, v.state, v.attempt_count, v.attempts_forgiven,
        v.duplicate_count, v.mismatch_count, v.last_mismatch_time, v.fencing_token, v.create_time, v.update_time,
        v.end_time, v.retry_time, v.fingerprint, v.metadata::text as metadata,
        v.completion_metadata::text as completion_metadata, v.result_code, v.result_body, v.result_content_type,
        v.last_error, v.claim_id, v.holder, v.start_time, v.lock_expire_time, v.outcome, v.payload_digest
    from payment_webhook_events v
    -- The creation time is there for the index, as in own_completion_alone.sql.
    where v.id = s.id and v.create_time = s.create_time
    limit 1
) e
where s.id is not null
