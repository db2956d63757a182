-- Deletes the archived attempts of an event that goes. In: the event's row. Index: the primary key.
delete from payment_webhook_attempts where event_row = ?1
