-- Events that are processing past their lock's expiry, by hour of creation and provider.
--
-- In:  tenant and provider (null: all), bounds on the creation: the caller narrows them to the hours that the counts say
--      have processing events. Index: payment_webhook_events_create_time.
select date_trunc('hour', create_time, 'UTC') as hour, provider, count(*) as stuck
from payment_webhook_events
where create_time >= $3::timestamptz and create_time < $4::timestamptz
    and state = 'processing' and lock_expire_time <= clock_timestamp()
    and ($1::text is null or tenant = $1) and ($2::text is null or provider = $2)
group by 1, 2
