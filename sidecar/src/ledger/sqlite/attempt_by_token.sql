-- The attempt in the archive that was granted this token: its own record decides about a late Mark (S3).
--
-- In:  the event's row, the token. Out: the attempt, or none. Index: payment_webhook_attempts_token.
select
    attempt, fencing_token, claim_id, holder, start_time, end_time, outcome, error, payload_digest, result_code,
    result_content_type, result_body
from payment_webhook_attempts
where event_row = ?1 and fencing_token = ?2
