-- Removes entries of events that are no longer processing, or gone, from payment_webhook_open.
--
-- In:  the entry after which to look, and the most to look at.
-- Out: how many it looked at, and the last of them. One that is granted again at this very moment may lose its entry:
--      Stats notices, and looks for it.
-- Index: the primary keys.
with span as materialized (
    select o.event_row from payment_webhook_open o where o.event_row > $1::bigint order by o.event_row limit $2::integer
),
removed as (
    delete from payment_webhook_open o using span s
    where o.event_row = s.event_row
        and not exists (
            select from payment_webhook_events e where e.id = s.event_row and e.state = 'processing' offset 0
        )
)
select count(*) as looked_at, max(event_row) as last_row from span
