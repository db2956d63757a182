-- The events, their attempts, and the counts that Stats answers from.
--
-- Two rules shape everything here. A duplicate must cost nothing but one index look-up. The common event (granted once,
-- completed once) must cost one insert and one heap-only update: a heap-only update needs room on the page and no change
-- in any column that an index or an index predicate names. So there is no index on state, times that change, or
-- tokens, not even a partial one (its predicate counts as an indexed column; measured at 27 % of the rate).

-- Fencing tokens (S2). One sequence for all events, never reset: a count per row would start again after Cleanup, and a
-- holder from before it would pass for a later one. It starts at the epoch in microseconds, so that a new database
-- never issues what an older one may have issued before. CACHE 1: sessions must not hoard numbers, or a later
-- grant could get the smaller one.
create sequence oncegate_fencing_token as bigint cache 1 no cycle;
select setval('oncegate_fencing_token', (extract(epoch from clock_timestamp()) * 1000000)::bigint);

-- One row per event; the latest attempt stands on it (S9).
create table payment_webhook_events (
    -- What other tables and the conditional updates join by.
    id                  bigint generated always as identity,
    fencing_token       bigint      not null,
    create_time         timestamptz not null,
    -- When state, lock or token last changed.
    update_time         timestamptz not null,
    -- When the event reached its current completed, dead or unknown state.
    end_time            timestamptz,
    -- After a failure: when the next attempt may be granted.
    retry_time          timestamptz,
    -- The latest attempt: null when a resolution has closed it, then the archive has them all.
    start_time          timestamptz,
    lock_expire_time    timestamptz,
    last_mismatch_time  timestamptz,
    duplicate_count     bigint      not null default 0,
    mismatch_count      bigint      not null default 0,
    attempt_count       integer     not null,
    -- Attempts that the cap no longer counts, because an operator asked for another try after them.
    attempts_forgiven   integer     not null default 0,
    result_code         integer,
    state               text collate "C" not null,
    outcome             text collate "C",
    tenant              text collate "C" not null,
    provider            text collate "C" not null,
    event_id            text collate "C" not null,
    event_type          text collate "C" not null,
    claim_id            text collate "C",
    holder              text,
    fingerprint         bytea,
    payload_digest      bytea,
    last_error          text,
    result_content_type text,
    result_body         bytea,
    metadata            jsonb,
    -- What completions added; merged into metadata when it is read.
    completion_metadata jsonb,

    constraint payment_webhook_events_pkey primary key (id),
    -- Never partition this table by time: a unique key would then hold only within a partition (L1).
    constraint payment_webhook_events_key unique (tenant, provider, event_id),
    constraint payment_webhook_events_state_known
        check (state in ('pending', 'processing', 'completed', 'failed', 'unknown', 'dead')),
    constraint payment_webhook_events_processing_is_held
        check (state <> 'processing' or (outcome = 'running' and claim_id is not null and lock_expire_time is not null)),
    constraint payment_webhook_events_attempt_is_whole
        check ((claim_id is null) = (outcome is null) and (claim_id is null) = (start_time is null))
) with (
    -- 45: a batch completes neighbours together, and each needs a second version on the same page. At 80 only a third
    -- of the updates stayed heap-only, at 45 all, with 12 % more rate.
    fillfactor = 45,
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.05
);

-- History lists newest first, Cleanup walks oldest first, both by key set. The time never changes, so the
-- index does not stand in the way of heap-only updates; it costs 3 % of the insert rate.
create index payment_webhook_events_create_time on payment_webhook_events (create_time, id);

-- Attempts that another one followed. No foreign key: its trigger on every deleted event would slow Cleanup, which
-- deletes both in one statement.
create table payment_webhook_attempts (
    event_row           bigint      not null,
    attempt             integer     not null,
    fencing_token       bigint      not null,
    claim_id            text collate "C" not null,
    holder              text        not null,
    start_time          timestamptz not null,
    end_time            timestamptz not null,
    outcome             text collate "C" not null,
    error               text,
    payload_digest      bytea,
    result_code         integer,
    result_content_type text,
    result_body         bytea,
    constraint payment_webhook_attempts_pkey primary key (event_row, attempt)
);

-- What operators decided by hand.
create table payment_webhook_resolutions (
    event_row           bigint      not null,
    -- The token that the resolution drew, and the one that it was decided on.
    fencing_token       bigint      not null,
    from_fencing_token  bigint      not null,
    from_state          text collate "C" not null,
    to_state            text collate "C" not null,
    reason              text        not null,
    actor               text        not null,
    time                timestamptz not null,
    constraint payment_webhook_resolutions_pkey primary key (event_row, fencing_token)
);

-- The senders' own identifiers of deliveries, with the digest that each came with: a known one with another payload is
-- a forgery (PayPal signs no more of the body than its CRC-32).
create table payment_webhook_deliveries (
    tenant              text collate "C" not null,
    provider            text collate "C" not null,
    delivery_id         text collate "C" not null,
    payload_digest      bytea       not null,
    create_time         timestamptz not null,
    constraint payment_webhook_deliveries_pkey primary key (tenant, provider, delivery_id)
);
create index payment_webhook_deliveries_create_time on payment_webhook_deliveries (create_time);

-- Counts, kept by the statements that change the events (L5). One row per writer slot, so that no row is hot across
-- sidecars; a slot's own numbers may be negative, only the sum over the slots means something.
create table payment_webhook_counts (
    slot                integer     not null,
    tenant              text collate "C" not null,
    provider            text collate "C" not null,
    -- The full hour in which the events were created.
    hour                timestamptz not null,
    pending             bigint      not null default 0,
    processing          bigint      not null default 0,
    completed           bigint      not null default 0,
    failed              bigint      not null default 0,
    unknown             bigint      not null default 0,
    dead                bigint      not null default 0,
    -- Sum of duplicate_count, and of the attempts beyond the first.
    duplicates          bigint      not null default 0,
    retries             bigint      not null default 0,
    constraint payment_webhook_counts_pkey primary key (slot, tenant, provider, hour)
) with (fillfactor = 50);

-- What the service knows about its database.
create table oncegate_meta (
    key                 text collate "C" not null,
    value               text        not null,
    constraint oncegate_meta_pkey primary key (key)
);
-- System identifier and timeline that the tokens were last checked against. Filled in by the first connection.
insert into oncegate_meta (key, value) values ('database_identity', '');
-- What values in the cache are authenticated with (C3): whoever can write to Redis must not be able to make the service
-- believe that a payment was processed. 244 random bits.
insert into oncegate_meta (key, value)
values ('cache_key', replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''));
