-- 'marks' for completions of grants of this process that it still remembers: they name the row, and get back only what
-- others may have changed in it since. Where one changes nothing, its event is read and classified, as with every mark
-- (S3).
-- Why it is safe: each is a conditional update by the primary key, and it decides on the version that it locks. A token
-- belongs to one grant of one event (S2), so a row that has it is the one that was granted.
-- Ranges are used, where equality would do, on all columns that an index has together with the row's number: ranges
-- cannot become a merge of two sorted lists, so the planner has no use for a whole index in order, and whichever index
-- it picks, it can look the row up in it. With equality, and statistics of a handful of rows, it walked the whole
-- primary key (a plan trap, measured). The range of times passes over all rows that were created at the same moment, so
-- each grant has its own: with one for a batch, 32 completions took a tenth longer, 128 a seventh. Arrays are as in new.sql.
marked as (
    update payment_webhook_events e set
        state = 'completed',
        outcome = 'completed',
        update_time = m.now,
        end_time = m.now,
        retry_time = null,
        result_code = m.result_code,
        result_body = m.result_body,
        result_content_type = m.result_content_type,
        completion_metadata = case when m.metadata is null then e.completion_metadata
            else coalesce(e.completion_metadata, '{}'::jsonb) || m.metadata::jsonb end
    from (
        select
            clock_timestamp() as now,
            unnest($13::bigint[]) as id, unnest($14::bigint[]) as fencing_token, unnest($15::integer[]) as result_code,
            unnest($16::bytea[]) as result_body, unnest($17::text[]) as result_content_type, unnest($18::text[]) as metadata,
            unnest($19::integer[]) as place, unnest($20::timestamptz[]) as create_time
    ) m
    where e.id between m.id and m.id and e.create_time between m.create_time and m.create_time
        and e.fencing_token = m.fencing_token and e.state = 'processing'
    returning
        m.place, m.now, e.tenant, e.provider, e.create_time, e.duplicate_count, e.mismatch_count, e.last_mismatch_time,
        e.lock_expire_time, e.completion_metadata::text as completion_metadata
)
