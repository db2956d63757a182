-- Adds the duplicates and mismatches that were counted in memory to their event (L2).
--
-- In:  the key, duplicates, mismatches, when the last mismatch came (null: none did).
-- Out: the event's creation, for the counts; no row if the event was deleted meanwhile. Index: payment_webhook_events_key.
update payment_webhook_events set
    duplicate_count = duplicate_count + ?4,
    mismatch_count = mismatch_count + ?5,
    last_mismatch_time = nullif(max(coalesce(last_mismatch_time, 0), coalesce(?6, 0)), 0)
where tenant = ?1 and provider = ?2 and event_id = ?3
returning create_time
