-- The latest archived attempts of one event, the latest first, as many as may be listed. Index: the primary key.
select attempt as archived_attempt, fencing_token as archived_fencing_token, claim_id as archived_claim_id,
    holder as archived_holder, start_time as archived_start_time, end_time as archived_end_time,
    outcome as archived_outcome, error as archived_error, payload_digest as archived_payload_digest,
    result_code as archived_result_code, result_body as archived_result_body,
    result_content_type as archived_result_content_type
from payment_webhook_attempts
where event_row = $1
order by attempt desc
limit $2
