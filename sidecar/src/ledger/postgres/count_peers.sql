-- How many sidecars the database has: the writer of each holds a slot, which is an advisory lock (take_slot.sql).
--
-- In:  the class of the writers' locks.
-- Out: the number, this sidecar among them.
-- Why it is safe: it changes nothing. A wrong number costs notifications that nobody hears, or waiters one interval (L9).
-- Index: none; the locks of the whole server are read, and those of other databases passed over.
select count(*) from pg_locks
where locktype = 'advisory' and granted and classid = $1::integer::oid
    and database = (select oid from pg_database where datname = current_database())
