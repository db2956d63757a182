-- Counts and processing times by tenant and time. Stats and History of one tenant found them by their hour alone, and so read those
-- of all tenants: with 5,000 tenants and 30 days 3.6 million rows of counts for 720, most of a second. The primary keys begin with
-- the slot. The provider is there for statements that name a row without its slot. None of these columns ever changes, so
-- updates stay heap-only; a row is added per slot, tenant, provider and hour.
--
-- On tables with many rows this takes a while (about a second a million), in which calls that write are refused, and providers
-- come again. Only with thousands of tenants are there millions.
create index payment_webhook_counts_tenant on payment_webhook_counts (tenant, hour, provider);
create index payment_webhook_timings_tenant on payment_webhook_timings (tenant, hour, provider);
create index payment_webhook_timing_days_tenant on payment_webhook_timing_days (tenant, day, provider);

-- The version before needs to know nothing of it.
update oncegate_meta set value = '2' where key = 'schema_compatible_from';
