-- The counts that the events give. Index: none; all events are read.
select tenant, provider, create_time / 3600000000 * 3600000000 as hour,
    sum(state = 'pending'), sum(state = 'processing'), sum(state = 'completed'), sum(state = 'failed'),
    sum(state = 'unknown'), sum(state = 'dead'), sum(duplicate_count), sum(max(attempt_count - 1, 0))
from payment_webhook_events
group by 1, 2, 3
