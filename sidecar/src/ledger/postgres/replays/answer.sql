-- A row of the node, and one per replay with the event's name and the token that was drawn.
-- Index: the primary key of the events.
select n.identity, n.snapshot, n.now, null::text as tenant, null::text as provider, null::text as event_id,
    null::bigint as fencing_token
from node n
union all
select null, null, null, e.tenant, e.provider, e.event_id, r.fencing_token
from replayed r
cross join lateral (select v.tenant, v.provider, v.event_id from payment_webhook_events v where v.id = r.event_row limit 1) e
