        select tenant, provider, create_time, -1 as processing, 1 as completed, 0 as failed, 0 as unknown, 0 as dead
        from marked
