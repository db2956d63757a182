-- How many old versions of counts are not removed yet, and how many rows there are under a number in the present hour.
--
-- In:  the number.
-- Index: the primary key. The first is what the server's own statistics know, and lags behind by a second.
select pg_stat_get_dead_tuples('payment_webhook_counts'::regclass) as versions,
    (
        select count(*) from payment_webhook_counts c
        where c.slot = $1::integer and c.hour >= date_trunc('hour', clock_timestamp(), 'UTC')
    ) as rows
