-- 'own': the same, in front of the columns of grants.
select
    'own' as source, place, now, duplicate_count, mismatch_count, last_mismatch_time, lock_expire_time, completion_metadata,
    null::bigint as id, null::text as tenant, null::text as provider, null::text as event_id,
    null::bigint as fencing_token, null::text as claim_id
from marked
