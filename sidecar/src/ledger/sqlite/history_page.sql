-- A part of a page of events, newest first, by key set: nothing is skipped or repeated when events come and go.
--
-- In:  where the last part ended (time, row), the place that this one ends with (history_boundary.sql), filters (null: all;
--      states as a JSON array), and the most rows. Every filter is applied along the walk, so that a rare type looks at more
--      rows than it returns: at those down to that place. Hours without the tenant, provider or states are left out before
--      (history_hours.sql).
-- Index: payment_webhook_events_create_time, backwards.
select
    id, tenant, provider, event_id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count,
    last_mismatch_time, fencing_token, create_time, update_time, end_time, retry_time, claim_id, holder, start_time,
    lock_expire_time, outcome, payload_digest, fingerprint, last_error, result_code, result_content_type, result_body,
    metadata, completion_metadata
from payment_webhook_events
where (create_time, id) < (?1, ?2)
    and (create_time, id) >= (?3, ?4)
    and (?5 is null or tenant = ?5)
    and (?6 is null or provider = ?6)
    and (?7 is null or event_type = ?7)
    and (?8 is null or state in (select value from json_each(?8)))
order by create_time desc, id desc
limit ?9
