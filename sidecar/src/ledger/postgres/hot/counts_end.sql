    ) d
    group by d.tenant, d.provider, date_bin('1 hour', d.create_time, 'epoch')
    order by 2, 3, 4
    on conflict (slot, tenant, provider, hour) do update set
        pending = c.pending + excluded.pending,
        processing = c.processing + excluded.processing,
        completed = c.completed + excluded.completed,
        failed = c.failed + excluded.failed,
        unknown = c.unknown + excluded.unknown,
        dead = c.dead + excluded.dead,
        retries = c.retries + excluded.retries
)
