-- How many processing times may be missing, by tenant and provider.
--
-- Times are in memory for a second and for as long as they take to write. So those of completions in the last seconds may not
-- be there yet, and a process that is killed loses those of two seconds: as many as ended in the busiest ones. How often that
-- happened nobody knows; where it was often, it may be one in twenty of all. And there are none of completions from before there
-- were histograms, which is known where their migration came later than the first; programs of the version before were at work
-- for some time after it.
with since as (
    select histograms.installed_on + interval '1 hour' as time
    from oncegate_migrations histograms join oncegate_migrations first on first.version = 1
    where histograms.version = 2 and histograms.installed_on > first.installed_on + interval '1 minute'
),
seconds as (
    select tenant, provider, date_trunc('second', end_time) as second, count(*) as ended,
        count(*) filter (
            where end_time > now() - interval '10 seconds' or end_time < (select time from since)
        ) as without
    from oncegate_check
    group by 1, 2, 3
),
spans as (
    select tenant, provider, ended, without,
        sum(ended) over (
            partition by tenant, provider order by second range between interval '2 seconds' preceding and current row
        ) as together
    from seconds
)
select tenant, provider, (sum(without) + greatest(max(together), floor(sum(ended) / 20)))::bigint as missing_max
from spans
group by tenant, provider
