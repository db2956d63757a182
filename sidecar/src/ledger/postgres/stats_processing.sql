-- How many events are processing, by hour of creation: read where fewer of them are known as open than there are, to find
-- the hours of those that are missed.
--
-- In:  tenant and provider (null: all), bounds on the hour (half open).
-- Index: as stats.sql.
select hour, sum(processing)::bigint as processing
from payment_webhook_counts
where ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
    and hour >= $3::timestamptz and hour < $4::timestamptz
group by hour
having sum(processing) > 0
