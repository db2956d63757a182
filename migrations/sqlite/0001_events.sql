-- The events, their attempts, and the counts that Stats answers from: the tables of migrations/postgres in SQLite.
--
-- What differs, and why. One connection writes (L7), so that a counter in a row is as good as a sequence and the counts
-- need no slot per writer. Times are microseconds since 1970: SQLite has no type of its own for them. Any update rewrites
-- the row and nothing else, so an index over what changes costs what it weighs and does not slow every other update.

-- The last fencing token that was given out, and the clock at that time (S2, S5). One row, never reset: a count per event
-- would start again after Cleanup, and a holder from before it would pass for a later one. It starts at the epoch in
-- microseconds, so that a new database never issues what an older one may have issued before. The clock is kept because
-- neither times nor tokens may go back when the machine's clock was set back while nobody ran.
create table oncegate_counter (
    id                  integer not null primary key check (id = 1),
    fencing_token       integer not null,
    clock_time          integer not null
) strict;
insert into oncegate_counter (id, fencing_token, clock_time)
select 1, now, now from (select cast(unixepoch('subsec') * 1000000 as integer) as now);

-- One row per event; the latest attempt stands on it (S9). What every call reads and changes comes first, so that
-- a large body or large metadata, which SQLite puts on pages of their own, is not walked through on the way to it.
create table payment_webhook_events (
    -- The token of the first grant: it grows with the creation, and a deleted event that is seen again gets another one.
    id                  integer not null primary key,
    tenant              text    not null,
    provider            text    not null,
    event_id            text    not null,
    event_type          text    not null,
    state               text    not null,
    attempt_count       integer not null,
    -- Attempts that the cap no longer counts, because an operator asked for another try after them.
    attempts_forgiven   integer not null default 0,
    duplicate_count     integer not null default 0,
    mismatch_count      integer not null default 0,
    last_mismatch_time  integer,
    fencing_token       integer not null,
    create_time         integer not null,
    -- When state, lock or token last changed.
    update_time         integer not null,
    -- When the event reached its current completed, dead or unknown state.
    end_time            integer,
    -- After a failure: when the next attempt may be granted.
    retry_time          integer,
    -- The latest attempt: null when a resolution has closed it, then the archive has them all.
    claim_id            text,
    holder              text,
    start_time          integer,
    lock_expire_time    integer,
    outcome             text,
    payload_digest      blob,
    fingerprint         blob,
    last_error          text,
    result_code         integer,
    result_content_type text,
    result_body         blob,
    -- JSON objects. What completions added is merged into metadata when it is read.
    metadata            text,
    completion_metadata text,

    constraint payment_webhook_events_key unique (tenant, provider, event_id),
    -- Written out because SQLite makes a temporary table of a longer IN list, for each row that is written.
    constraint payment_webhook_events_state_known
        check (state = 'pending' or state = 'processing' or state = 'completed' or state = 'failed'
            or state = 'unknown' or state = 'dead'),
    constraint payment_webhook_events_outcome_known
        check (outcome = 'running' or outcome = 'completed' or outcome = 'failed_retryable'
            or outcome = 'failed_terminal' or outcome = 'failed_unknown' or outcome = 'lock_expired'),
    constraint payment_webhook_events_processing_is_held
        check (state <> 'processing' or (outcome = 'running' and claim_id is not null and lock_expire_time is not null)),
    constraint payment_webhook_events_attempt_is_whole
        check ((claim_id is null) = (outcome is null) and (claim_id is null) = (start_time is null)
            and (claim_id is null) = (lock_expire_time is null) and (claim_id is null) = (holder is null))
) strict;

-- History lists newest first, Cleanup walks oldest first, both by key set: the row is the last part of every
-- index. New entries go to the end of it.
create index payment_webhook_events_create_time on payment_webhook_events (create_time);

-- What Stats counts as stuck. Only events that are processing stand in it.
create index payment_webhook_events_processing on payment_webhook_events (lock_expire_time) where state = 'processing';

-- Attempts that another one followed.
create table payment_webhook_attempts (
    event_row           integer not null,
    attempt             integer not null,
    fencing_token       integer not null,
    claim_id            text    not null,
    holder              text    not null,
    start_time          integer not null,
    end_time            integer not null,
    outcome             text    not null,
    error               text,
    payload_digest      blob,
    result_code         integer,
    result_content_type text,
    result_body         blob,
    constraint payment_webhook_attempts_pkey primary key (event_row, attempt),
    constraint payment_webhook_attempts_token unique (event_row, fencing_token),
    constraint payment_webhook_attempts_outcome_known
        check (outcome = 'completed' or outcome = 'failed_retryable' or outcome = 'failed_terminal'
            or outcome = 'failed_unknown' or outcome = 'lock_expired')
) strict;

-- Whether a claim id belongs to an attempt that has ended (S4) is asked by every further call on an event that was
-- attempted more than once. Not unique: a claim whose lock expired may be granted again.
create index payment_webhook_attempts_claim on payment_webhook_attempts (event_row, claim_id);

-- What operators decided by hand.
create table payment_webhook_resolutions (
    event_row           integer not null,
    -- The token that the resolution drew, and the one that it was decided on.
    fencing_token       integer not null,
    from_fencing_token  integer not null,
    from_state          text    not null,
    to_state            text    not null,
    reason              text    not null,
    actor               text    not null,
    time                integer not null,
    constraint payment_webhook_resolutions_pkey primary key (event_row, fencing_token)
) strict;

-- The senders' own identifiers of deliveries, with the digest that each came with: a known one with another payload is
-- a forgery (PayPal signs no more of the body than its CRC-32).
create table payment_webhook_deliveries (
    tenant              text    not null,
    provider            text    not null,
    delivery_id         text    not null,
    payload_digest      blob    not null,
    create_time         integer not null,
    constraint payment_webhook_deliveries_pkey primary key (tenant, provider, delivery_id)
) strict, without rowid;
create index payment_webhook_deliveries_create_time on payment_webhook_deliveries (create_time);

-- Counts, kept by the transactions that change the events (L5).
create table payment_webhook_counts (
    tenant              text    not null,
    provider            text    not null,
    -- The full hour in which the events were created.
    hour                integer not null,
    pending             integer not null default 0,
    processing          integer not null default 0,
    completed           integer not null default 0,
    failed              integer not null default 0,
    unknown             integer not null default 0,
    dead                integer not null default 0,
    -- Sum of duplicate_count, and of the attempts beyond the first.
    duplicates          integer not null default 0,
    retries             integer not null default 0,
    constraint payment_webhook_counts_pkey primary key (tenant, provider, hour)
) strict, without rowid;

-- What the service knows about its database.
create table oncegate_meta (
    key                 text    not null,
    value               text    not null,
    constraint oncegate_meta_pkey primary key (key)
) strict, without rowid;
-- Chosen once: a file that was made anew is another database.
insert into oncegate_meta (key, value) values ('database_identity', lower(hex(randomblob(16))));
