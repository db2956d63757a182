-- Folds the counts of hours that a Cleanup has passed into one row each, and drops those that are all zero: without it every
-- slot that ever wrote would leave a row per hour for good.
--
-- In:  the moment up to which hours are folded, and the slot to fold into.
-- Why it is safe: the deletion takes each row as it stands when it is locked, and the insertion adds what was taken, in one
--      statement; a writer that waits for a deleted row inserts it anew, and what another Cleanup has inserted meanwhile
--      is added to. The sums over the slots never change.
-- Index: none that helps; the table has a row per slot, tenant, provider and hour.
with taken as (
    delete from payment_webhook_counts where hour < $1::timestamptz
    returning tenant, provider, hour, pending, processing, completed, failed, unknown, dead, duplicates, retries
)
insert into payment_webhook_counts as c (
    slot, tenant, provider, hour, pending, processing, completed, failed, unknown, dead, duplicates, retries
)
select $2::integer, tenant, provider, hour, sum(pending), sum(processing), sum(completed), sum(failed), sum(unknown),
    sum(dead), sum(duplicates), sum(retries)
from taken
group by tenant, provider, hour
having (sum(pending), sum(processing), sum(completed), sum(failed), sum(unknown), sum(dead), sum(duplicates), sum(retries))
    <> (0, 0, 0, 0, 0, 0, 0, 0)
on conflict (slot, tenant, provider, hour) do update set
    pending = c.pending + excluded.pending,
    processing = c.processing + excluded.processing,
    completed = c.completed + excluded.completed,
    failed = c.failed + excluded.failed,
    unknown = c.unknown + excluded.unknown,
    dead = c.dead + excluded.dead,
    duplicates = c.duplicates + excluded.duplicates,
    retries = c.retries + excluded.retries
