-- A part of a page of events, newest first, by key set: nothing is skipped or repeated when events come and go.
--
-- In:  where the last part ended and the earliest creation; filters (null: all); the most rows to find, and the most to
--      look at.
-- Out: those rows. Fewer than the most: all that were looked at; history_boundary.sql tells how far that was, if it reads the
--      same snapshot.
-- Index: payment_webhook_events_create_time, backwards. The inner LIMIT bounds the work whatever the filters are, keeps the
--      planner from another index for them, and is walked only as far as the outer one needs.
select
    e.id, e.tenant, e.provider, e.event_id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven,
    e.duplicate_count, e.mismatch_count, e.last_mismatch_time, e.fencing_token, e.create_time, e.update_time,
    e.end_time, e.retry_time, e.fingerprint, e.metadata::text as metadata,
    e.completion_metadata::text as completion_metadata, e.result_code, e.result_body, e.result_content_type,
    e.last_error, e.claim_id, e.holder, e.start_time, e.lock_expire_time, e.outcome, e.payload_digest
from (
    select * from payment_webhook_events v
    where (v.create_time, v.id) < ($1::timestamptz, $2::bigint) and v.create_time >= $3::timestamptz
    order by v.create_time desc, v.id desc
    limit $9::bigint
) e
where ($4::text is null or e.tenant = $4)
    and ($5::text is null or e.provider = $5)
    and ($6::text is null or e.event_type = $6)
    and ($7::text[] is null or e.state = any ($7))
order by e.create_time desc, e.id desc
limit $8::bigint
