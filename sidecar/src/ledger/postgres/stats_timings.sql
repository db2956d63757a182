-- Processing times by provider and by day, and where days have to be taken apart, by hour of creation: a row per writer's slot and
-- tenant, which the caller adds up (L5).
--
-- In:  tenant and provider (null: all), and the bounds: from $3 by hour, from $4 by day, from $5 by hour again, up to $6.
-- Index: payment_webhook_timings_hour, payment_webhook_timing_days_day: a branch each.
select hour, provider, buckets, counts
from payment_webhook_timings
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and hour >= $3::timestamptz and hour < $4::timestamptz
union all
select day, provider, buckets, counts
from payment_webhook_timing_days
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and day >= $4::timestamptz and day < $5::timestamptz
union all
select hour, provider, buckets, counts
from payment_webhook_timings
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and hour >= $5::timestamptz and hour < $6::timestamptz
