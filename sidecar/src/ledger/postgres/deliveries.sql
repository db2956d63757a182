-- Records the delivery ids of claims that have one, and tells which payload digest each first came with.
--
-- In:  deliveries as arrays, sorted by key.
-- Out: a row per delivery with the digest that stands. A delivery in no row met an insert that the snapshot cannot see:
--      ask again in a new statement.
-- Why it is safe: the primary key lets one digest in. A known delivery costs no write.
-- Index: the primary key.
with seen as materialized (
    select q.tenant, q.provider, q.delivery_id, q.payload_digest, d.payload_digest as known
    from unnest($1::text[], $2::text[], $3::text[], $4::bytea[]) as q (tenant, provider, delivery_id, payload_digest)
    left join lateral (
        select v.payload_digest from payment_webhook_deliveries v
        where v.tenant = q.tenant and v.provider = q.provider and v.delivery_id = q.delivery_id
        limit 1
    ) d on true
),
fresh as (
    insert into payment_webhook_deliveries (tenant, provider, delivery_id, payload_digest, create_time)
    select tenant, provider, delivery_id, payload_digest, clock_timestamp() from seen where known is null
    on conflict (tenant, provider, delivery_id) do nothing
    returning tenant, provider, delivery_id, payload_digest
)
select s.tenant, s.provider, s.delivery_id, s.known as payload_digest from seen s where s.known is not null
union all
select f.tenant, f.provider, f.delivery_id, f.payload_digest from fresh f
