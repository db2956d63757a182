-- Events that are processing past their lock's expiry, by creation and provider.
--
-- In:  tenant and provider (null: all), bounds on the creation (half open), now.
-- Index: payment_webhook_events_processing, from its beginning to now: it has nothing but such events there.
select create_time, provider
from payment_webhook_events indexed by payment_webhook_events_processing
where state = 'processing' and lock_expire_time <= ?5
    and (?1 is null or tenant = ?1) and (?2 is null or provider = ?2)
    and create_time >= ?3 and create_time < ?4
