-- Events that are processing, and those of them that are past their lock's expiry, by hour of creation and provider: of what
-- has been open for a while, and of what the sweep has not looked at yet.
--
-- In:  tenant and provider (null: all), bounds on the creation (half open).
-- Out: per hour and provider how many were found. Fewer than the counts of the same snapshot tell: something was missed, and
--      its hour has to be walked (stats_stuck.sql).
-- Index: payment_webhook_open_pkey and the primary key of the events; payment_webhook_events_create_time for the last
--      seconds. OFFSET keeps the planner from turning the laterals into joins over whole tables.
with candidates as materialized (
    select o.event_row as id from payment_webhook_open o
    union
    select f.id
    from payment_webhook_sweep s
    cross join lateral (
        select v.id from payment_webhook_events v
        where v.create_time >= s.swept_until and v.state = 'processing'
        offset 0
    ) f
    where s.id = 1
)
select date_trunc('hour', e.create_time, 'UTC') as hour, e.provider, count(*) as processing,
    count(*) filter (where e.lock_expire_time <= clock_timestamp()) as stuck
from candidates c
cross join lateral (
    select v.create_time, v.provider, v.lock_expire_time
    from payment_webhook_events v
    where v.id = c.id and v.state = 'processing'
        and ($1::text is null or v.tenant = $1) and ($2::text is null or v.provider = $2)
        and v.create_time >= $3::timestamptz and v.create_time < $4::timestamptz
    offset 0
) e
group by 1, 2
