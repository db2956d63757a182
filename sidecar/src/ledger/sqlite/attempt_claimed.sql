-- Whether an attempt in the archive was granted to this claim (S4).
--
-- In:  the event's row, the claim id. Out: one row if so. Index: payment_webhook_attempts_claim.
select 1 from payment_webhook_attempts where event_row = ?1 and claim_id = ?2 limit 1
