-- Removes the counts of one tenant, provider and hour when a Cleanup has left no event there.
--
-- In:  the three. Index: the primary key. Without events there are neither duplicates nor retries.
delete from payment_webhook_counts
where tenant = ?1 and provider = ?2 and hour = ?3
    and pending = 0 and processing = 0 and completed = 0 and failed = 0 and unknown = 0 and dead = 0
