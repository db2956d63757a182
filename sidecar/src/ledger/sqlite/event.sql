-- One event by its key.
--
-- In:  tenant, provider, event id. Out: its row, or none.
-- Assumes: nothing; whoever goes on to change the row does so in the same immediate transaction.
-- Index: payment_webhook_events_key.
select
    id, tenant, provider, event_id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count,
    last_mismatch_time, fencing_token, create_time, update_time, end_time, retry_time, claim_id, holder, start_time,
    lock_expire_time, outcome, payload_digest, fingerprint, last_error, result_code, result_content_type, result_body,
    metadata, completion_metadata
from payment_webhook_events
where tenant = ?1 and provider = ?2 and event_id = ?3
