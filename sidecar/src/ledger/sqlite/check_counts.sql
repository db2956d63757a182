-- The counts that are kept. Index: none; all of it is read.
select tenant, provider, hour, pending, processing, completed, failed, unknown, dead, duplicates, retries
from payment_webhook_counts
