-- All processing times, in order, by tenant and provider: of the latest attempts that completed, and of completions in the
-- archive (of events that were replayed); with the hour that they are counted in and when they ended. Index: none; all events
-- and archived attempts are read.
select e.tenant, e.provider, e.end_time - e.start_time as micros, e.create_time / 3600000000 * 3600000000, e.end_time, 1
from payment_webhook_events e
where e.state = 'completed' and e.outcome = 'completed'
union all
select e.tenant, e.provider, a.end_time - a.start_time, e.create_time / 3600000000 * 3600000000, a.end_time, 0
from payment_webhook_attempts a join payment_webhook_events e on e.id = a.event_row
where a.outcome = 'completed'
order by 1, 2, 3
