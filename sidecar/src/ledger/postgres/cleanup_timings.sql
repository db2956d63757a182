-- Removes the processing times of some hours that a Cleanup has passed and left without a completed event.
--
-- In:  the hours (half open; cleanup_hours.sql bounds them).
-- Why it is safe: an hour that long ago gets no new events; one that is completed late puts its time into a new row. Rows
--      that somebody is changing are left for the next run.
-- Index: payment_webhook_timings_hour for the hours, payment_webhook_counts_tenant for what they have, and for the deletion the
--      primary key or payment_webhook_timings_tenant, which has a row per slot for each.
with old as materialized (
    select slot, tenant, provider, hour from payment_webhook_timings t
    where t.hour >= $1::timestamptz and t.hour < $2::timestamptz
        and not exists (
            select from payment_webhook_counts c
            where c.hour = t.hour and c.tenant = t.tenant and c.provider = t.provider
            having sum(c.completed) > 0
        )
    for update of t skip locked
),
deleted as (
    delete from payment_webhook_timings t using old
    where t.slot = old.slot and t.tenant = old.tenant and t.provider = old.provider and t.hour = old.hour
)
-- For this transaction alone, as in cleanup.sql: nobody waits for the disk.
select set_config('synchronous_commit', 'off', true) as synchronous_commit
