-- Notes from when on each completion has its time in the histograms: always, in a file that is made now; from now on, in one that
-- an earlier version made and this one brings up to date. Once; the check compares what came later.
--
-- In:  whether the file is new. The clock is the later of the machine's and the one that was kept, as for the events.
insert into oncegate_meta (key, value)
select m.key, case when ?1 then '0' else cast(max(cast(unixepoch('subsec') * 1000000 as integer), c.clock_time) as text) end
from (select 'times_since' as key union all select 'times_passed_until') m, oncegate_counter c
where true
on conflict do nothing
