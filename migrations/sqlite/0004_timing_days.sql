-- Processing times of whole days, so that Stats over months reads a day where it read 24 hours.
--
-- As payment_webhook_timings, by day (UTC) of the events' creation: always the sum of that day's hours. Kept by the table of hours
-- itself, so that a version before this one keeps it too.
create table payment_webhook_timing_days (
    tenant              text    not null,
    provider            text    not null,
    -- The first moment of the day in which the events were created.
    day                 integer not null,
    bucket              integer not null,
    count               integer not null,
    constraint payment_webhook_timing_days_pkey primary key (tenant, provider, day, bucket)
) strict, without rowid;

insert into payment_webhook_timing_days (tenant, provider, day, bucket, count)
select tenant, provider, hour - hour % 86400000000, bucket, sum(count)
from payment_webhook_timings
group by 1, 2, 3, 4;

create trigger payment_webhook_timings_added after insert on payment_webhook_timings
begin
    insert into payment_webhook_timing_days (tenant, provider, day, bucket, count)
    values (new.tenant, new.provider, new.hour - new.hour % 86400000000, new.bucket, new.count)
    on conflict (tenant, provider, day, bucket) do update set count = count + excluded.count;
end;

create trigger payment_webhook_timings_changed after update of count on payment_webhook_timings
begin
    update payment_webhook_timing_days set count = count + new.count - old.count
    where tenant = new.tenant and provider = new.provider and day = new.hour - new.hour % 86400000000
        and bucket = new.bucket;
end;

create trigger payment_webhook_timings_removed after delete on payment_webhook_timings
begin
    update payment_webhook_timing_days set count = count - old.count
    where tenant = old.tenant and provider = old.provider and day = old.hour - old.hour % 86400000000
        and bucket = old.bucket;
    delete from payment_webhook_timing_days
    where tenant = old.tenant and provider = old.provider and day = old.hour - old.hour % 86400000000
        and bucket = old.bucket and count = 0;
end;

-- The version before needs to know nothing of it.
update oncegate_meta set value = '2' where key = 'schema_compatible_from';
