-- Processing times by hour of creation, provider and bucket (L5).
--
-- In:  tenant and provider (null: all), bounds on the hour (half open).
-- Index: a walk along the primary key; the table has a row per tenant, provider, hour and bucket.
select hour, provider, bucket, sum(count)
from payment_webhook_timings
where (?1 is null or tenant = ?1) and (?2 is null or provider = ?2) and hour >= ?3 and hour < ?4
group by hour, provider, bucket
