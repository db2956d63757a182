-- Buckets of days whose times are not the sum of those of the day's hours. Index: none; all of both is read.
select tenant, provider, day, bucket, sum(kept)::bigint as kept, sum(recounted)::bigint as recounted
from (
    select t.tenant, t.provider, t.day, b.bucket, b.count as kept, 0 as recounted
    from payment_webhook_timing_days t cross join lateral unnest(t.buckets, t.counts) as b (bucket, count)
    union all
    select t.tenant, t.provider, date_trunc('day', t.hour, 'UTC'), b.bucket, 0, b.count
    from payment_webhook_timings t cross join lateral unnest(t.buckets, t.counts) as b (bucket, count)
) u
group by tenant, provider, day, bucket
having sum(kept) <> sum(recounted)
order by tenant, provider, day, bucket
