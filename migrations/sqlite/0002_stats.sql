-- Processing times from lock to completion, as histograms: how many times fell into each bucket (ledger/timings.rs says
-- which bucket is which). Written by the transaction that completes the event, so that nothing is ever lost (L5). The rows
-- of an hour go when a Cleanup has left no completed event of it.
create table payment_webhook_timings (
    tenant              text    not null,
    provider            text    not null,
    -- The full hour in which the events were created.
    hour                integer not null,
    bucket              integer not null,
    count               integer not null,
    constraint payment_webhook_timings_pkey primary key (tenant, provider, hour, bucket)
) strict, without rowid;
