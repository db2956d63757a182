-- The latest attempts of one event that are in the archive, the latest first.
--
-- In:  the event's row, and how many at most.
-- Out: its attempts, without the latest one, which stands on the event.
-- Index: the primary key.
select
    attempt, fencing_token, claim_id, holder, start_time, end_time, outcome, error, payload_digest, result_code,
    result_content_type, result_body
from payment_webhook_attempts
where event_row = ?1
order by attempt desc
limit ?2
