-- What was replayed by force, the newest first: all that caches have to know when they begin (C7).
--
-- In:  the most rows.
-- Out: a row with the node's identity (as connect.rs puts it together), the snapshot to read on from, and the clock; and a row
--      per replay with the event's name and the token that was drawn.
-- Why it is complete: one statement, one snapshot. What it does not see is not visible in that snapshot, and
--      replays_since.sql asks for exactly that.
-- Index: payment_webhook_resolutions_replays, all of it; the primary key of the events.
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
    order by r.fencing_token desc
    limit $1::bigint
)
select n.identity, n.snapshot, n.now, null::text as tenant, null::text as provider, null::text as event_id,
    null::bigint as fencing_token
from node n
union all
select null, null, null, e.tenant, e.provider, e.event_id, r.fencing_token
from replayed r
cross join lateral (select v.tenant, v.provider, v.event_id from payment_webhook_events v where v.id = r.event_row limit 1) e
