-- The payload digest that a delivery id first came with.
--
-- In:  tenant, provider, delivery id. Out: the digest, or no row. Index: the primary key.
select payload_digest from payment_webhook_deliveries where tenant = ?1 and provider = ?2 and delivery_id = ?3
