-- Processing times of whole days, so that Stats over months reads a row a day where it read 24: with 10 million events of 30 days
-- that was most of its time, bucket by bucket.

-- As payment_webhook_timings, by day (UTC) of the events' creation: always the sum of that day's hours, of the same slot.
create table payment_webhook_timing_days (
    slot                integer     not null,
    tenant              text collate "C" not null,
    provider            text collate "C" not null,
    day                 timestamptz not null,
    buckets             smallint[]  not null,
    counts              bigint[]    not null,
    constraint payment_webhook_timing_days_pkey primary key (slot, tenant, provider, day)
) with (fillfactor = 50);

create index payment_webhook_timing_days_day on payment_webhook_timing_days (day);

-- What a sidecar adds between the sum and the trigger would be missed. Its flush waits meanwhile (a second for 10 million
-- events), and is tried again if it has to wait longer than it may.
lock table payment_webhook_timings in share row exclusive mode;

insert into payment_webhook_timing_days (slot, tenant, provider, day, buckets, counts)
select s.slot, s.tenant, s.provider, s.day, array_agg(s.bucket order by s.bucket), array_agg(s.count order by s.bucket)
from (
    select t.slot, t.tenant, t.provider, date_trunc('day', t.hour, 'UTC') as day, b.bucket, sum(b.count)::bigint as count
    from payment_webhook_timings t
    cross join lateral unnest(t.buckets, t.counts) as b (bucket, count)
    group by 1, 2, 3, 4, 5
) s
group by 1, 2, 3, 4;

-- Kept by the table of hours itself, so that whoever writes there keeps it: the version before this one too, during a roll-out.
-- It runs once a statement, of which each writer makes one a second. What is added and what is taken away is summed first, so
-- that a day is written once; hours are locked before days, and days in the order of their keys.
create function payment_webhook_timings_to_days() returns trigger language plpgsql as $$
declare
    added payment_webhook_timings[];
    removed payment_webhook_timings[];
begin
    if tg_op <> 'DELETE' then
        select array_agg(t) into added from come t;
    end if;
    if tg_op <> 'INSERT' then
        select array_agg(t) into removed from gone t;
    end if;
    insert into payment_webhook_timing_days as d (slot, tenant, provider, day, buckets, counts)
    select s.slot, s.tenant, s.provider, s.day, array_agg(s.bucket order by s.bucket), array_agg(s.count order by s.bucket)
    from (
        select q.slot, q.tenant, q.provider, date_trunc('day', q.hour, 'UTC') as day, q.bucket, sum(q.count)::bigint as count
        from (
            select t.slot, t.tenant, t.provider, t.hour, b.bucket, b.count
            from unnest(added) t cross join lateral unnest(t.buckets, t.counts) as b (bucket, count)
            union all
            select t.slot, t.tenant, t.provider, t.hour, b.bucket, -b.count
            from unnest(removed) t cross join lateral unnest(t.buckets, t.counts) as b (bucket, count)
        ) q
        group by 1, 2, 3, 4, 5
        having sum(q.count) <> 0
    ) s
    group by 1, 2, 3, 4
    order by 1, 2, 3, 4
    on conflict (slot, tenant, provider, day) do update set (buckets, counts) = (
        select coalesce(array_agg(s.bucket order by s.bucket), '{}'), coalesce(array_agg(s.count order by s.bucket), '{}')
        from (
            select u.bucket, sum(u.count)::bigint as count
            from (
                select * from unnest(d.buckets, d.counts) as had (bucket, count)
                union all
                select * from unnest(excluded.buckets, excluded.counts) as change (bucket, count)
            ) u
            group by u.bucket
            having sum(u.count) <> 0
        ) s
    );
    if tg_op = 'DELETE' then
        -- A day whose last hour went says nothing. One that somebody adds to meanwhile is looked at again, and stays.
        delete from payment_webhook_timing_days d
        using (select distinct slot, tenant, provider, date_trunc('day', hour, 'UTC') as day from unnest(removed)) r
        where d.slot = r.slot and d.tenant = r.tenant and d.provider = r.provider and d.day = r.day and d.buckets = '{}';
    end if;
    return null;
end
$$;

create trigger payment_webhook_timings_added after insert on payment_webhook_timings
referencing new table as come
for each statement execute function payment_webhook_timings_to_days();

create trigger payment_webhook_timings_changed after update on payment_webhook_timings
referencing old table as gone new table as come
for each statement execute function payment_webhook_timings_to_days();

create trigger payment_webhook_timings_removed after delete on payment_webhook_timings
referencing old table as gone
for each statement execute function payment_webhook_timings_to_days();

-- The version before needs to know nothing of it.
update oncegate_meta set value = '2' where key = 'schema_compatible_from';
