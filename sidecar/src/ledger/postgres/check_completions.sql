-- Makes a table of all processing times by tenant and provider, in their order: of the latest attempts that completed, and of
-- completions in the archive (of events that were replayed). Those of hours that a Cleanup has passed have an order of their
-- own: it folds the counts of such an hour into its slot. A table of the session, because three percentiles of each are asked
-- of it.
create temporary table oncegate_check on commit drop as
select tenant, provider, hour, compared, latest, end_time, micros,
    row_number() over (partition by tenant, provider, compared order by micros) as rank
from (
    select *, hour > coalesce((select max(c.hour) from payment_webhook_counts c where c.slot = 0), '-infinity') as compared
    from (
        select e.tenant, e.provider, date_bin('1 hour', e.create_time, 'epoch') as hour, true as latest, e.end_time,
            (extract(epoch from e.end_time - e.start_time) * 1000000)::bigint as micros
        from payment_webhook_events e
        where e.state = 'completed' and e.outcome = 'completed'
        union all
        select e.tenant, e.provider, date_bin('1 hour', e.create_time, 'epoch'), false, a.end_time,
            (extract(epoch from a.end_time - a.start_time) * 1000000)::bigint
        from payment_webhook_attempts a join payment_webhook_events e on e.id = a.event_row
        where a.outcome = 'completed'
    ) t
) u
