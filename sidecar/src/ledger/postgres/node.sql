-- What a node is: what a connection has to know of it before it may decide anything.
--
-- Out: one row. The identity, which connect.rs puts together, is another one after a restore, after a promotion, and in a copy:
--        timeline: from the name of the current WAL file. pg_control_checkpoint() still tells the old one after a promotion. A
--            standby cannot be asked for it.
--        started: a restored snapshot of the disk has everything else of its original, but has to be started.
--        database: a copy within one server has its original's cache key; its own number tells them apart.
--      commits_wait: a statement of a session of ours has been over its time-out for longer than its client waits, and cannot be
--            cancelled any more. The server does not notice that its client has gone: without a look at these, each attempt to
--            connect anew would leave one more of them, until nobody could connect. A role sees its own sessions.
--      sees_standbys: who does not see them is told that a standby is there, and nothing of it.
-- Why it is safe: it changes nothing, and its connection is not used before it has been read.
-- Index: the primary key of oncegate_meta; the rest is no table.
select
    pg_is_in_recovery() or current_setting('transaction_read_only')::boolean as read_only,
    (select system_identifier from pg_control_system())::text as system_identifier,
    case when pg_is_in_recovery() then '' else substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) end as timeline,
    (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint as started,
    (select oid from pg_database where datname = current_database())::text as database,
    exists (
        select from pg_stat_activity
        where datname = current_database() and application_name in ('oncegate-writer', 'oncegate-counts')
            and state = 'active'
            -- As Postgres 17 spells them too.
            and lower(wait_event) in ('syncrep', 'walsync', 'walwrite')
            and query_start < clock_timestamp() - interval '1400 milliseconds'
    ) as commits_wait,
    current_setting('synchronous_commit') as synchronous_commit,
    current_setting('fsync') as fsync,
    current_setting('full_page_writes') as full_page_writes,
    current_setting('synchronous_standby_names') as synchronous_standby_names,
    pg_has_role('pg_read_all_stats', 'usage') as sees_standbys,
    (select coalesce(array_agg(concat_ws(' ', application_name, state, sync_state)), '{}') from pg_stat_replication)
        as standbys,
    exists (select from pg_stat_replication where state = 'streaming' and sync_state in ('sync', 'quorum'))
        as synchronous_standby,
    (select value from oncegate_meta where key = 'cache_key') as cache_key
