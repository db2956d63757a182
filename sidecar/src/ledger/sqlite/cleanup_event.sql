-- Deletes one event of a Cleanup. In: the row. Index: the primary key.
delete from payment_webhook_events where id = ?1
