-- How far one step of folding goes: to the end of the hour that the last of so many rows of counts is of. Whole hours, because
-- what an hour says is the sum over its slots.
--
-- In:  the hours (half open), and the number of rows.
-- Out: the end of that hour; no row: there are fewer. Index: payment_webhook_counts_hour, alone.
select hour + interval '1 hour'
from payment_webhook_counts
where hour >= $1::timestamptz and hour < $2::timestamptz
order by hour
offset $3::integer - 1
limit 1
