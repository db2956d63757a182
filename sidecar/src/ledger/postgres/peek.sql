-- Where the events that somebody waits for are now (L9). Writes and locks nothing.
--
-- In:  keys as arrays. Out: a row per event that exists. Index: payment_webhook_events_key.
select e.tenant, e.provider, e.event_id, e.state, e.fencing_token
from unnest($1::text[], $2::text[], $3::text[]) as q (tenant, provider, event_id)
cross join lateral (
    select * from payment_webhook_events v
    where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
    limit 1
) e
