-- The parts of the event after the mark that its caller does not know.
select
    place, now,
    id, event_type, state, attempt_count, attempts_forgiven, duplicate_count, mismatch_count, last_mismatch_time, create_time,
    fingerprint, metadata, completion_metadata, last_error, claim_id, holder, start_time, lock_expire_time, payload_digest
from marked
