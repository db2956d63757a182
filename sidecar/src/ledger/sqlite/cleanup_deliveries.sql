-- Removes delivery ids that are older than the events a Cleanup may delete.
--
-- In:  the moment, tenant and provider (null: all), the most rows. Index: payment_webhook_deliveries_create_time.
delete from payment_webhook_deliveries
where (tenant, provider, delivery_id) in (
    select tenant, provider, delivery_id
    from payment_webhook_deliveries
    where create_time < ?1 and (?2 is null or tenant = ?2) and (?3 is null or provider = ?3)
    order by create_time
    limit ?4
)
