-- Processing times by provider and hour of creation, in the order of the hours: a row per writer's slot and tenant, which the
-- caller adds up (L5).
--
-- In:  tenant and provider (null: all), bounds on the hour (half open).
-- Index: payment_webhook_timings_tenant with a tenant, otherwise payment_webhook_timings_hour; both have the order, and nothing is
--      sorted.
select hour, provider, buckets, counts
from payment_webhook_timings
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and hour >= $3::timestamptz and hour < $4::timestamptz
order by hour
