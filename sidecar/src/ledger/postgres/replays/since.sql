-- What was replayed by force since an earlier read (C7).
--
-- In:  the snapshot of that read.
-- Why it misses none: neither tokens nor times become visible in their order, for a commit may take as long as it likes. Each
--      row has its transaction's number instead, and what the earlier snapshot did not show is told by that alone. Numbers
--      that this server has not given out yet came with a restored copy; the read of everything has had them.
-- Index: payment_webhook_resolutions_replays, from the oldest transaction that was open then.
replayed as materialized (
    select r.event_row, r.fencing_token
    from payment_webhook_resolutions r
    where r.from_state = 'completed'
        and r.transaction_id >= pg_snapshot_xmin($1::text::pg_snapshot)
        and r.transaction_id < pg_snapshot_xmax(pg_current_snapshot())
        and not pg_visible_in_snapshot(r.transaction_id, $1::text::pg_snapshot)
)
