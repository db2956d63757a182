-- Adds processing times to the histograms of the session's slot (L5). Not repeatable: it adds.
--
-- In:  tenant, provider, hour, bucket and count as arrays, sorted by the first four; $6 is the session's slot.
-- Why it is safe: the row that is added to is locked, and read as it stands then; two sessions on one slot lose nothing.
-- Index: the primary key.
insert into payment_webhook_timings as t (slot, tenant, provider, hour, buckets, counts)
select $6::integer, q.tenant, q.provider, q.hour, array_agg(q.bucket order by q.bucket), array_agg(q.count order by q.bucket)
from unnest($1::text[], $2::text[], $3::timestamptz[], $4::smallint[], $5::bigint[])
    as q (tenant, provider, hour, bucket, count)
group by q.tenant, q.provider, q.hour
order by 2, 3, 4
on conflict (slot, tenant, provider, hour) do update set (buckets, counts) = (
    select array_agg(s.bucket order by s.bucket), array_agg(s.count order by s.bucket)
    from (
        select u.bucket, sum(u.count)::bigint as count
        from (
            select * from unnest(t.buckets, t.counts) as had (bucket, count)
            union all
            select * from unnest(excluded.buckets, excluded.counts) as added (bucket, count)
        ) u
        group by u.bucket
    ) s
)
