-- Adds the duplicates and mismatches that were counted in memory to their events, and the duplicates to the counts.
--
-- In:  keys and counts as arrays, sorted by key; $7 is the session's slot; $8 and $9 the row's number and its creation, where whoever
--      counted has read them. Events deleted meanwhile are passed over.
-- Out: nothing.
-- Index: payment_webhook_events_key for those without a number, then any that has the number: ranges of all its columns, as in
--      hot/own_completions.sql. The update is heap-only. It locks the rows itself, in the order of the keys, and adds to what
--      then stands in them: no lock is needed before.
-- OFFSET keeps the planner from turning the look-up into a join over the whole table (a plan trap).
with held as materialized (
    select q.duplicates, q.mismatches, q.last_mismatch_time, coalesce(q.id, v.id) as id,
        coalesce(q.create_time, v.create_time) as create_time
    from unnest(
        $1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::timestamptz[], $8::bigint[], $9::timestamptz[]
    ) as q (tenant, provider, event_id, duplicates, mismatches, last_mismatch_time, id, create_time)
    left join lateral (
        select e.id, e.create_time
        from payment_webhook_events e
        where q.id is null and e.tenant = q.tenant and e.provider = q.provider and e.event_id = q.event_id
        offset 0
    ) v on true
),
flushed as (
    update payment_webhook_events e set
        duplicate_count = e.duplicate_count + h.duplicates,
        mismatch_count = e.mismatch_count + h.mismatches,
        last_mismatch_time = greatest(e.last_mismatch_time, h.last_mismatch_time)
    from held h
    where e.id between h.id and h.id and e.create_time between h.create_time and h.create_time
    returning e.tenant, e.provider, e.create_time, h.duplicates
)
insert into payment_webhook_counts as c (slot, tenant, provider, hour, duplicates)
select $7::integer, f.tenant, f.provider, date_bin('1 hour', f.create_time, 'epoch') as hour, sum(f.duplicates)
from flushed f
group by f.tenant, f.provider, date_bin('1 hour', f.create_time, 'epoch')
order by 2, 3, 4
on conflict (slot, tenant, provider, hour) do update set duplicates = c.duplicates + excluded.duplicates
