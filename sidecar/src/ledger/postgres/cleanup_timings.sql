-- Removes the processing times of hours that a Cleanup has passed and left without a completed event.
--
-- In:  the moment up to which hours are looked at.
-- Why it is safe: an hour that long ago gets no new events; one that is completed late puts its time into a new row.
-- Index: payment_webhook_timings_hour, payment_webhook_counts_hour.
delete from payment_webhook_timings t
where t.hour < $1::timestamptz
    and not exists (
        select from payment_webhook_counts c
        where c.hour = t.hour and c.tenant = t.tenant and c.provider = t.provider
        having sum(c.completed) > 0
    )
