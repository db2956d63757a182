-- Folds the counts of some hours that a Cleanup has passed into one row each: without it every slot that ever wrote would leave
-- a row per hour for good.
--
-- In:  the hours (half open; cleanup_hours.sql bounds them), and the slot to fold into.
-- Why it is safe: the deletion takes each row as it stands when it is locked, and the insertion adds what was taken, in one
--      statement; a writer that waits for a deleted row inserts it anew. The sums over the slots never change.
--      Rows that a writer is changing right now are left for the next run, so that nobody is waited for with rows in hand;
--      rows of the slot itself are only ever locked in the order of the key, as a step of Cleanup does it. In any other order
--      two Cleanups at once would wait for each other.
-- Index: payment_webhook_counts_hour for the hours; for the deletion the primary key or payment_webhook_counts_tenant, which has
--      a row per slot for each.
with old as materialized (
    select slot, tenant, provider, hour from payment_webhook_counts
    where hour >= $1::timestamptz and hour < $2::timestamptz and slot <> $3::integer
    for update skip locked
),
taken as (
    delete from payment_webhook_counts c using old
    where c.slot = old.slot and c.tenant = old.tenant and c.provider = old.provider and c.hour = old.hour
    returning c.tenant, c.provider, c.hour, c.pending, c.processing, c.completed, c.failed, c.unknown, c.dead,
        c.duplicates, c.retries
)
insert into payment_webhook_counts as c (
    slot, tenant, provider, hour, pending, processing, completed, failed, unknown, dead, duplicates, retries
)
select $3::integer, tenant, provider, hour, sum(pending), sum(processing), sum(completed), sum(failed), sum(unknown),
    sum(dead), sum(duplicates), sum(retries)
from taken
group by tenant, provider, hour
order by 2, 3, 4
on conflict (slot, tenant, provider, hour) do update set
    pending = c.pending + excluded.pending,
    processing = c.processing + excluded.processing,
    completed = c.completed + excluded.completed,
    failed = c.failed + excluded.failed,
    unknown = c.unknown + excluded.unknown,
    dead = c.dead + excluded.dead,
    duplicates = c.duplicates + excluded.duplicates,
    retries = c.retries + excluded.retries
