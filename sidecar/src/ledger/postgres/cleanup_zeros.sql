-- Drops the counts of some hours that a Cleanup has passed where they say nothing any more.
--
-- In:  the hours (half open; cleanup_hours.sql bounds them).
-- Why it is safe: a row is looked at again when it is locked; one that somebody is changing is passed over, and one who waits
--      for a deleted row inserts it anew.
-- Index: payment_webhook_counts_hour for the hours; for the deletion the primary key or payment_webhook_counts_tenant, which has
--      a row per slot for each.
with old as materialized (
    select slot, tenant, provider, hour from payment_webhook_counts
    where hour >= $1::timestamptz and hour < $2::timestamptz
        and (pending, processing, completed, failed, unknown, dead, duplicates, retries) = (0, 0, 0, 0, 0, 0, 0, 0)
    for update skip locked
),
deleted as (
    delete from payment_webhook_counts c using old
    where c.slot = old.slot and c.tenant = old.tenant and c.provider = old.provider and c.hour = old.hour
)
-- For this transaction alone, as in cleanup.sql: nobody waits for the disk.
select set_config('synchronous_commit', 'off', true) as synchronous_commit
