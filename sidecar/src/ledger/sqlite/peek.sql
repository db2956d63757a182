-- Where an event is now. In: tenant, provider, event id. Index: payment_webhook_events_key.
select state, fencing_token from payment_webhook_events where tenant = ?1 and provider = ?2 and event_id = ?3
