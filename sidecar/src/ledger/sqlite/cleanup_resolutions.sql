-- Deletes the resolutions of an event that goes. In: the event's row. Index: the primary key.
delete from payment_webhook_resolutions where event_row = ?1
