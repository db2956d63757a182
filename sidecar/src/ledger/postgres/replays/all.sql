-- What was replayed by force, the newest first: all that caches have to know when they begin (C7).
--
-- In:  the most rows.
-- Why it is complete: one statement, one snapshot. What it does not see is not visible in that snapshot, and since.sql asks
--      for exactly that.
-- Index: payment_webhook_resolutions_replays, all of it.
replayed as materialized (
    select r.event_row, r.fencing_token
    from payment_webhook_resolutions r
    where r.from_state = 'completed'
    order by r.fencing_token desc
    limit $1::bigint
)
