-- 'fresh': what was granted, after the columns of completions.
select
    'fresh', null, create_time, null, null, null, null, null,
    id, tenant, provider, event_id, fencing_token, claim_id
from fresh
