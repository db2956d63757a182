-- Events that are processing, and those of them that are past their lock's expiry, by hour of creation and provider: of what
-- has been open for a while, and of what the sweep has not looked at yet.
--
-- In:  tenant and provider (null: all), bounds on the creation (half open).
-- Out: per hour and provider how many were found. Fewer than the counts of the same snapshot tell: something was missed, and
--      its hour has to be walked (stats_stuck.sql).
-- Index: payment_webhook_open_pkey and the primary key of the events; payment_webhook_events_create_time for the last seconds.
--      After a consumer has gone away there may be 100,000 of them: an array of row numbers takes a third of what a look-up for
--      each takes, and date_bin a fifth of date_trunc. OFFSET keeps the planner from turning the lateral into a join over the
--      whole table, and from reading what is open by its creation: with the statistics of a handful of events that looked
--      cheaper, and searched the whole array for each of them.
--      What was created by a clock that has gone back since would be read each time until that time comes again: beyond a minute
--      it is left to be missed and noted. now() and not clock_timestamp(), which no index can be searched by.
with processing as (
    select w.create_time, w.provider, w.lock_expire_time
    from (
        select v.create_time, v.provider, v.lock_expire_time
        from payment_webhook_events v
        where v.id = any (array(select o.event_row from payment_webhook_open o)) and v.state = 'processing'
            and ($1::text is null or v.tenant = $1) and ($2::text is null or v.provider = $2)
        offset 0
    ) w
    where w.create_time >= $3::timestamptz and w.create_time < $4::timestamptz
    union all
    select f.create_time, f.provider, f.lock_expire_time
    from payment_webhook_sweep s
    cross join lateral (
        select v.id, v.create_time, v.provider, v.lock_expire_time
        from payment_webhook_events v
        where v.create_time >= s.swept_until and v.create_time < now() + interval '1 minute' and v.state = 'processing'
            and ($1::text is null or v.tenant = $1) and ($2::text is null or v.provider = $2)
            and v.create_time >= $3::timestamptz and v.create_time < $4::timestamptz
        offset 0
    ) f
    where s.id = 1 and not exists (select from payment_webhook_open o where o.event_row = f.id)
)
select date_bin('1 hour', create_time, 'epoch') as hour, provider, count(*) as processing,
    count(*) filter (where lock_expire_time <= clock_timestamp()) as stuck
from processing
group by 1, 2
