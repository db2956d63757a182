-- Looks once at each event that is some seconds old, and puts those that are still processing into payment_webhook_open.
--
-- In:  the most events to look at, and the most to put there: a backlog that came within a second is written down over the next
--      ones, for to write an entry takes ten times what a look does, and calls wait meanwhile.
-- Out: how many it looked at; no row where another sidecar is at it, or has been a moment ago.
-- Why it is safe: the sweep's row is locked, so that one sidecar looks at a time. Two seconds: a statement takes one at
--      most, so what was created earlier can be seen; a commit that took longer is missed here, and noticed by Stats.
--      Where the clock has gone back, it begins a little before the present: what was created until then has been looked at, and
--      what comes while the old time has not come again would all be passed over.
-- Index: payment_webhook_events_create_time. LIMIT keeps the lateral as it is.
with mark as materialized (
    select case when s.swept_until > clock_timestamp() then clock_timestamp() - interval '10 seconds' else s.swept_until end as since,
        clock_timestamp() - interval '2 seconds' as until
    from payment_webhook_sweep s
    where s.id = 1
        and (s.swept_until < clock_timestamp() - interval '2900 milliseconds' or s.swept_until > clock_timestamp())
    for no key update skip locked
),
span as materialized (
    select e.id, e.create_time, e.state
    from mark m
    cross join lateral (
        select v.id, v.create_time, v.state
        from payment_webhook_events v
        where v.create_time >= m.since and v.create_time < m.until
        order by v.create_time, v.id
        limit $1::integer
    ) e
),
open as materialized (
    select s.id, s.create_time
    from span s
    where s.state = 'processing'
    order by s.create_time, s.id
    limit $2::integer
),
recorded as (
    insert into payment_webhook_open (event_row)
    select o.id from open o order by 1
    on conflict (event_row) do nothing
),
moved as (
    update payment_webhook_sweep w set
        -- Those that were created with the last one are looked at again; where all were created at once, the rest is left to Stats,
        -- which notices.
        swept_until = case
            when (select count(*) from open) >= $2::integer
                then greatest((select max(o.create_time) from open o), m.since + interval '1 microsecond')
            when (select count(*) from span) >= $1::integer then (select max(s.create_time) from span s)
            else m.until
        end
    from mark m
    -- A quiet service writes once a minute, not each second.
    where w.id = 1 and (exists (select from span) or m.since < m.until - interval '1 minute')
)
select count(*) as looked_at from mark left join span on true
