-- The next events that a Cleanup looks at, in order of creation.
--
-- In:  where the last step ended (time, row), the moment before which events must have ended, the most rows.
-- Out: what decides about each. An event that ended before the moment was created before it, so that the walk misses
--      none; it is bounded by rows looked at, not by rows found.
-- Index: payment_webhook_events_create_time.
select id, create_time, tenant, provider, state, coalesce(end_time, update_time), duplicate_count, attempt_count,
    attempt_count > 1 or claim_id is null
from payment_webhook_events
where (create_time, id) > (?1, ?2) and create_time < ?3
order by create_time, id
limit ?4
