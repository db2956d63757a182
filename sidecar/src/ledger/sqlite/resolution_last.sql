-- The latest decision about one event: the one that may still stand.
--
-- In:  the event's row. Out: one row or none. Index: the primary key, backwards.
select fencing_token, from_fencing_token, from_state, to_state, reason, actor, time
from payment_webhook_resolutions
where event_row = ?1
order by fencing_token desc
limit 1
