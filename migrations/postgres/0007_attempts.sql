-- Attempts that another one followed, by their claim and by their token. Every further call on an event that was attempted more than
-- once asks whether its claim id is that of an attempt that has ended (S4), and a mark that was not applied asks for the attempt
-- of its token (S3): without these each of them read all attempts of the event, within the batch of everybody. Where attempts have
-- no cap and an event has 100,000, that took 20 ms. Only what follows a first attempt is written here, so an event that
-- completes at once pays nothing.
--
-- On a table with many attempts this takes a while (about a second a million), in which claims of what was attempted before wait.
create index payment_webhook_attempts_claim on payment_webhook_attempts (event_row, claim_id);
create index payment_webhook_attempts_token on payment_webhook_attempts (event_row, fencing_token);

-- The version before needs to know nothing of it.
update oncegate_meta set value = '2' where key = 'schema_compatible_from';
