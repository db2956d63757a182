-- Puts the processing events of some hours into payment_webhook_open, after a Stats has found that some were missing.
--
-- In:  the hours. Index: payment_webhook_events_create_time, an hour at a time.
insert into payment_webhook_open (event_row)
select e.id
from unnest($1::timestamptz[]) as h (hour)
cross join lateral (
    select v.id
    from payment_webhook_events v
    where v.create_time >= h.hour and v.create_time < h.hour + interval '1 hour' and v.state = 'processing'
    offset 0
) e
order by 1
on conflict (event_row) do nothing
