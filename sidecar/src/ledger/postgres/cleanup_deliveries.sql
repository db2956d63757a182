-- Removes delivery ids that are older than the events a Cleanup may delete. In: the moment, tenant and provider (null:
-- all), and how many at most. Index: payment_webhook_deliveries_create_time.
with old as materialized (
    select tenant, provider, delivery_id from payment_webhook_deliveries
    where create_time < $1::timestamptz
        and ($2::text is null or tenant = $2) and ($3::text is null or provider = $3)
    order by create_time
    limit $4::integer
    for update skip locked
)
delete from payment_webhook_deliveries d using old
where d.tenant = old.tenant and d.provider = old.provider and d.delivery_id = old.delivery_id
