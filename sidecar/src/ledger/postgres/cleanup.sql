-- One bounded step of Cleanup: looks at the next rows in order of creation and deletes those that the scope covers.
--
-- In:  where the last step ended, the moment before which events must have ended, states, tenant and provider (null:
--      all), the number of rows, whether to delete, the writer's slot. Open events never go, whatever the states say.
-- Out: a row per provider with totals, or one with none; each with where this step ended and how many rows it looked at.
-- Why it is safe: an event that ended before the moment was created before it, so the walk by creation misses none. The window
--      bounds the work by rows looked at, not by rows found. Rows that somebody else has locked are skipped: they are being
--      changed or deleted right now. What is open is never deleted, whatever the caller says. State and end are evaluated on
--      the locked version. ANY keeps the planner from walking a whole table beside the list, and the time from looking for an
--      id in the index that begins with it: by statistics of a handful of rows, as an earlier Cleanup leaves them, both looked
--      cheap (measured).
-- Index: payment_webhook_events_create_time for the window, the primary keys for the rest.
with span as materialized (
    select e.id, e.create_time
    from payment_webhook_events e
    where (e.create_time, e.id) > ($1::timestamptz, $2::bigint) and e.create_time < $3::timestamptz
    order by e.create_time, e.id
    limit $7::integer
),
old as materialized (
    select v.id, v.tenant, v.provider, v.state, v.claim_id, v.create_time, v.duplicate_count, v.attempt_count,
        coalesce(v.end_time, v.update_time) as end_time
    from span s
    cross join lateral (
        select * from payment_webhook_events e
        where e.id = s.id and e.state = any ($4::text[]) and e.state not in ('pending', 'processing')
            and e.create_time = s.create_time
            and coalesce(e.end_time, e.update_time) < $3
            and ($5::text is null or e.tenant = $5) and ($6::text is null or e.provider = $6)
        for update skip locked
    ) v
    where $8::boolean
),
counted_only as materialized (
    select e.id, e.provider, coalesce(e.end_time, e.update_time) as end_time
    from span s join payment_webhook_events e on e.id = any (array[s.id]) and e.create_time = any (array[s.create_time])
    where not $8::boolean
        and e.state = any ($4::text[]) and e.state not in ('pending', 'processing')
        and coalesce(e.end_time, e.update_time) < $3
        and ($5::text is null or e.tenant = $5) and ($6::text is null or e.provider = $6)
),
attempts as (
    -- Only where an archive can exist: after a second attempt, or where a resolution closed the first.
    delete from payment_webhook_attempts a using old
    where a.event_row = any (array[old.id]) and (old.attempt_count > 1 or old.claim_id is null)
),
resolutions as (
    -- A resolution always leaves the latest attempt closed or another one after it.
    delete from payment_webhook_resolutions r using old
    where r.event_row = any (array[old.id]) and (old.attempt_count > 1 or old.claim_id is null)
),
deleted as (
    delete from payment_webhook_events e using old
    where e.id = any (array[old.id]) and e.create_time = any (array[old.create_time])
    returning old.tenant, old.provider, old.state, old.create_time, old.duplicate_count, old.attempt_count, old.end_time
),
counted as (
    insert into payment_webhook_counts as c (
        slot, tenant, provider, hour, completed, failed, unknown, dead, duplicates, retries
    )
    select $9::integer, d.tenant, d.provider, date_bin('1 hour', d.create_time, 'epoch') as hour,
        -count(*) filter (where d.state = 'completed'), -count(*) filter (where d.state = 'failed'),
        -count(*) filter (where d.state = 'unknown'), -count(*) filter (where d.state = 'dead'),
        -sum(d.duplicate_count), -sum(greatest(d.attempt_count - 1, 0))
    from deleted d
    group by d.tenant, d.provider, date_bin('1 hour', d.create_time, 'epoch')
    order by 2, 3, 4
    on conflict (slot, tenant, provider, hour) do update set
        completed = c.completed + excluded.completed,
        failed = c.failed + excluded.failed,
        unknown = c.unknown + excluded.unknown,
        dead = c.dead + excluded.dead,
        duplicates = c.duplicates + excluded.duplicates,
        retries = c.retries + excluded.retries
),
totals as (
    select provider, count(*) as matched, count(*) filter (where removed) as deleted, min(end_time) as oldest_end_time
    from (
        select provider, end_time, true as removed from deleted
        union all
        select provider, end_time, false from counted_only
    ) t
    group by provider
)
select
    (select count(*) from span) as looked_at,
    (select s.create_time from span s order by s.create_time desc, s.id desc limit 1) as last_create_time,
    (select s.id from span s order by s.create_time desc, s.id desc limit 1) as last_row,
    t.provider, t.matched, t.deleted, t.oldest_end_time,
    -- For this transaction alone. What a crash brings back the next run deletes; nobody waits for the disk.
    set_config('synchronous_commit', 'off', true) as synchronous_commit
from (select 1) one left join totals t on true
