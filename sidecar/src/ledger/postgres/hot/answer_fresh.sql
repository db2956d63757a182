-- 'fresh': what was granted, in the columns of the other answers.
select
    'fresh', null, create_time, false,
    id, tenant, provider, event_id, null, null, null, null, null, null,
    null, fencing_token, null, null, null, null, null, null,
    null, null, null, null, null, claim_id, null, null,
    null, null, null
from fresh
