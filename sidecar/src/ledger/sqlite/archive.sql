-- Puts an attempt that has ended into the archive, in the transaction that grants another one, resolves the event, or buries it
-- after a failure (S9).
--
-- In:  the event's row and the attempt. Out: nothing.
-- Index: adds to the primary key, payment_webhook_attempts_token and _claim.
insert into payment_webhook_attempts (
    event_row, attempt, fencing_token, claim_id, holder, start_time, end_time, outcome, error, payload_digest,
    result_code, result_content_type, result_body
) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
