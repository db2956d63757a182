-- Notes up to which hour Cleanups have deleted events: times of those may be left, which the check must not take for too many.
--
-- In:  the latest hour of what is deleted. Never lowers it.
insert into oncegate_meta (key, value) values ('times_passed_until', cast(?1 as text))
on conflict (key) do update set value = cast(max(cast(value as integer), cast(excluded.value as integer)) as text)
