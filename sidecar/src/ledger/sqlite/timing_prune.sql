-- Removes the processing times of one tenant, provider and hour when a Cleanup has left no completed event there.
--
-- In:  the three. Index: the primary keys.
delete from payment_webhook_timings
where tenant = ?1 and provider = ?2 and hour = ?3
    and not exists (
        select 1 from payment_webhook_counts
        where tenant = ?1 and provider = ?2 and hour = ?3 and completed > 0
    )
