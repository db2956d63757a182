-- Adds times to one bucket of a histogram: what a whole transaction completed, written once (L5).
--
-- In:  tenant, provider, hour, bucket, how many. Index: the primary key.
insert into payment_webhook_timings (tenant, provider, hour, bucket, count) values (?1, ?2, ?3, ?4, ?5)
on conflict (tenant, provider, hour, bucket) do update set count = count + excluded.count
