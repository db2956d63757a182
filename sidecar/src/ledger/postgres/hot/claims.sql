-- Looks every claimed event up by its unique key, and inserts and grants those that the snapshot does not have. A claim
-- in neither 'seen' nor 'fresh' met an insert that the snapshot cannot see: ask again in a new statement (PG2). Why it
-- is safe: the insert yields to the unique key, and tokens are drawn within its own values (S2). LIMIT keeps the
-- planner from turning the lateral into a join over the whole table (a plan trap, measured). Arrays and times are as in
-- new.sql.
seen as materialized (
    select q.*, e.id, e.create_time
    from (
        select
            unnest($2::text[]) as tenant, unnest($3::text[]) as provider, unnest($4::text[]) as event_id,
            unnest($5::text[]) as event_type, unnest($6::text[]) as claim_id, unnest($7::text[]) as holder,
            unnest($8::bigint[]) as lock_micros, unnest($9::bytea[]) as fingerprint, unnest($10::text[]) as metadata,
            unnest($11::bytea[]) as payload_digest, unnest($12::integer[]) as place
    ) q
    left join lateral (
        select v.id, v.create_time
        from payment_webhook_events v
        where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
        limit 1
    ) e on true
),
fresh as (
    insert into payment_webhook_events (
        tenant, provider, event_id, event_type, state, outcome, attempt_count, fencing_token,
        create_time, update_time, start_time, lock_expire_time, claim_id, holder, fingerprint, metadata, payload_digest
    )
    select
        s.tenant, s.provider, s.event_id, s.event_type, 'processing', 'running', 1,
        nextval('oncegate_fencing_token'),
        s.now, s.now, s.now, s.now + s.lock_micros * interval '1 microsecond',
        s.claim_id, s.holder, s.fingerprint, s.metadata::jsonb, s.payload_digest
    from (select seen.*, clock_timestamp() as now from seen where seen.id is null) s
    on conflict (tenant, provider, event_id) do nothing
    returning id, tenant, provider, event_id, fencing_token, create_time, claim_id
)
