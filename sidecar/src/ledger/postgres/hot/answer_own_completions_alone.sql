-- What others may have changed in the event since it was granted.
select place, now, duplicate_count, mismatch_count, last_mismatch_time, lock_expire_time, completion_metadata
from marked
