-- One bounded step over the delivery ids: looks at the next ones in the order in which they came, and removes those that the
-- scope covers and that are older than the events a Cleanup may delete.
--
-- In:  where the last step ended, the moment, tenant and provider (null: all), the number of rows.
-- Out: how many rows it looked at, and where it ended.
-- Why it is safe: the window bounds the work by rows looked at, not by rows found: where millions of another provider's are
--      kept, a step that has to find some would read them all. What came in the same microsecond goes together, so that the
--      time alone says where a step ended and nothing is sorted: by statistics that tell of a handful of rows it looked cheap
--      to read and sort all that are old (measured). Rows that somebody else has locked are skipped: another Cleanup deletes
--      them right now.
-- Index: payment_webhook_deliveries_create_time for the window, the primary key for the rest.
with span as materialized (
    select tenant, provider, delivery_id, create_time
    from payment_webhook_deliveries
    where create_time > $1::timestamptz and create_time < $2::timestamptz
    order by create_time
    fetch first ($5::integer) rows with ties
),
old as materialized (
    select v.place
    from span s
    cross join lateral (
        select d.ctid as place from payment_webhook_deliveries d
        where d.tenant = s.tenant and d.provider = s.provider and d.delivery_id = s.delivery_id
        for update skip locked
    ) v
    where ($3::text is null or s.tenant = $3) and ($4::text is null or s.provider = $4)
),
deleted as (
    -- By where they are, as they are locked and never change: by the key, the same statistics made it walk the table here.
    delete from payment_webhook_deliveries d using old where d.ctid = old.place
)
select count(*) as looked_at, max(create_time) as last_create_time,
    -- For this transaction alone, as in cleanup.sql: nobody waits for the disk.
    set_config('synchronous_commit', 'off', true) as synchronous_commit
from span
