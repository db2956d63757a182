-- Buckets of days whose times are not the sum of those of the day's hours. Index: none; all of both is read.
select tenant, provider, day, bucket, sum(kept), sum(recounted)
from (
    select tenant, provider, day, bucket, count as kept, 0 as recounted from payment_webhook_timing_days
    union all
    select tenant, provider, hour - hour % 86400000000, bucket, 0, count from payment_webhook_timings
)
group by tenant, provider, day, bucket
having sum(kept) <> sum(recounted)
order by tenant, provider, day, bucket
