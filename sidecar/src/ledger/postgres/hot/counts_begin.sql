-- Adds what the statement changes to the counts of this writer's slot (L5).
counted as (
    insert into payment_webhook_counts as c (slot, tenant, provider, hour, processing, completed, failed, unknown, dead)
    select $1::integer, d.tenant, d.provider, date_bin('1 hour', d.create_time, 'epoch') as hour,
        sum(d.processing), sum(d.completed), sum(d.failed), sum(d.unknown), sum(d.dead)
    from (
