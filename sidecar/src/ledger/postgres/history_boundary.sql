-- The last row that history_page.sql looked at in the same snapshot, if there may be more behind it.
--
-- In:  where it began, the earliest creation, and the most rows that it looked at.
-- Out: the place of the last of them; no row: there were fewer. Index: payment_webhook_events_create_time, alone.
select v.create_time, v.id
from payment_webhook_events v
where (v.create_time, v.id) < ($1::timestamptz, $2::bigint) and v.create_time >= $3::timestamptz
order by v.create_time desc, v.id desc
offset $4::bigint - 1
limit 1
