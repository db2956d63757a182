        select tenant, provider, create_time,
            -(from_state = 'processing')::integer as processing, (state = 'completed')::integer as completed,
            (state = 'failed')::integer as failed, (state = 'unknown')::integer as unknown,
            (state = 'dead')::integer - (from_state = 'dead')::integer as dead
        from marked
