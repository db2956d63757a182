-- The hours that have any event of a tenant, provider and states, newest first, as the counts tell (L5).
--
-- In:  the three (null: all; states as a JSON array), and bounds on the hour (closed).
-- Index: a walk along the primary key; the table has a row per tenant, provider and hour.
select hour
from payment_webhook_counts
where (?1 is null or tenant = ?1) and (?2 is null or provider = ?2) and hour >= ?4 and hour <= ?5
group by hour
having sum(
    case when ?3 is null or 'pending' in (select value from json_each(?3)) then pending else 0 end
    + case when ?3 is null or 'processing' in (select value from json_each(?3)) then processing else 0 end
    + case when ?3 is null or 'completed' in (select value from json_each(?3)) then completed else 0 end
    + case when ?3 is null or 'failed' in (select value from json_each(?3)) then failed else 0 end
    + case when ?3 is null or 'unknown' in (select value from json_each(?3)) then unknown else 0 end
    + case when ?3 is null or 'dead' in (select value from json_each(?3)) then dead else 0 end
) > 0
order by hour desc
