-- What Stats and History need to stay quick on a large table: processing times, and what has been open for a while.

-- Processing times from lock to completion, as histograms: each row lists the buckets that have something, and how many
-- times fell into them (ledger/timings.rs says which bucket is which). Flushed each second by each writer, into rows of
-- its own slot (L5). A row per slot, tenant, provider and hour of the events' creation; it goes when a Cleanup has left
-- no completed event of that hour.
create table payment_webhook_timings (
    slot                integer     not null,
    tenant              text collate "C" not null,
    provider            text collate "C" not null,
    hour                timestamptz not null,
    buckets             smallint[]  not null,
    counts              bigint[]    not null,
    constraint payment_webhook_timings_pkey primary key (slot, tenant, provider, hour)
) with (fillfactor = 50);

-- Events that have been processing for more than some seconds, or again: where Stats finds what is stuck without reading
-- whole hours of events. An event that completes at once never stands here, for nothing is paid on its way (L4): a sweep
-- each second looks once at every event that is two seconds old, and the statement that grants a further attempt adds
-- its event. Entries of events that are no longer processing mean nothing and are removed later. What is missed (a commit
-- that took longer than the sweep waits) is noticed, for the counts say how many there must be, and then looked for.
create table payment_webhook_open (
    event_row           bigint      not null,
    constraint payment_webhook_open_pkey primary key (event_row)
);

-- Up to where the sweep has looked: events created before it were looked at once.
create table payment_webhook_sweep (
    id                  integer     not null,
    swept_until         timestamptz not null,
    constraint payment_webhook_sweep_pkey primary key (id),
    constraint payment_webhook_sweep_single check (id = 1)
) with (fillfactor = 50);

insert into payment_webhook_sweep (id, swept_until) values (1, clock_timestamp() - interval '10 seconds');
insert into payment_webhook_open (event_row) select id from payment_webhook_events where state = 'processing';

-- Stats and History with bounds in time read the counts of these hours only; the primary key begins with the slot. Nothing in
-- it changes, so updates stay heap-only; a row is added per slot, tenant, provider and hour.
create index payment_webhook_counts_hour on payment_webhook_counts (hour);
create index payment_webhook_timings_hour on payment_webhook_timings (hour);
