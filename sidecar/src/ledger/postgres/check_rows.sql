-- The counts that the events give. Index: none; all events are read.
select tenant, provider, date_bin('1 hour', create_time, 'epoch') as hour,
    count(*) filter (where state = 'pending') as pending, count(*) filter (where state = 'processing') as processing,
    count(*) filter (where state = 'completed') as completed, count(*) filter (where state = 'failed') as failed,
    count(*) filter (where state = 'unknown') as unknown, count(*) filter (where state = 'dead') as dead,
    sum(duplicate_count)::bigint as duplicates, sum(greatest(attempt_count - 1, 0))::bigint as retries
from payment_webhook_events
group by 1, 2, 3
