-- Takes the first slot that is free: an advisory lock of the session, which ends with the connection.
--
-- In:  the class of the locks, the first slot and the last.
-- Out: the slot; no row: none is free.
-- Why it is safe: the server gives a lock to one session, and none is waited for. Two sessions on one slot, behind a pooler
--      that hands out transactions, would wait for each other's rows and count right all the same.
-- Index: none; it reads no table.
with recursive taken (slot, free) as (
    select $2, pg_try_advisory_lock($1, $2)
    union all
    select slot + 1, pg_try_advisory_lock($1, slot + 1) from taken where not free and slot < $3
)
select slot from taken where free
