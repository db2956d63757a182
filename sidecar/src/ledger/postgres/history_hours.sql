-- The hours that have any event of a tenant, provider and states, newest first, as the counts tell (L5).
--
-- In:  the three (null: all), and bounds on the hour (closed).
-- Index: payment_webhook_counts_tenant with a tenant, otherwise payment_webhook_counts_hour.
select c.hour
from payment_webhook_counts c
where ($1::text is null or c.tenant = $1) and ($2::text is null or c.provider = $2)
    and c.hour >= $4::timestamptz and c.hour <= $5::timestamptz
group by c.hour
having sum(
    case when $3::text[] is null or 'pending' = any ($3) then c.pending else 0 end
    + case when $3::text[] is null or 'processing' = any ($3) then c.processing else 0 end
    + case when $3::text[] is null or 'completed' = any ($3) then c.completed else 0 end
    + case when $3::text[] is null or 'failed' = any ($3) then c.failed else 0 end
    + case when $3::text[] is null or 'unknown' = any ($3) then c.unknown else 0 end
    + case when $3::text[] is null or 'dead' = any ($3) then c.dead else 0 end
) > 0
order by c.hour desc
