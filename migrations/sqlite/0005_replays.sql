-- What was replayed by force, for the caches: a cached completion from before a replay must not be believed. The process that did the
-- replay may not know of it, because a call is answered "unknown" when the writer does not come to it in time and does it all the
-- same; so it reads twice a second what is new (C7).

-- Of replays alone, which are rare: nothing is paid for it by an event that completes, and a resolution of another state does not
-- stand in it. By token, because tokens become visible in their order where one connection writes (L7, S2).
create index payment_webhook_resolutions_replays on payment_webhook_resolutions (fencing_token)
where from_state = 'completed';

-- The version before keeps the index without knowing of it.
update oncegate_meta set value = '2' where key = 'schema_compatible_from';
