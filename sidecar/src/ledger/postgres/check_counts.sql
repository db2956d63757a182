-- The counts that are kept, summed over the slots. Index: none; all of it is read.
select tenant, provider, hour, sum(pending)::bigint as pending, sum(processing)::bigint as processing,
    sum(completed)::bigint as completed, sum(failed)::bigint as failed, sum(unknown)::bigint as unknown,
    sum(dead)::bigint as dead, sum(duplicates)::bigint as duplicates, sum(retries)::bigint as retries
from payment_webhook_counts
group by tenant, provider, hour
