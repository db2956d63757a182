-- What was replayed by force since an earlier read (C7).
--
-- In:  the snapshot of that read.
-- Out: as replays.sql, with the snapshot to read on from next.
-- Why it misses none: neither tokens nor times become visible in their order, for a commit may take as long as it likes. Each
--      row has its transaction's number instead, and what the earlier snapshot did not show is told by that alone. Numbers
--      that this server has not given out yet came with a restored copy; the read of everything has had them.
-- Index: payment_webhook_resolutions_replays, from the oldest transaction that was open then; the primary key of the events.
with node as materialized (
    select concat_ws(
            ':',
            (select system_identifier from pg_control_system()),
            case when pg_is_in_recovery() then '' else substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) end,
            (select oid from pg_database where datname = current_database()),
            (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint
        ) as identity,
        pg_current_snapshot()::text as snapshot,
        clock_timestamp() as now
),
replayed as materialized (
    select r.event_row, r.fencing_token
    from payment_webhook_resolutions r
    where r.from_state = 'completed'
        and r.transaction_id >= pg_snapshot_xmin($1::text::pg_snapshot)
        and r.transaction_id < pg_snapshot_xmax(pg_current_snapshot())
        and not pg_visible_in_snapshot(r.transaction_id, $1::text::pg_snapshot)
)
select n.identity, n.snapshot, n.now, null::text as tenant, null::text as provider, null::text as event_id,
    null::bigint as fencing_token
from node n
union all
select null, null, null, e.tenant, e.provider, e.event_id, r.fencing_token
from replayed r
cross join lateral (select v.tenant, v.provider, v.event_id from payment_webhook_events v where v.id = r.event_row limit 1) e
