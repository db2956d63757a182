-- Reads the events of claims that are expected to be known, and nothing else: it is 'claims' without the parts for new events,
-- and takes one look-up per event instead of two. It returns nothing for a claim whose event does not exist. LIMIT keeps the
-- planner from turning the lateral into a join over the whole table (a plan trap, measured). Arrays are as in new.sql.
select
    q.place, clock_timestamp() as now,
    -- As in 'seen'.
    case when e.attempt_count > 1 or e.claim_id is null then coalesce((
        select a.claim_id = q.claim_id from payment_webhook_attempts a
        where a.event_row = e.id and a.claim_id >= q.claim_id
        order by a.claim_id
        limit 1
    ), false) else false end as claim_ended,
    e.*
from (
    select
        unnest($1::text[]) as tenant, unnest($2::text[]) as provider, unnest($3::text[]) as event_id,
        unnest($4::text[]) as claim_id, unnest($5::integer[]) as place
) q
cross join lateral (
    select
        v.id, v.tenant, v.provider, v.event_id, v.event_type, v.state, v.attempt_count, v.attempts_forgiven,
        v.duplicate_count, v.mismatch_count, v.last_mismatch_time, v.fencing_token, v.create_time, v.update_time,
        v.end_time, v.retry_time, v.fingerprint, v.metadata::text as metadata,
        v.completion_metadata::text as completion_metadata, v.result_code, v.result_body, v.result_content_type,
        v.last_error, v.claim_id, v.holder, v.start_time, v.lock_expire_time, v.outcome, v.payload_digest
    from payment_webhook_events v
    where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
    limit 1
) e
