-- One event, for History by key. Index: payment_webhook_events_key.
select
    e.id, e.tenant, e.provider, e.event_id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven,
    e.duplicate_count, e.mismatch_count, e.last_mismatch_time, e.fencing_token, e.create_time, e.update_time,
    e.end_time, e.retry_time, e.fingerprint, e.metadata::text as metadata,
    e.completion_metadata::text as completion_metadata, e.result_code, e.result_body, e.result_content_type,
    e.last_error, e.claim_id, e.holder, e.start_time, e.lock_expire_time, e.outcome, e.payload_digest
from payment_webhook_events e
where e.tenant = $1 and e.provider = $2 and e.event_id = $3
