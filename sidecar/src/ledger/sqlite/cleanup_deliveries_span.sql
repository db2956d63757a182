-- How far a Cleanup's step over the delivery ids goes, in the order in which they came: to the time of the last of so many. It
-- is bounded by rows looked at, not by rows found: where millions of another provider's are kept, all calls would wait
-- meanwhile.
--
-- In:  where the last step ended, the moment before which they must have come, the number of rows.
-- Out: that time; no row: there are fewer. Index: payment_webhook_deliveries_create_time, alone.
select create_time
from payment_webhook_deliveries
where create_time > ?1 and create_time < ?2
order by create_time
limit 1 offset ?3 - 1
