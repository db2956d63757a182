-- The node: its identity (as connect.rs puts it together), the snapshot to read on from, and the clock.
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
