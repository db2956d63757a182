-- Inserts and grants what the snapshot does not have, and returns nothing for the other claims: they are of known events, or
-- met an insert that the snapshot cannot see. It is 'claims' without the answers for those, which is a quarter less work for
-- new events. OFFSET keeps the planner from turning the look-up into a join over the whole table (a plan trap).
fresh as (
    insert into payment_webhook_events (
        tenant, provider, event_id, event_type, state, outcome, attempt_count, fencing_token,
        create_time, update_time, start_time, lock_expire_time, claim_id, holder, fingerprint, metadata, payload_digest
    )
    select
        q.tenant, q.provider, q.event_id, q.event_type, 'processing', 'running', 1,
        nextval('oncegate_fencing_token'),
        t.now, t.now, t.now, t.now + q.lock_micros * interval '1 microsecond',
        q.claim_id, q.holder, q.fingerprint, q.metadata::jsonb, q.payload_digest
    from unnest(
        $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::bytea[],
        $10::text[], $11::bytea[], $12::integer[]
    ) as q (
        tenant, provider, event_id, event_type, claim_id, holder, lock_micros, fingerprint, metadata, payload_digest, place
    )
    cross join (select clock_timestamp() as now) t
    where not exists (
        select
        from payment_webhook_events v
        where v.tenant = q.tenant and v.provider = q.provider and v.event_id = q.event_id
        offset 0
    )
    on conflict (tenant, provider, event_id) do nothing
    returning id, tenant, provider, event_id, fencing_token, create_time, claim_id
)
