-- Events that are processing past their lock's expiry, by hour of creation and provider, by walking these hours: for
-- those of which something is missing in payment_webhook_open (stats_open.sql), rare as that is.
--
-- In:  tenant and provider (null: all), and the hours.
-- Index: payment_webhook_events_create_time, an hour at a time. OFFSET keeps the planner from turning it into a join.
select h.hour, e.provider, count(*) as stuck
from unnest($3::timestamptz[]) as h (hour)
cross join lateral (
    select v.provider
    from payment_webhook_events v
    where v.create_time >= h.hour and v.create_time < h.hour + interval '1 hour'
        and v.state = 'processing' and v.lock_expire_time <= clock_timestamp()
        and ($1::text is null or v.tenant = $1) and ($2::text is null or v.provider = $2)
    offset 0
) e
group by 1, 2
