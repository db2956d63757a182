-- Records a delivery id that was not known. Assumes: the transaction is immediate and has looked for it in vain.
-- Index: adds to the primary key and payment_webhook_deliveries_create_time.
insert into payment_webhook_deliveries (tenant, provider, delivery_id, payload_digest, create_time)
values (?1, ?2, ?3, ?4, ?5)
