-- Counts by hour of creation and provider (L5).
--
-- In:  tenant and provider (null: all), bounds on the hour (half open).
-- Index: a walk along the primary key; the table has a row per tenant, provider and hour.
select hour, provider, sum(pending), sum(processing), sum(completed), sum(failed), sum(unknown), sum(dead),
    sum(duplicates), sum(retries)
from payment_webhook_counts
where (?1 is null or tenant = ?1) and (?2 is null or provider = ?2) and hour >= ?3 and hour < ?4
group by hour, provider
