-- Counts by hour of creation and provider, summed over the writers' slots (L5).
--
-- In:  tenant and provider (null: all), bounds on the hour (half open).
-- Index: payment_webhook_counts_tenant with a tenant, otherwise payment_webhook_counts_hour: the table has a row per slot, tenant,
--      provider and hour. Planned anew each time, and only so does the tenant count as given.
select hour, provider, sum(pending)::bigint as pending, sum(processing)::bigint as processing,
    sum(completed)::bigint as completed, sum(failed)::bigint as failed, sum(unknown)::bigint as unknown,
    sum(dead)::bigint as dead, sum(duplicates)::bigint as duplicates, sum(retries)::bigint as retries,
    clock_timestamp() as now
from payment_webhook_counts
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and hour >= $3::timestamptz and hour < $4::timestamptz
group by hour, provider
