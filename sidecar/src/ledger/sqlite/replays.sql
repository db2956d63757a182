-- What was replayed by force since an earlier read: what caches have to know (C7).
--
-- In:  the highest token that was read by then. Out: the token that each replay drew, lowest first, and the event's name.
-- Why it misses none: one connection writes, and draws the token in the transaction that records it (S2). So replays become
--      visible in the order of their tokens, and what a snapshot does not show has a higher one than all that it shows.
-- Index: payment_webhook_resolutions_replays, from that token on; the primary key of the events.
select r.fencing_token, e.tenant, e.provider, e.event_id
from payment_webhook_resolutions r indexed by payment_webhook_resolutions_replays
cross join payment_webhook_events e on e.id = r.event_row
where r.from_state = 'completed' and r.fencing_token > ?1
order by r.fencing_token
