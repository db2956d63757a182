-- Inserts and grants what the snapshot does not have, and returns nothing for the other claims: they are of known events, or
-- met an insert that the snapshot cannot see. It is 'claims' without the answers for those, which is a quarter less work for
-- new events. OFFSET keeps the planner from turning the look-up into a join over the whole table (a plan trap).
-- The arrays are taken apart in the select list, one item of each for every row. In FROM each of them is first written into
-- a store of its own, which is 4 % of a batch. Every row has its own time: own_completions.sql says what that is good for.
fresh as (
    insert into payment_webhook_events (
        tenant, provider, event_id, event_type, state, outcome, attempt_count, fencing_token,
        create_time, update_time, start_time, lock_expire_time, claim_id, holder, fingerprint, metadata, payload_digest
    )
    select
        q.tenant, q.provider, q.event_id, q.event_type, 'processing', 'running', 1,
        nextval('oncegate_fencing_token'),
        q.now, q.now, q.now, q.now + q.lock_micros * interval '1 microsecond',
        q.claim_id, q.holder, q.fingerprint, q.metadata::jsonb, q.payload_digest
    from (
        select
            clock_timestamp() as now,
            unnest($2::text[]) as tenant, unnest($3::text[]) as provider, unnest($4::text[]) as event_id,
            unnest($5::text[]) as event_type, unnest($6::text[]) as claim_id, unnest($7::text[]) as holder,
            unnest($8::bigint[]) as lock_micros, unnest($9::bytea[]) as fingerprint, unnest($10::text[]) as metadata,
            unnest($11::bytea[]) as payload_digest, unnest($12::integer[]) as place
    ) q
    where not exists (
        select
        from payment_webhook_events v
        where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
        offset 0
    )
    on conflict (tenant, provider, event_id) do nothing
    returning id, tenant, provider, event_id, fencing_token, create_time, claim_id
)
