-- Whether commits on this server wait for a standby that is not there.
--
-- Out: one row.
-- Why it is safe: it changes nothing. It tells what is the matter, and decides nothing.
-- Index: none; it reads no table.
select not pg_is_in_recovery() and current_setting('synchronous_standby_names') <> '' and not exists (
    select from pg_stat_replication where state = 'streaming' and sync_state in ('sync', 'quorum')
)
