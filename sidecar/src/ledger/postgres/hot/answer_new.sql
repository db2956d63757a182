-- 'fresh': what was granted, and nothing else.
select
    'fresh' as source, null::integer as place, create_time as now, false as claim_ended,
    id, tenant, provider, event_id, fencing_token, claim_id
from fresh
