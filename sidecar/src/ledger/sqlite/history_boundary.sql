-- The last row that the next part of a page looks at, if there may be more behind it.
--
-- In:  where the last part ended (time, row), the earliest creation, and the most rows to look at.
-- Out: the place of the last of them; no row: there are fewer. Index: payment_webhook_events_create_time, alone.
select create_time, id
from payment_webhook_events
where (create_time, id) < (?1, ?2) and create_time >= ?3
order by create_time desc, id desc
limit 1 offset ?4 - 1
