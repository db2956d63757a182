-- What was replayed by force, for the caches: a cached completion from before a replay must not be believed, however genuine it
-- is, so every sidecar reads all replays when it connects, and what is new twice a second (C7).

-- The transaction that recorded it, so that "new" can be told exactly: neither tokens nor times become visible in their order.
-- Rows of before have none; they are read with everything.
alter table payment_webhook_resolutions add column transaction_id xid8;
alter table payment_webhook_resolutions alter column transaction_id set default pg_current_xact_id();

-- Of replays alone, which are rare, and of what never changes: nothing is paid for it by an event that completes, and a
-- resolution of another state does not stand in it.
create index payment_webhook_resolutions_replays on payment_webhook_resolutions (transaction_id)
where from_state = 'completed';

-- The version before writes no transaction, and the column's default does it for it; it heeds no replay, as before.
update oncegate_meta set value = '2' where key = 'schema_compatible_from';
