-- As stats_timings.sql, by day: where hours need not be told apart.
--
-- In:  tenant and provider (null: all), bounds on the day (half open).
-- Index: payment_webhook_timing_days_tenant with a tenant, otherwise payment_webhook_timing_days_day; both have the order, and
--      nothing is sorted.
select day, provider, buckets, counts
from payment_webhook_timing_days
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and day >= $3::timestamptz and day < $4::timestamptz
order by day
