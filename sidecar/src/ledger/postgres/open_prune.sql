-- Removes entries of events that are no longer processing, or gone, from payment_webhook_open.
--
-- In:  the entry after which to look, and the most to look at.
-- Out: how many it looked at, how many of them it removes, and the last of them. One that is granted again at this very moment may lose its entry:
--      Stats notices, and looks for it.
-- Index: the primary keys. The bounds of what is deleted are there for the planner: where statistics tell of an empty table,
--        as an outage before this one has left it, it read all of it for each entry.
with span as materialized (
    select o.event_row from payment_webhook_open o where o.event_row > $1::bigint order by o.event_row limit $2::integer
),
gone as materialized (
    select s.event_row from span s
    where not exists (
        select from payment_webhook_events e where e.id = s.event_row and e.state = 'processing' offset 0
    )
),
removed as (
    delete from payment_webhook_open o using gone g
    where o.event_row = g.event_row and o.event_row > $1::bigint
        and o.event_row <= (select max(s.event_row) from span s)
)
select count(*) as looked_at, (select count(*) from gone) as removed, max(event_row) as last_row from span
