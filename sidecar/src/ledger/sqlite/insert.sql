-- An event that was not known, with its first attempt (S1, S9).
--
-- In:  the row (its first token), the key, and what the claim gave. Out: nothing.
-- Assumes: the transaction is immediate and has looked for the key in vain; were it not so, the unique key would refuse.
-- Index: adds to payment_webhook_events_key, _create_time and _processing.
insert into payment_webhook_events (
    id, fencing_token, tenant, provider, event_id, event_type, state, outcome, attempt_count, create_time, update_time,
    start_time, lock_expire_time, claim_id, holder, payload_digest, fingerprint, metadata
) values (?1, ?1, ?2, ?3, ?4, ?5, 'processing', 'running', 1, ?6, ?6, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
