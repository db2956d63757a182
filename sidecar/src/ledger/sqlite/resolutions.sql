-- What operators decided about one event lately, oldest first.
--
-- In:  the event's row, and how many at most. Out: its resolutions. Index: the primary key.
select fencing_token, from_fencing_token, from_state, to_state, reason, actor, time
from (
    select * from payment_webhook_resolutions where event_row = ?1 order by fencing_token desc limit ?2
)
order by fencing_token
