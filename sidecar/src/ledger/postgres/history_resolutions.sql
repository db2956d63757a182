-- What operators did with one event lately, oldest first, as much as may be listed. Index: the primary key.
select from_state as resolved_from_state, to_state as resolved_to_state,
    from_fencing_token as resolved_from_fencing_token, fencing_token as resolved_fencing_token,
    reason as resolved_reason, actor as resolved_actor, time as resolved_time
from (
    select * from payment_webhook_resolutions where event_row = $1 order by fencing_token desc limit $2
) r
order by fencing_token
