-- A page of events, newest first, by key set: nothing is skipped or repeated when events come and go.
--
-- In:  filters (null: all), bounds on the creation, and where the last page ended. Every filter is applied along the
--      walk, so a page of a rare type looks at more rows than it returns.
-- Index: payment_webhook_events_create_time, backwards. `|| ''` keeps the planner from reading the whole index of keys for a
--      tenant or provider and sorting what it finds, which it prefers while its statistics are of a small table.
select
    e.id, e.tenant, e.provider, e.event_id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven,
    e.duplicate_count, e.mismatch_count, e.last_mismatch_time, e.fencing_token, e.create_time, e.update_time,
    e.end_time, e.retry_time, e.fingerprint, e.metadata::text as metadata,
    e.completion_metadata::text as completion_metadata, e.result_code, e.result_body, e.result_content_type,
    e.last_error, e.claim_id, e.holder, e.start_time, e.lock_expire_time, e.outcome, e.payload_digest
from payment_webhook_events e
where (e.create_time, e.id) < ($1::timestamptz, $2::bigint)
    and e.create_time >= $3::timestamptz
    and ($4::text is null or e.tenant || '' = $4)
    and ($5::text is null or e.provider || '' = $5)
    and ($6::text is null or e.event_type = $6)
    and ($7::text[] is null or e.state = any ($7))
order by e.create_time desc, e.id desc
limit $8
