-- Counts by bucket of the hour of creation and by provider, summed over the writers' slots (L5).
--
-- In:  tenant and provider (null: all), bounds on the hour (half open), the bucket in microseconds, counted from the first bound
--      (null: all hours are one), and whether providers are told apart (otherwise all stand under an empty name).
-- Index: payment_webhook_counts_tenant with a tenant, otherwise payment_webhook_counts_hour: the table has a row per slot, tenant,
--      provider and hour. Planned anew each time, and only so does the tenant count as given. Summed to what is reported and not to
--      hours: of thirty days these are thousands, and handing them over took twice as long as adding them up.
select case when $5::bigint is null then $3 else date_bin($5 * interval '1 microsecond', hour, $3) end as bucket,
    case when $6::boolean then provider else '' end as provider, sum(pending)::bigint as pending,
    sum(processing)::bigint as processing, sum(completed)::bigint as completed, sum(failed)::bigint as failed,
    sum(unknown)::bigint as unknown, sum(dead)::bigint as dead, sum(duplicates)::bigint as duplicates,
    sum(retries)::bigint as retries
from payment_webhook_counts
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and hour >= $3::timestamptz and hour < $4::timestamptz
group by 1, 2
