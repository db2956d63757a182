-- Applies every mark that its token, its claim and the event's state allow. A mark in no row of 'marked' was not
-- applied: read the event and classify (S3).
-- Why it is safe: the look-up decides on the snapshot, and the update joins by the row (own_completions.sql says why by
-- ranges) and checks token, state and outcome once more: where another session changed the row meanwhile, these are
-- evaluated again on the version that is then locked. The outcome is checked because what an expiry made dead stays
-- dead when its holder reports how it ended. The inputs of the new state (attempts, forgiven ones) change only together
-- with the token.
-- OFFSET keeps the planner from turning the look-up into a join over the whole table (a plan trap, measured), and from
-- evaluating again what the look-up decides; a separate CTE for that took a tenth of the statement's plan. Arrays are as in
-- new.sql.
marked as (
    update payment_webhook_events e set
        state = h.to_state,
        outcome = h.outcome,
        update_time = h.now,
        end_time = case when h.to_state = 'failed' then null else h.now end,
        retry_time = case when h.to_state = 'failed' then h.now + h.retry_micros * interval '1 microsecond' end,
        last_error = case when h.outcome = 'completed' then e.last_error else h.error end,
        result_code = h.result_code,
        result_body = h.result_body,
        result_content_type = h.result_content_type,
        completion_metadata = case when h.metadata is null then e.completion_metadata
            else coalesce(e.completion_metadata, '{}'::jsonb) || h.metadata::jsonb end
    from (
        select
            m.place, e.fencing_token, m.outcome, m.error, m.retry_micros, m.result_code, m.result_body, m.result_content_type,
            m.metadata, e.id, e.create_time, e.state as from_state, e.outcome as from_outcome, clock_timestamp() as now,
            case m.outcome
                when 'completed' then 'completed'
                when 'failed_unknown' then 'unknown'
                when 'failed_terminal' then 'dead'
                when 'failed_retryable' then
                    case when m.attempts_max > 0 and e.attempt_count - e.attempts_forgiven >= m.attempts_max
                        then 'dead' else 'failed' end
            end as to_state
        from (
            select
                unnest($13::text[]) as tenant, unnest($14::text[]) as provider, unnest($15::text[]) as event_id,
                unnest($16::bigint[]) as fencing_token, unnest($17::text[]) as claim_id, unnest($18::text[]) as outcome,
                unnest($19::integer[]) as attempts_max, unnest($20::text[]) as error, unnest($21::bigint[]) as retry_micros,
                unnest($22::integer[]) as result_code, unnest($23::bytea[]) as result_body,
                unnest($24::text[]) as result_content_type, unnest($25::text[]) as metadata, unnest($26::integer[]) as place
        ) m
        cross join lateral (
            select v.id, v.create_time, v.fencing_token, v.state, v.outcome, v.attempt_count, v.attempts_forgiven
            from payment_webhook_events v
            where v.tenant = m.tenant and v.provider = m.provider and v.event_id = m.event_id
                and v.fencing_token = m.fencing_token
                and (m.claim_id is null or v.claim_id = m.claim_id)
                -- Processing, expired or not; or the token that an expiry at the cap made dead (S3).
                and (v.state = 'processing' or (v.state = 'dead' and v.outcome = 'lock_expired'))
            offset 0
        ) e
        offset 0
    ) h
    where e.id between h.id and h.id and e.create_time between h.create_time and h.create_time
        and e.fencing_token = h.fencing_token and e.state = h.from_state and e.outcome = h.from_outcome
    returning
        h.place, h.from_state, h.now, e.tenant, e.provider,
        e.id, e.event_type, e.state, e.attempt_count, e.attempts_forgiven, e.duplicate_count, e.mismatch_count,
        e.last_mismatch_time, e.create_time, e.fingerprint, e.metadata::text as metadata,
        e.completion_metadata::text as completion_metadata, e.last_error, e.claim_id, e.holder, e.start_time,
        e.lock_expire_time, e.payload_digest
)
