-- Removes the delivery ids of one step that the scope of a Cleanup covers.
--
-- In:  where the last step ended, where this one ends (cleanup_deliveries_span.sql), tenant and provider (null: all).
-- Index: payment_webhook_deliveries_create_time.
delete from payment_webhook_deliveries
where create_time > ?1 and create_time <= ?2 and (?3 is null or tenant = ?3) and (?4 is null or provider = ?4)
