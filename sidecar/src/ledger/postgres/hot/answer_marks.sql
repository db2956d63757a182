-- 'marked': the event as it stands after the mark, without the result, which the caller sent.
select
    'marked' as source, place, now, false as claim_ended,
    id, tenant, provider, event_id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count,
    last_mismatch_time, fencing_token, create_time, update_time, end_time, retry_time, fingerprint, metadata,
    completion_metadata, null::integer as result_code, null::bytea as result_body, null::text as result_content_type,
    last_error, claim_id, holder, start_time, lock_expire_time, outcome, payload_digest
from marked
