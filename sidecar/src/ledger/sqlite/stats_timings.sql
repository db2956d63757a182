-- Processing times by provider and bucket, by day, and where days have to be taken apart, by hour of creation: a row per
-- tenant, which the caller adds up (L5).
--
-- In:  tenant and provider (null: all), and the bounds: from ?3 by hour, from ?4 by day, from ?5 by hour again, up to ?6.
-- Index: the primary keys; a walk where no tenant and provider are given. The hours walk their own key only where some are
--      wanted.
select hour, provider, bucket, count
from payment_webhook_timings
where (?3 < ?4 or ?5 < ?6) and (?1 is null or tenant = ?1) and (?2 is null or provider = ?2)
    and (hour >= ?3 and hour < ?4 or hour >= ?5 and hour < ?6)
union all
select day, provider, bucket, count
from payment_webhook_timing_days
where (?1 is null or tenant = ?1) and (?2 is null or provider = ?2) and day >= ?4 and day < ?5
