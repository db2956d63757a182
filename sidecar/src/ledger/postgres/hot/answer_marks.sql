-- 'marked': the same, in the columns of the other answers.
select
    'marked' as source, place, now, false as claim_ended,
    id, null::text as tenant, null::text as provider, null::text as event_id, event_type, state, attempt_count,
    attempts_forgiven, duplicate_count, mismatch_count, last_mismatch_time, null::bigint as fencing_token, create_time,
    null::timestamptz as update_time, null::timestamptz as end_time, null::timestamptz as retry_time, fingerprint, metadata,
    completion_metadata, null::integer as result_code, null::bytea as result_body, null::text as result_content_type,
    last_error, claim_id, holder, start_time, lock_expire_time, null::text as outcome, payload_digest
from marked
